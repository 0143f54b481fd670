"""The words of a refusal: which argument, what was expected, what came. Each public function checks once, in one
expression; only when that fails is it worth the time to find the culprit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastseq.errors import ShapeError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Size = tuple[int, ...] | torch.Size


def refuse_shape(name: str, expected: str, got: Size) -> NoReturn:
    """Raises the ShapeError for argument ``name``."""
    raise ShapeError(f"{name}: expected {expected}, got {list(got)}")


def check_kinds(named: Sequence[tuple[str, Any]], optional: frozenset[str]) -> None:
    """All are tensors (those in ``optional`` may be None) of one dtype that is served, on one device.

    Raises:
        TypeError: naming the first that is not.
    """
    dtype = device = None
    for name, value in named:
        if value is None and name in optional:
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            break
        if dtype is None:
            dtype, device = value.dtype, value.device
            if dtype not in DTYPES:
                break
        elif value.dtype is not dtype or value.device != device:
            break
    else:
        return
    _refuse_kinds(named, optional)


def _refuse_kinds(named: Iterable[tuple[str, Any]], optional: frozenset[str]) -> None:
    first: Tensor | None = None
    for name, value in named:
        if value is None and name in optional:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a Tensor{' or None' if name in optional else ''}, got {type(value).__name__}"
            )
        if value.dtype not in DTYPES:
            wanted = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"{name}: expected one of the dtypes {wanted}, got {value.dtype}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
        if first is None:
            first, first_name = value, name
        elif value.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype}, the dtype of {first_name}, got {value.dtype}")
        elif value.device != first.device:
            raise TypeError(f"{name}: expected device {first.device}, that of {first_name}, got {value.device}")


def check_shapes(named: Iterable[tuple[str, Tensor | None, Size, str]]) -> None:
    """Every tensor that is there has its shape: ``(name, tensor, shape, the same in letters)``.

    Raises:
        ShapeError: naming the first that has not.
    """
    for name, value, shape, letters in named:
        if value is not None and value.shape != shape:
            refuse_shape(name, f"shape {letters} = {list(shape)}", value.shape)


def check_time(lengths: Any, reset: Any, steps: int, batch: int) -> None:
    """``lengths`` are integers ``[B]`` within 0 … T, and ``reset`` is bool ``[T, B]``; either may be None.

    The values of ``lengths`` are read where they can be: not under ``torch.compile``, ``torch.export``, a functorch
    transform or a CUDA graph capture. There a length beyond T means T and a negative one means 0.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ShapeError: of the wrong shape, or a length out of range.
    """
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected an integer Tensor, got {type(lengths).__name__}")
        if lengths.dtype not in INTEGERS:
            raise TypeError(f"lengths: expected an integer dtype such as torch.int64, got {lengths.dtype}")
        if lengths.shape != (batch,):
            refuse_shape("lengths", f"shape [B] = [{batch}]", lengths.shape)
        if batch and _readable(lengths):
            low, high = (int(value) for value in torch.aminmax(lengths))
            if low < 0 or high > steps:
                raise ShapeError(f"lengths: expected values from 0 to T = {steps}, got {low if low < 0 else high}")
    if reset is not None:
        if not isinstance(reset, Tensor):
            raise TypeError(f"reset: expected a bool Tensor, got {type(reset).__name__}")
        if reset.dtype != torch.bool:
            raise TypeError(f"reset: expected dtype torch.bool, got {reset.dtype}")
        if reset.shape != (steps, batch):
            refuse_shape("reset", f"shape [T, B] = {[steps, batch]}", reset.shape)


def check_zoneout(name: str, value: Any, shape: Size, letters: str, device: torch.device) -> None:
    """``value`` is None, a rate from 0 to 1, or a bool mask of this shape (``letters``: the same in letters).

    Raises:
        TypeError: something else, or a mask on another device than ``x``.
        ValueError: a rate out of range.
        fastseq.ShapeError: a mask of another shape.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.bool:
            raise TypeError(f"{name}: expected dtype torch.bool, got {value.dtype}")
        if value.device != device:
            raise TypeError(f"{name}: expected device {device}, that of x, got {value.device}")
        check_shapes(((name, value, shape, letters),))
    elif value is not None and not (_is_number(value) and 0 <= value <= 1):
        error = ValueError if _is_number(value) else TypeError
        raise error(f"{name}: expected a bool Tensor or a rate from 0 to 1, got {value!r}")


