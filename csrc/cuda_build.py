"""How the files of ``csrc/cuda`` are compiled: by nvcc into ``fastseq._cuda`` (setup.py) and for the table of what the
kernels take of a GPU (``benchmarks/cuda_resources.py``), and by a C++ compiler into the emulator (tests).

Standard library and pybind11 only, since setup.py imports it under build isolation.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

CSRC = Path(__file__).resolve().parent
CUDA = CSRC / "cuda"
# A target with an "a" has the instructions of its generation that later ones need not have.
TARGETS = ("sm_80", "sm_90a", "sm_100a")
CLUSTER_TARGETS = TARGETS[1:]
#: What nvcc compiles, and the targets of each file: clusters came with sm_90.
CUDA_SOURCES = {
    path: CLUSTER_TARGETS if path.name.startswith("lstm_cluster") else TARGETS for path in sorted(CUDA.glob("*.cu"))
}
#: What a C++ compiler compiles beside it.
HOST_SOURCES = (CSRC / "bindings_cuda.cpp", CUDA / "launch.cpp")
EMULATOR_SOURCES = tuple(sorted((CUDA / "emulated").glob("*.cpp")))
DEVICE_FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}")
HOST_FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}")
EMULATOR = "_cuda_emulated"
EMULATOR_FLAGS = ("-O1", "-DFASTSEQ_CUDA_EMULATED")


def nvcc() -> str | None:
    """Where nvcc is: the environment variable NVCC, on the path, or at its usual place; None where it is not."""
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU with its driver."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def wanted_nvcc(choice: str) -> str | None:
    """The nvcc that builds ``fastseq._cuda`` for a value of FASTSEQ_CUDA, or None where it is not to be built: ``auto``
    builds where there are nvcc and a GPU, since it takes minutes and serves only when forced.

    Raises:
        SystemExit: the value is not known, or asks for a build without nvcc.
    """
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FASTSEQ_CUDA: expected 0, 1 or auto, got {choice!r}")
    found = nvcc()
    if choice == "1" and found is None:
        raise SystemExit("FASTSEQ_CUDA=1 needs nvcc, and there is none (the variable NVCC can name it)")
    return found if choice == "1" or (choice == "auto" and gpu_present()) else None


def nvcc_command(compiler: str, source: Path, output: Path, targets: Sequence[str], *, werror: bool) -> list[str]:
    """The command that compiles one file for some targets."""
    codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Werror"] if werror else []
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return [compiler, *DEVICE_FLAGS, *codes, *host, *strict, "-c", str(source), "-o", str(output)]


def ptx_command(compiler: str, source: Path, output: Path, target: str) -> list[str]:
    """The command that compiles one file for one target as far as its PTX."""
    return [compiler, *DEVICE_FLAGS, f"-arch={target}", "-ptx", str(source), "-o", str(output)]


def host_command(source: Path, output: Path, module: str, flags: Sequence[str]) -> list[str]:
    """The command that compiles one file by the C++ compiler, of the module of that name."""
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    compiler = os.environ.get("CXX", "g++")
    named = f"-DFASTSEQ_CUDA_MODULE={module}"
    return [compiler, *HOST_FLAGS, *includes, named, *flags, "-x", "c++", "-c", str(source), "-o", str(output)]


def run_all(commands: Sequence[Sequence[str]], processes: int) -> None:
    """Runs commands, several at a time.

    Raises:
        RuntimeError: one failed; the message has what it printed.
    """

    def run(command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, commands))


def build_extension(compiler: str, folder: Path, module: Path, *, werror: bool) -> None:
    """``fastseq._cuda`` for all targets, objects in ``folder``, linked with the static CUDA runtime."""
    folder.mkdir(parents=True, exist_ok=True)
    module.parent.mkdir(parents=True, exist_ok=True)
    commands, objects = [], []
    for source, targets in CUDA_SOURCES.items():
        objects.append(folder / f"{source.name}.o")
        commands.append(nvcc_command(compiler, source, objects[-1], targets, werror=werror))
    for source in HOST_SOURCES:
        objects.append(folder / f"{source.name}.o")
        flags = ["-O2", *(["-Werror"] if werror else [])]
        commands.append(host_command(source, objects[-1], "_cuda", flags))
    run_all(commands, os.cpu_count() or 1)
    run_all([[compiler, "-shared", "-cudart", "static", "-o", str(module), *map(str, objects)]], 1)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the ``with`` block no other process is in one for that folder: of several tests one builds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest_of(sources: Iterable[Path], also: str) -> str:
    """Names what is built of these sources and all headers, by the commands in this file, and what else it hangs on."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + also.encode())
    for path in sorted((*CUDA.rglob("*.h"), *sources)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_emulator(folder: Path) -> Path:
    """The extension as an emulator of the GPU, in a folder named after its sources, built where it is not there yet."""
    sources = (*HOST_SOURCES, *EMULATOR_SOURCES, *(path for path in CUDA_SOURCES if path.name != "facts.cu"))
    folder = folder / digest_of(sources, pybind11.__version__)
    module = folder / f"{EMULATOR}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with alone(folder):
        if not module.exists():
            objects = [folder / emulator_object(source) for source in sources]
            flags = [*EMULATOR_FLAGS, "-Werror"]
            run_all([host_command(s, o, EMULATOR, flags) for s, o in zip(sources, objects, strict=True)], 2)
            link_emulator(objects, module)
    return module


def emulator_object(source: Path) -> str:
    """The name of the object of one of the emulator's sources."""
    return f"{source.parent.name}_{source.name}.o"


def link_emulator(objects: Sequence[Path], module: Path) -> None:
    """The emulator of its objects."""
    unfinished = module.with_name("unfinished")
    run_all([[os.environ.get("CXX", "g++"), "-shared", "-o", str(unfinished), *map(str, objects)]], 1)
    unfinished.rename(module)  # one that is there is whole, even where a build was cut off
