"""Builds the compiled kernels. Everything else about the package is in pyproject.toml.

k2_megatron._cpu   always: csrc/bindings.cpp, and each csrc/cpu/*.cpp once for every instruction set of the processor
k2_megatron._cuda  where nvcc is found: csrc/bindings_cuda.cpp and csrc/*.cu, for sm_80, sm_90, and PTX for later ones;
                   the CUDA runtime is linked statically, so that the module imports on a machine without a GPU

K2_BUILD_CUDA=auto (default) builds _cuda where nvcc is on PATH or under CUDA_HOME; 1 insists on it; 0 leaves it out.
K2_CUDA_ARCHITECTURES=90 (or "80 90") builds it for these compute capabilities alone: half of the time or less.
Neither module includes a torch header: building needs a C++17 compiler and pybind11.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-maes"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
GCC_BUG_105593 = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # false alarms inside GCC's own AVX-512 header
X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def arm_flags() -> list[str]:
    """Arm's instructions for AES, where this machine has them: the hash of checkpoints is slow without."""
    arm, about = platform.machine().lower() in ("aarch64", "arm64"), Path("/proc/cpuinfo")
    return ["-march=armv8-a+crypto"] if arm and about.exists() and "aes" in about.read_text().split() else []


INSTRUCTION_SETS = (
    {"portable": ["-O2"], "avx2": AVX2, "avx512": AVX512 + GCC_BUG_105593} if X86_64 else {"portable": arm_flags()}
)

# No contraction: a product and a sum become one fma only where the source says so, alike in every instruction set.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]

LEAST_CAPABILITY = 80
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find_nvcc() -> str | None:
    """The nvcc to use: under CUDA_HOME if that is set, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def cuda_architectures() -> dict[str, list[str]]:
    """The codes to make from each virtual architecture, by K2_CUDA_ARCHITECTURES."""
    asked = os.environ.get("K2_CUDA_ARCHITECTURES", "").replace(",", " ").split()
    if not asked:
        return {"compute_80": ["sm_80"], "compute_90": ["sm_90", "compute_90"]}
    for capability in asked:
        if not capability.isdigit() or int(capability) < LEAST_CAPABILITY:
            raise SystemExit(
                f"K2_CUDA_ARCHITECTURES names {capability!r}; use compute capabilities of two digits or more without a "
                f"point, from {LEAST_CAPABILITY} on, such as 80 or 90"
            )
    return {f"compute_{capability}": [f"sm_{capability}"] for capability in asked}


def wanted_extensions() -> list[Extension]:
    """_cpu, and _cuda by K2_BUILD_CUDA; SystemExit where CUDA is insisted on and cannot be had."""
    choice = os.environ.get("K2_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(
            f"K2_BUILD_CUDA is {choice!r}; use 0 (C++ only), 1 (insist on CUDA) or auto (CUDA where nvcc is)"
        )
    headers = relative("csrc/**/*.h") + relative("csrc/**/*.cuh")
    cpu = Extension("k2_megatron._cpu", ["csrc/bindings.cpp", *relative("csrc/cpu/*.cpp")], depends=headers)
    cuda = Extension("k2_megatron._cuda", ["csrc/bindings_cuda.cpp", *relative("csrc/*.cu")], depends=headers)
    if choice == "0":
        print("k2_megatron: building _cpu only (K2_BUILD_CUDA=0)")
        return [cpu]
    nvcc = find_nvcc()
    if nvcc is None:
        place = f"under CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on PATH"
        if choice == "1":
            raise SystemExit(
                f"K2_BUILD_CUDA=1, but there is no nvcc {place}; install the CUDA toolkit or set CUDA_HOME"
            )
        print(f"k2_megatron: building _cpu only (no nvcc {place}; set CUDA_HOME to build _cuda)")
        return [cpu]
    print(f"k2_megatron: building _cpu and _cuda (nvcc: {nvcc})")
    return [cpu, cuda]


class BuildKernels(build_ext):
    """Compiles one source for several instruction sets, and CUDA sources with nvcc; both in parallel."""

    def run(self) -> None:
        super().run()
        built = ", ".join(extension.name for extension in self.extensions)
        print(f"k2_megatron: built {built}; `python -m k2_megatron.kernels` shows what runs on this machine")

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        objects = Path(self.build_temp).resolve() / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if extension.name.endswith("_cuda"):
            commands, link = self.cuda_commands(extension, objects)
        else:
            commands, link = self.cpu_commands(extension, objects)
        stale = [command for command in commands if self.is_stale(command, extension)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.call, stale))
        self.call([*link, *[command[-1] for command in commands], "-o", str(target)])

    def is_stale(self, command: list[str], extension: Extension) -> bool:
        """Whether the object of `[..., "-c", source, "-o", object]` is older than what it is made from."""
        source, target = command[-3], Path(command[-1])
        made_from = [source, *extension.depends, "setup.py"]
        return (
            self.force
            or not target.exists()
            or any((ROOT / path).stat().st_mtime > target.stat().st_mtime for path in made_from)
        )

    def call(self, command: list[str]) -> None:
        """Runs a compiler; its messages go to the screen."""
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except FileNotFoundError:
            raise SystemExit(f"k2_megatron: no compiler {command[0]!r}; install g++ or set CXX") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"k2_megatron: {command[0]} failed with exit code {error.returncode}") from None

    def includes(self) -> list[str]:
        return [f"-I{folder}" for folder in [pybind11.get_include(), *self.include_dirs]]

    def cpu_commands(self, extension: Extension, objects: Path) -> tuple[list[list[str]], list[str]]:
        cxx = [*os.environ.get("CXX", "g++").split(), *CXX_FLAGS]
        commands = []
        for source in extension.sources:
            kernel = Path(source).parent.name == "cpu"
            for name, flags in (INSTRUCTION_SETS if kernel else {"module": self.includes()}).items():
                target = objects / f"{Path(source).stem}_{name}.o"
                isa = [*flags, f"-DK2_ISA={name}"] if kernel else flags
                commands.append([*cxx, *isa, "-c", source, "-o", str(target)])
        return commands, [*cxx, "-shared"]

    def cuda_commands(self, extension: Extension, objects: Path) -> tuple[list[list[str]], list[str]]:
        nvcc = find_nvcc()
        assert nvcc is not None, "nvcc was there when the extensions were listed"
        architectures = cuda_architectures()
        codes = [f"arch={virtual},code=[{','.join(real)}]" for virtual, real in architectures.items()]
        targets = [flag for code in codes for flag in ("-gencode", code)]
        names = ",".join(code for codes in architectures.values() for code in codes)
        host = [*self.includes(), f'-DK2_CUDA_ARCHITECTURES="{names}"']
        commands = []
        for source in extension.sources:
            target = objects / f"{Path(source).stem}_{names.replace(',', '_')}.o"
            flags = targets if source.endswith(".cu") else host
            commands.append([nvcc, *CUDA_FLAGS, *flags, "-c", source, "-o", str(target)])
        return commands, [nvcc, "-shared", "-cudart", "static", *targets]


setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": BuildKernels})
