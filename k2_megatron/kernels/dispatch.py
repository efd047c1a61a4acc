"""Which backend runs each operation, and why.

In:   an op, the backend asked for ("auto", or a name), the device type.   Out: a Choice, or a ValueError with the
remedy. "auto" takes our compiled kernels for that device where they are built, else the torch reference. Apex and
Transformer Engine run only when asked for by name: their kernels are peers to compare with, not the default.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # the kernels run where pydantic is not installed
    from k2_megatron.config.schema import Kernels

OPS = ("rms_norm", "rotary", "cross_entropy", "swiglu", "adamw")
BACKENDS = ("cuda", "cpu", "torch", "apex", "transformer_engine")
PEER_OPS = {"apex": ("rms_norm", "adamw"), "transformer_engine": ("rms_norm", "rotary", "cross_entropy")}
LEAST_CAPABILITY = (8, 0)  # bf16 arithmetic and asynchronous copies to shared memory
REBUILD = "build it with `pip install --no-build-isolation -e .`"


@dataclass(frozen=True)
class Choice:
    op: str
    backend: str
    reason: str


@cache
def extension(backend: str) -> tuple[ModuleType | None, str]:
    """The compiled module of "cpu" or "cuda" and "", or None and why there is none."""
    name = f"k2_megatron._{backend}"
    if importlib.util.find_spec(name) is None:
        needs = "nvcc and K2_BUILD_CUDA=1" if backend == "cuda" else "a C++17 compiler"
        return None, f"{name} is not built ({needs}; {REBUILD})"
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not load ({error}); {REBUILD}"


def obstacle(op: str, backend: str, device_type: str) -> str:
    """Why `backend` cannot run `op` on this device, "" if it can."""
    if backend == "torch":
        return ""
    if backend in PEER_OPS:
        if op not in PEER_OPS[backend]:
            return f"{backend} has no {op} (it offers {', '.join(PEER_OPS[backend])})"
        if device_type != "cuda":
            return f"{backend} runs on CUDA devices, not on {device_type!r}"
        if importlib.util.find_spec(backend) is None:
            return f"the package {backend} is not installed"
        return ""
    if backend != device_type:
        return f"backend {backend!r} runs on {backend} tensors, and this run's device is {device_type!r}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    module, reason = extension(backend)
    return reason or (_cannot_run(module) if backend == "cuda" else "")


def _cannot_run(module) -> str:
    """Why the CUDA module finds no device to run on: it has a CUDA runtime of its own, which may want a newer driver
    than torch's does."""
    if module.device_count() == 0:
        return (
            f"k2_megatron._cuda finds no device though torch (CUDA {torch.version.cuda}) does: the driver is too old "
            "for the CUDA it was built with; build it with an older nvcc, or update the driver"
        )
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "{} has compute capability {}.{}; the kernels need {}.{}".format(
            torch.cuda.get_device_name(), *capability, *LEAST_CAPABILITY
        )
    if not _is_built_for(capability, module.architectures):
        return (
            f"k2_megatron._cuda was built for {module.architectures}, and {torch.cuda.get_device_name()} has compute "
            "capability {}.{}; build it again, with K2_CUDA_ARCHITECTURES={}{} or without that variable".format(
                *capability, *capability
            )
        )
    return ""


def _is_built_for(capability: tuple[int, int], architectures: str) -> bool:
    """Machine code serves devices of its own major version from its minor one on; PTX (compute_) all later ones."""
    for architecture in architectures.replace(",", " ").split():
        kind, _, digits = architecture.partition("_")
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def choose_backend(op: str, requested: str, device_type: str) -> Choice:
    """Resolves "auto" or one backend's name for one op on device_type ("cpu" or "cuda").

    Raises ValueError where the op or the backend is unknown, or where an explicit request cannot be met.
    """
    if op not in OPS:
        raise ValueError(f"kernels: unknown op {op!r}; known: {', '.join(OPS)}")
    if requested == "auto":
        reason = (
            obstacle(op, device_type, device_type) if device_type in ("cpu", "cuda") else "no kernels for this device"
        )
        return Choice(op, "torch", reason) if reason else Choice(op, device_type, f"compiled kernels for {device_type}")
    if requested not in BACKENDS:
        raise ValueError(f"kernels: {op} asks for backend {requested!r}; known: auto, {', '.join(BACKENDS)}")
    reason = obstacle(op, requested, device_type)
    if reason:
        raise ValueError(f'kernels: {op} asks for backend {requested!r}: {reason}. Use "auto" or "torch" for this op')
    return Choice(op, requested, "asked for")


def choices(kernels: Kernels, device_type: str) -> list[Choice]:
    """What `choose_backend` makes of a configuration's model.kernels, op by op."""
    return [choose_backend(op, kernels.backend(op), device_type) for op in OPS]


def choose_backends(kernels: Kernels, device_type: str) -> dict[str, str]:
    """{op: backend}, as model and optimizer are built with."""
    return {choice.op: choice.backend for choice in choices(kernels, device_type)}
