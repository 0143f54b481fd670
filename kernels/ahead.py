"""Compiling a launch ahead of time, for a GPU that is not there, and reading what the kernel will take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseq.kernels.launch import Launch, compile_options

#: What is compiled for, with the shared memory that one program may have there, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes: ``registers`` of a thread, ``spilled`` bytes of a thread in local
    memory, ``shared`` bytes; ``tensor_cores`` counts the matrix instructions in the assembly."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: int


def compile_ahead(launch: Launch, target: str) -> Resources:
    """What the kernel of a launch takes of one of :data:`TARGETS`. The tensors may be on any device, meta too."""
    compiled = compiled_ahead(launch, target)
    return _of_cubin(compiled) if TARGETS[target][0].backend == "cuda" else _of_amd(compiled)


def compiled_ahead(launch: Launch, target: str) -> Any:
    """The kernel of a launch as Triton compiles it for the target."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]  # torch aligns what it allocates
        elif isinstance(value, int) and name not in constants:
            signature[name] = "i32"
            if value % 16 == 0 and not launch.kernel.params[index].do_not_specialize:
                aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    chip, _ = TARGETS[target]
    options = compile_options(launch, hip=chip.backend == "hip")
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=chip, options=options)


def _of_cubin(compiled: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()  # type: ignore[union-attr]
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
    return Resources(int(registers), int(stack), compiled.metadata.shared, matrix)


def _of_amd(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]

    spilled = 4 * number("vgpr_spill_count")
    return Resources(number("vgpr_count"), spilled, compiled.metadata.shared, assembly.count("v_mfma"))
