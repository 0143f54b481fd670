"""Builds fastseq._cpu: one object per instruction set from the same sources, linked into one extension; and, where it
is wanted, fastseq._cuda by nvcc.

The metadata is in pyproject.toml. Environment: ``CXX`` names the compiler, ``FASTSEQ_WERROR=1`` makes warnings errors.
``FASTSEQ_CUDA=1`` builds fastseq._cuda or fails, ``0`` does not; without it, or with ``auto``, it is built where there
are nvcc and a GPU.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_build  # noqa: E402

COMMON = [
    "csrc/bindings_cpu.cpp",
    "csrc/cpu/length_order.cpp",
    "csrc/cpu/packed_step.cpp",
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/select.cpp",
    "csrc/cpu/workspace.cpp",
]
# -ffp-contract=off: a fused multiply-add stands only where the source says so, so that every tile shape rounds alike.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]
# Some Pythons hand on their own -g, with which compiling takes half as long again; who asks for it himself has it.
if "-g" not in os.environ.get("CFLAGS", "").split():
    FLAGS.append("-g0")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
# The one that takes longest first, so that no core waits for it at the end.
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
        "avx512_bf16": AVX512_BF16,
        "avx512": AVX512,
        "avx2": AVX2,
        "baseline": [],
    },
    "aarch64": {"neon": []},
}
# Sets left out where the compiler or its assembler does not know them, with a line that only they can compile.
OPTIONAL = {
    "avx512_bf16": 'void probe() { __asm__ volatile("vdpbf16ps %zmm0, %zmm0, %zmm0"); }',
    "amx": 'void probe() { __asm__ volatile("tdpbf16ps %tmm0, %tmm1, %tmm2"); }',
}


class BuildExtension(build_ext):
    """Compiles csrc/cpu/isa/*.cpp, each with its own flags, and links the objects with the rest; csrc/cuda by nvcc."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension."""
        if ext.name == "fastseq._cuda":
            folder, module = Path(self.build_temp) / "cuda", Path(self.get_ext_fullpath(ext.name))
            cuda_build.build_extension(nvcc, folder, module, werror=bool(werror))
            return
        machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
        if machine not in INSTRUCTION_SETS:
            raise SystemExit(f"fastseq has CPU kernels for {', '.join(INSTRUCTION_SETS)}, not for {machine}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        includes = [str(path) for path in ext.include_dirs]

        sets = {n: f for n, f in INSTRUCTION_SETS[machine].items() if n not in OPTIONAL or self.knows(n, f)}
        macros = [*ext.define_macros, *((f"FASTSEQ_HAS_{name.upper()}", "1") for name in OPTIONAL if name in sets)]

        def compile_source(item: tuple[str, list[str]]) -> list[str]:
            source, flags = item
            objects: list[str] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=includes,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
            return objects

        # A set takes most of a minute, the other sources less; each is compiled in a process of its own.
        work = [(f"csrc/cpu/isa/{name}.cpp", flags) for name, flags in sets.items()]
        work += [(source, []) for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for objects in pool.map(compile_source, work):
                ext.extra_objects += objects
        # What is left to do is to link.
        ext.depends, ext.sources = [*ext.depends, *ext.sources], []
        super().build_extension(ext)

    def knows(self, name: str, flags: list[str]) -> bool:
        """Whether the compiler can make this optional set."""
        command = [self.compiler.compiler_cxx[0], *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
        return subprocess.run(command, input=OPTIONAL[name].encode(), capture_output=True).returncode == 0


headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
werror = ["-Werror"] if os.environ.get("FASTSEQ_WERROR") == "1" else []
nvcc = cuda_build.wanted_nvcc(os.environ.get("FASTSEQ_CUDA", "auto"))
cuda_sources = [str(path.relative_to(ROOT)) for path in cuda_build.HOST_SOURCES]
setup(
    ext_modules=[
        Pybind11Extension(
            "fastseq._cpu",
            COMMON,
            depends=headers,
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[*FLAGS, *werror],
            extra_link_args=["-fopenmp", "-Wl,-Bsymbolic"],
        ),
        *([] if nvcc is None else [Pybind11Extension("fastseq._cuda", cuda_sources)]),
    ],
    cmdclass={"build_ext": BuildExtension},
)
