"""Builds fastseq._cpu: one object per instruction set from the same sources, linked into one extension.

The metadata is in pyproject.toml. Environment: ``CXX`` names the compiler, ``FASTSEQ_WERROR=1`` makes warnings errors.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

COMMON = [
    "csrc/bindings_cpu.cpp",
    "csrc/cpu/packed_step.cpp",
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/select.cpp",
    "csrc/cpu/workspace.cpp",
]
# -ffp-contract=off: a fused multiply-add stands only where the source says so, so that every tile shape rounds alike.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avx512": [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
    },
    "aarch64": {"neon": []},
}


class BuildExtension(build_ext):
    """Compiles csrc/cpu/isa/*.cpp, each with its own flags, and links the objects with the rest."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension."""
        machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
        if machine not in INSTRUCTION_SETS:
            raise SystemExit(f"fastseq has CPU kernels for {', '.join(INSTRUCTION_SETS)}, not for {machine}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        includes = [str(path) for path in ext.include_dirs]

        def compile_set(item: tuple[str, list[str]]) -> list[str]:
            name, flags = item
            objects: list[str] = self.compiler.compile(
                [f"csrc/cpu/isa/{name}.cpp"],
                output_dir=self.build_temp,
                include_dirs=includes,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
            return objects

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each takes most of a minute, in a process of its own
            for objects in pool.map(compile_set, INSTRUCTION_SETS[machine].items()):
                ext.extra_objects += objects
        super().build_extension(ext)


headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
werror = ["-Werror"] if os.environ.get("FASTSEQ_WERROR") == "1" else []
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
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
