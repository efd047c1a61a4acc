"""Compiles csrc/*.cu with g++ against csrc/emulation into the Python module `_cuda`, with the real bindings.

In: the repository's csrc folder. Out: a shared object in a folder of the caller's, one object file a source, named by
the hash of everything that goes into it, so that a second build of the same sources takes no time.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
PACKAGED = ("cuda_bf16.h", "crt/host_config.h", "nv/target")  # of nvidia-cuda-runtime, -crt and -cccl
FLAGS = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DK2_EMULATION",
         '-DK2_CUDA_ARCHITECTURES="emulation"')  # fmt: skip


def cuda_headers() -> tuple[Path | None, str]:
    """The folder that holds cuda_runtime.h and cuda_bf16.h, or None and the reason."""
    nvcc = shutil.which("nvcc")
    if nvcc:
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True
        )
        for line in dryrun.stderr.splitlines():
            if "INCLUDES=" in line and "SYSTEM_" not in line:
                for flag in shlex.split(line.split("INCLUDES=", 1)[1].strip().strip('"')):
                    folder = Path(flag.strip('"').removeprefix("-I"))
                    if (folder / "cuda_bf16.h").exists():
                        return folder.resolve(), "from nvcc"
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia"
    for folder in sorted(nvidia.glob("*/include")):
        if all((folder / part).exists() for part in PACKAGED):
            return folder, "from NVIDIA's packages"
    return None, "no CUDA headers: neither nvcc nor nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl are there"


def reason_not_to_build() -> str | None:
    """Why the emulation cannot be compiled here; None if it can."""
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    folder, reason = cuda_headers()
    return None if folder else reason


def compile_objects(sources: list[Path], folder: Path, flags: tuple[str, ...]) -> list[Path]:
    """Objects of the sources, two compilers at a time; those whose inputs have not changed are kept."""
    headers, _ = cuda_headers()
    assert headers is not None, "reason_not_to_build was not asked"
    import pybind11

    includes = [
        f"-I{CSRC}",
        "-isystem",
        str(headers),
        "-isystem",
        pybind11.get_include(),
        "-isystem",
        sysconfig.get_path("include"),
    ]
    shared = hashlib.sha256(" ".join(flags).encode())
    for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *CSRC.glob("emulation/*.h")]):
        shared.update(path.read_bytes())

    def compile_one(source: Path) -> Path:
        digest = hashlib.sha256(shared.digest() + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{digest}.o"
        if not target.exists():
            command = ["g++", *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"g++ failed on {source.name}:\n{done.stderr[-4000:]}"
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def build_module(folder: Path, *, sanitize: bool = False) -> Path:
    """The path of the emulated `_cuda`; with AddressSanitizer and UndefinedBehaviorSanitizer if asked."""
    flags = (*FLAGS, *(("-O1", *SANITIZERS) if sanitize else ("-O2",)))
    sources = [*sorted(CSRC.glob("*.cu")), CSRC / "bindings_cuda.cpp", CSRC / "emulation" / "runtime.cpp"]
    objects = compile_objects(sources, folder, flags)
    names = hashlib.sha256("".join(str(path) for path in objects).encode()).hexdigest()[:16]
    target = folder / names / "_cuda.so"
    if not target.exists():
        target.parent.mkdir()
        # A torch for CUDA has the real runtime loaded for all: without -Bsymbolic its cudaGetDevice comes before ours.
        link = ["g++", "-shared", "-Wl,-Bsymbolic", *(SANITIZERS if sanitize else ())]
        link += [*map(str, objects), "-o", str(target)]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, f"linking failed:\n{done.stderr[-4000:]}"
    return target


def sanitizer_runtime() -> str | None:
    """AddressSanitizer's library, which must be loaded before Python itself; None where g++ has none."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


def sanitizer_environment(runtime: str) -> dict[str, str]:
    """The environment of a Python process that loads sanitised modules. Python itself leaks at its end, by design."""
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "PYTHONMALLOC": "malloc"}


def load_module(path: Path) -> ModuleType:
    """The extension module at `path`, under the name `_cuda` that its initialiser has."""
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None, f"{path} is not a module"
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
