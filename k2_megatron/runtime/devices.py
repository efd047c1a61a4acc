"""Which device this process computes on, and what that implies: communication backend, peak FLOP/s."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from k2_megatron.runtime.mistakes import RankMistake


@dataclass(frozen=True)
class Device:
    """`type` is "cuda" or "cpu"; `backend` is torch.distributed's name; `name` is the hardware's, for the journal."""

    type: str
    index: int
    backend: str
    name: str

    @property
    def torch(self) -> torch.device:
        return torch.device("cuda", self.index) if self.type == "cuda" else torch.device("cpu")


# Dense (not sparse) bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets for A100 (2020) and H100/H200 (2023).
_BF16_PEAK_FLOPS = (("A100", 312e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H200", 989e12))


def find_device(local_rank: int) -> Device:
    """The device of this local rank. ValueError when there are fewer GPUs than local ranks."""
    # Kernels of tensor-parallel layers must start in the order they were issued for communication to overlap with them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        return Device("cpu", 0, "gloo", _cpu_name())
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RankMistake(
            f"local rank {local_rank} asks for a GPU of its own, and this machine shows {count}; "
            "lower parallel.tensor x pipeline x data, or start at most one rank a GPU"
        )
    torch.cuda.set_device(local_rank)
    return Device("cuda", local_rank, "nccl", torch.cuda.get_device_name(local_rank))


def device_for_threads() -> Callable[[], None]:
    """What a thread to be started calls first, to compute on the device of this one: CUDA gives each thread device 0,
    where its first call would open a context beside that of the rank which has it."""
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def peak_bf16_flops(device: Device) -> float | None:
    """Peak dense bf16 FLOP/s of the device, None where it is not known (every CPU)."""
    for name, flops in _BF16_PEAK_FLOPS:
        if name in device.name:
            return flops
    return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"
