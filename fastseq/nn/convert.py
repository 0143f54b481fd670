"""From torch's recurrent modules to fastseq's and back: ``convert``, ``to_torch``, ``patch``.

A converted module is a new object of another class over the old one's content: the same Parameter objects, buffers,
submodules, hook registries and attributes. Nothing is copied, drawn anew or re-registered, so optimizers, tied weights,
hook handles, pruning and parametrizations stay as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast, overload

import torch.nn.modules.rnn
from torch import nn
from torch.nn.utils import parametrize

from fastseq.nn.cell import LSTMCell, LSTMCellForward, RNNCell, RNNCellForward
from fastseq.nn.lstm import LSTM, LSTMForward
from fastseq.nn.rnn import RNN, RNNForward

# Held from the import on, since inside patch() the names in torch.nn are fastseq's.
TorchLSTM = nn.LSTM
TorchRNN = nn.RNN
TorchLSTMCell = nn.LSTMCell
TorchRNNCell = nn.RNNCell
_TORCH_GRU = (nn.GRU, nn.GRUCell)


class TypedLSTM(LSTMForward, TorchLSTM):
    """An ``nn.LSTM`` that runs on fastseq: what ``convert(keep_type=True)`` makes. ``torch.compile`` refuses it."""

    def _get_name(self) -> str:
        return "LSTM"


class TypedRNN(RNNForward, TorchRNN):
    """An ``nn.RNN`` that runs on fastseq: what ``convert(keep_type=True)`` makes. ``torch.compile`` refuses it."""

    def _get_name(self) -> str:
        return "RNN"


class TypedLSTMCell(LSTMCellForward, TorchLSTMCell):
    """An ``nn.LSTMCell`` that runs on fastseq: what ``convert(keep_type=True)`` makes."""

    def _get_name(self) -> str:
        return "LSTMCell"


class TypedRNNCell(RNNCellForward, TorchRNNCell):
    """An ``nn.RNNCell`` that runs on fastseq: what ``convert(keep_type=True)`` makes."""

    def _get_name(self) -> str:
        return "RNNCell"


# torch's class, fastseq's, and fastseq's that is a subclass of torch's.
_FAMILIES: tuple[tuple[type[nn.Module], type[nn.Module], type[nn.Module]], ...] = (
    (TorchLSTM, LSTM, TypedLSTM),
    (TorchRNN, RNN, TypedRNN),
    (TorchLSTMCell, LSTMCell, TypedLSTMCell),
    (TorchRNNCell, RNNCell, TypedRNNCell),
)
_TO_PLAIN = {source: plain for torch_class, plain, typed in _FAMILIES for source in (torch_class, typed)}
_TO_TYPED = {torch_class: typed for torch_class, _, typed in _FAMILIES}
_TO_TORCH = {source: torch_class for torch_class, plain, typed in _FAMILIES for source in (plain, typed)}

# What torch.nn's modules do not have, and the values that leave it out.
_OPTIONS: dict[str, Any] = {
    "recurrent_dropout": 0,
    "zoneout": (0, 0),
    "peephole": False,
    "layer_norm": None,
    "cell_clip": None,
    "grad_clip": None,
    "recompute": False,
}

M = TypeVar("M", bound=nn.Module)


@overload
def convert(module: M, *, keep_type: Literal[True]) -> M: ...
@overload
def convert(module: TorchLSTM, *, keep_type: Literal[False] = ...) -> LSTM: ...
@overload
def convert(module: TorchRNN, *, keep_type: Literal[False] = ...) -> RNN: ...
@overload
def convert(module: TorchLSTMCell, *, keep_type: Literal[False] = ...) -> LSTMCell: ...
@overload
def convert(module: TorchRNNCell, *, keep_type: Literal[False] = ...) -> RNNCell: ...
@overload
def convert(module: M, *, keep_type: bool = ...) -> M: ...
def convert(module: nn.Module, *, keep_type: bool = False) -> nn.Module:
    """Swaps every ``nn.LSTM``, ``nn.RNN``, ``nn.LSTMCell`` and ``nn.RNNCell`` inside a module for fastseq's, in place.

    The new modules share the old ones' Parameter objects, buffers, hook registries (a handle from
    ``register_forward_hook`` still removes its hook), parametrizations, training mode and other attributes. A module
    that occurs in several places is swapped for one new module in all of them. Only registered submodules are found,
    not those kept in a plain list or in a closure.

    Left alone, with one warning each that lists them: GRU modules, for which fastseq has no kernels, and subclasses
    that define more than a constructor, since their changes would be lost.

    Args:
        module: the model; or an ``nn.LSTM`` (``nn.RNN``, cell) itself.
        keep_type: whether the new modules shall still pass ``isinstance(m, nn.LSTM)``. ``torch.compile`` refuses such.

    Returns:
        The same model; or the new module where ``module`` itself is to be swapped.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
    """
    _require_module("convert", module)
    table = _TO_TYPED if keep_type else _TO_PLAIN
    found: dict[nn.Module, type[nn.Module]] = {}
    grus: list[str] = []
    customised: list[str] = []
    for path, each in module.named_modules():
        target = table.get(_own_class(each))
        if target is not None:
            found[each] = target
        elif isinstance(each, _TORCH_GRU):
            grus.append(path or type(each).__name__)
        elif isinstance(each, tuple(table)) and not isinstance(each, tuple(_TO_TORCH)):
            customised.append(f"{path or 'the module'} ({type(each).__name__})")
    if grus:
        warnings.warn(f"fastseq.convert leaves GRU modules alone: {', '.join(grus)}", stacklevel=2)
    if customised:
        warnings.warn(
            "fastseq.convert leaves subclasses that define more than a constructor alone, since their changes would be "
            f"lost: {', '.join(customised)}",
            stacklevel=2,
        )
    return _swap(module, found)


@overload
def to_torch(module: LSTM) -> TorchLSTM: ...
@overload
def to_torch(module: RNN) -> TorchRNN: ...
@overload
def to_torch(module: LSTMCell) -> TorchLSTMCell: ...
@overload
def to_torch(module: RNNCell) -> TorchRNNCell: ...
@overload
def to_torch(module: M) -> M: ...
def to_torch(module: nn.Module) -> nn.Module:
    """Swaps every fastseq recurrent module inside a module for ``torch.nn``'s, in place: the way back from ``convert``.

    For what knows torch's own modules only, such as ONNX export. Shares and keeps what :func:`convert` does.

    Args:
        module: the model; or a ``fastseq.LSTM`` (``fastseq.RNN``, cell) itself.

    Returns:
        The same model; or the new module where ``module`` itself is to be swapped.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: a module uses what torch does not have (``nonlinearity="sigmoid"``, ``zoneout``, …), or is an
            instance of a subclass that defines more than a constructor. Nothing has been swapped then.
    """
    _require_module("to_torch", module)
    found: dict[nn.Module, type[nn.Module]] = {}
    for path, each in module.named_modules():
        name = path or "the module"
        target = _TO_TORCH.get(_own_class(each))
        if target is None:
            if isinstance(each, tuple(_TO_TORCH)):
                raise ValueError(
                    f"to_torch: {name} is a {type(each).__name__}, a subclass that defines more than a constructor; "
                    "its changes would be lost"
                )
            continue
        if getattr(each, "nonlinearity", "tanh") == "sigmoid":
            raise ValueError(f"to_torch: {name} has nonlinearity 'sigmoid', which torch.nn does not have")
        for option, plain in _OPTIONS.items():
            value = getattr(each, option, plain)
            if value != plain:
                raise ValueError(f"to_torch: {name} has {option}={value}, which torch.nn does not have")
        found[each] = target
    return _swap(module, found)


@contextmanager
def patch() -> Iterator[None]:
    """Inside this context, ``torch.nn.LSTM``, ``RNN``, ``LSTMCell`` and ``RNNCell`` are fastseq's.

    For code that builds its own modules: what is constructed inside is fastseq's, and stays so afterwards. The names
    are put back at the end, on an exception too; contexts may be nested. Also usable as a decorator.

    The names are those of the process: other threads see them too. Names that were imported before
    (``from torch.nn import LSTM``) do not change. Call ``torch.compile``'s result outside, since it refuses whatever
    ``torch.nn.LSTM`` is at that moment, and pickle outside, since torch's own modules cannot be found by name inside.
    """
    places = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
    replacements = {"LSTM": LSTM, "RNN": RNN, "LSTMCell": LSTMCell, "RNNCell": RNNCell}
    before = [(place, name, getattr(place, name)) for place in places for name in replacements]
    for place, name, _ in before:
        setattr(place, name, replacements[name])
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _require_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module must be a torch.nn.Module, got {type(module).__name__}")


# What a class body holds without changing what the module does after construction.
_INERT = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__"}
_INERT |= {"__annotations_cache__", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"}


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without parametrizations and without subclasses that only change the constructor."""
    cls = cast(type[nn.Module], parametrize.type_before_parametrizations(module))
    while cls not in _TO_PLAIN and cls not in _TO_TORCH:
        if len(cls.__bases__) != 1 or not vars(cls).keys() <= _INERT:
            break
        cls = cls.__bases__[0]
    return cls


