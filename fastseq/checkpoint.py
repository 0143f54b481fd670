"""Checkpoints: the state of a training in one safetensors file, written so that no kill can leave half of one.

A state is any nesting of dicts, lists and tuples over tensors, NumPy arrays and plain values, such as ``state_dict()``
of a module or an optimizer gives. Its tensors become the tensors of the file, and its form becomes JSON in the file's
header: one file, so that nothing can get out of step, and nothing in it is ever executed, as a pickle would be. It is
written beside its place, flushed to the disk and renamed, so that a reader finds the old file or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastseq._extras import require

_KEY = "fastseq"  # of the header, whose values are strings
_PLAIN = (str, int, float, bool, type(None))


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes ``state`` to ``path`` in one step: a reader sees the old file or the whole new one, even after a kill.

    Args:
        path: conventionally ``….safetensors``; its folder must exist. One process at a time writes it.
        state: nested dicts, lists and tuples over tensors (any device), arrays, strings, numbers, booleans and None.
            Keys of dicts may be strings or integers. Floats keep their bits.

    Raises:
        TypeError: something in ``state`` has another type; the message says where.
        OSError: the file cannot be written.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", "train", "a checkpoint")
    tensors: dict[str, Tensor] = {}
    form = json.dumps(_encode(state, "state", tensors), separators=(",", ":"))
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    data = safetensors.save(tensors, metadata={_KEY: form})
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that :func:`save` wrote: the same nesting, tensors on the CPU, arrays as arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one of these checkpoints.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = require("safetensors", "train", "a checkpoint")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            form = (file.metadata() or {}).get(_KEY)
            # Cloned: what is returned should not hang on a file that will be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if form is None:
        raise ValueError(f"{path} is not a checkpoint of fastseq: its header has no entry {_KEY!r}")
    state: dict[str, Any] = _decode(json.loads(form), tensors)
    return state


def random_states() -> dict[str, Any]:
    """The states of torch's own generators, of the CPU and of each CUDA device, for :func:`save`."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Sets torch's own generators as :func:`random_states` found them."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of ``value``; its tensors go to ``tensors``. What JSON has no word for becomes ``{tag: …}``."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, numpy.generic):
        return _encode(value.item(), where, tensors)
    if isinstance(value, Tensor):
        # A clone, since the format wants each tensor to own its memory.
        tensors[where] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": where}
    if isinstance(value, numpy.ndarray):
        tensors[where] = torch.from_numpy(numpy.array(value, order="C"))
        return {"array": where}
    if isinstance(value, Mapping):
        items = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where}: expected keys that are str or int, got {key!r}")
            items.append([key, _encode(item, f"{where}.{key}", tensors)])
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{where}: expected tensors, arrays, plain values or nested dicts and lists, got {type(value)}")


def _decode(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, list):
        return [_decode(item, tensors) for item in form]
    if not isinstance(form, dict):
        return form
    ((tag, content),) = form.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].numpy()
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}