def check_limits(named: Iterable[tuple[str, Any]]) -> None:
    """Every ``(name, limit)`` is None or a number above 0.

    Raises:
        TypeError: no number.
        ValueError: a number that is not above 0.
    """
    for name, value in named:
        if value is not None and not _is_number(value):
            raise TypeError(f"{name}: expected a number above 0 or None, got {value!r}")
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number above 0 or None, got {value!r}")


def pair_of(name: str, value: Any) -> tuple[Any, Any]:
    """The two states ``(h, c)`` of an LSTM, or two Nones for None.

    Raises:
        TypeError: something else than a tuple or list.
        fastseq.ShapeError: not two of them.
    """
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple (h, c) of tensors, got {type(value).__name__}")
    if len(value) != 2:
        raise ShapeError(f"{name}: expected a tuple (h, c) of two tensors, got {len(value)}")
    return value[0], value[1]


def check_reset_state(named: Sequence[tuple[str, Any, int, str]], steps: int, batch: int) -> None:
    """Every ``(name, state, size, the size's letter)`` is ``[B, size]`` or ``[T, B, size]``.

    Raises:
        fastseq.ShapeError: one is not.
    """
    for name, value, size, letter in named:
        if value.shape not in ((batch, size), (steps, batch, size)):
            either = f"[B, {letter}] = {[batch, size]} or [T, B, {letter}] = {[steps, batch, size]}"
            refuse_shape(name, f"shape {either}", value.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _readable(value: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if value.is_meta or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def check_points(z: Any, centers: Any) -> None:
    """``z`` is ``[N, d]`` and ``centers`` is ``[K, d]``, of one dtype on one device, with K and d at least 1.

    Raises:
        TypeError: not tensors, or of dtypes or devices that are not served together.
        ShapeError: of the wrong rank or size.
    """
    check_kinds((("z", z), ("centers", centers)), optional=frozenset())
    if z.dim() != 2 or z.shape[1] == 0:
        refuse_shape("z", "shape [N, d] with d of at least 1", z.shape)
    if centers.dim() != 2 or centers.shape[0] == 0 or centers.shape[1] != z.shape[1]:
        refuse_shape("centers", f"shape [K, d] = [K, {z.shape[1]}] with K of at least 1", centers.shape)


def check_alpha(alpha: Any) -> float:
    """``alpha``, the degrees of freedom, as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not positive and finite.
    """
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
    value = float(alpha)
    if not 0 < value < math.inf:
        raise ValueError(f"alpha: expected a positive finite number, got {value}")
    return value


def check_frequencies(freq: Any, like: Tensor, name: str, centers: int) -> None:
    """``freq`` is a floating tensor ``[K]`` where ``like``, the argument ``name``, is.

    Raises:
        TypeError: not a floating tensor, or on another device.
        ShapeError: of the wrong shape.
    """
    if not isinstance(freq, Tensor):
        raise TypeError(f"freq: expected a Tensor or None, got {type(freq).__name__}")
    if not freq.is_floating_point():
        raise TypeError(f"freq: expected a floating dtype, got {freq.dtype}")
    if freq.device != like.device:
        raise TypeError(f"freq: expected device {like.device}, that of {name}, got {freq.device}")
    if freq.shape != (centers,):
        refuse_shape("freq", f"shape [K] = [{centers}]", freq.shape)


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype that autocast wants where ``x`` is, or None where it is off."""
    # The first question is cheap and spares the second, which raises for devices that autocast does not know (meta).
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def under_autocast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` as autocast hands it to ``torch.nn.LSTM``: floating tensors, but for float64, in ``dtype``."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