def _swap(root: nn.Module, found: Mapping[nn.Module, type[nn.Module]]) -> nn.Module:
    """Puts a module of the class named in place of each module found, wherever it is registered below root."""
    if not found:
        return root
    new = {old: _with_class(old, cls) for old, cls in found.items()}
    # Both old and new parents: a recurrent module may itself have children, such as its parametrizations.
    for parent in (*root.modules(), *new.values()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(root, root)


def _with_class(old: nn.Module, cls: type[M]) -> M:
    """A module of class cls over the content of old."""
    new = cls.__new__(cls)
    content = dict(old.__dict__)
    for own in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        content[own] = content[own].copy()  # registering on one of the two later shall not show on the other
    # torch.nn's copies of what is in _parameters, and fastseq's packed ones
    for caches in ("_flat_weights", "_flat_weight_refs", "_packed"):
        content.pop(caches, None)
    if cls in _TO_TORCH.values():  # torch's own: the options are off, or to_torch would have refused
        for option in _OPTIONS:
            content.pop(option, None)
    new.__dict__.update(content)
    _rebind_hooks(new, old)
    if parametrize.is_parametrized(old):
        # The same steps by which torch makes a parametrized class of the module's own class.
        parametrize._inject_new_class(new)
        for name in cast(nn.ModuleDict, new.parametrizations):
            parametrize._inject_property(new, name)
    if isinstance(new, torch.nn.modules.rnn.RNNBase):
        new._init_flat_weights()
    return new


def _rebind_hooks(new: nn.Module, old: nn.Module) -> None:
    """Points the hooks that hold a weak reference to the old module, which is about to die, to the new one."""
    for registry in new.__dict__.values():
        if not isinstance(registry, dict):
            continue
        for key, hook in registry.items():
            if getattr(hook, "with_module", False) is True and hook.module() is old:
                registry[key] = type(hook)(cast(Callable[..., Any], hook.hook), new)
