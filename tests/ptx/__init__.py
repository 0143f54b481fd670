"""A GPU in numpy: runs compiled kernels, in the PTX that Triton and nvcc make of them, where there is no GPU.

Triton's interpreter and the emulator of ``csrc/cuda`` run what the kernels' sources say. This runs what the compilers
have made of it, instruction by instruction: every layout, conversion, tensor core fragment, copy and fence. Besides the
numbers it checks what a GPU would not tell:

- every access lies within a tensor of the launch or the block's shared memory, and is aligned;
- two accesses of one place, of which one writes, are ordered by barriers or by releases and acquires (``clocks.py``);
- lanes of a warp come together where an instruction needs all of them; no barrier waits for ever;
- blocks that are not launched together do not wait for each other.

Asynchronous copies come as late as they may. It counts bank conflicts (``traffic.py``). It takes the instructions that
the kernels use and refuses others. It says nothing about speed, and what ptxas makes of the PTX it does not see.

Source: NVIDIA, Parallel Thread Execution ISA, version 9.0.
"""

from ptx.machine import Fault, Grid, run
from ptx.program import Program, parse
from ptx.traffic import Traffic

__all__ = ["Fault", "Grid", "Program", "Traffic", "parse", "run"]
