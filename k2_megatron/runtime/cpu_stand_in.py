"""The CPU in the place of the CUDA device, under an unmodified megatron-core.

megatron-core 0.16 names the device: it allocates on "cuda", asks `torch.cuda` for the current device, streams and
generators, and compares `Tensor.type()` with "torch.cuda.FloatTensor". On a machine without CUDA this file answers
those calls with the CPU: a `TorchFunctionMode` redirects devices and type names, and the dozen `torch.cuda` functions
that megatron-core calls directly are replaced. With a CUDA device present nothing here is installed.

It is written for megatron-core 0.16.x. Names of others are replaced in two more places: collectives while a measured
step runs (train/phases.py), and the slot of megatron-core's Adam (train/optimizer.py).
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class CpuStandsInForCuda(TorchFunctionMode):
    """Redirect device arguments from "cuda" to the CPU; report CPU tensors under the type names of CUDA tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
        else:
            kwargs = {}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # "torch.FloatTensor" -> "torch.cuda.FloatTensor": the optimizers sort parameters by this text
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _cpu_rng_state(*_args, **_kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_args, **_kwargs) -> None:
    torch.set_rng_state(state)


def _replace_cuda_functions() -> None:
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    replacements = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_a, **_k: None,
        "empty_cache": lambda: None,
        "get_rng_state": _cpu_rng_state,
        "set_rng_state": _set_cpu_rng_state,
        "manual_seed": torch.manual_seed,
        "default_stream": lambda *_a: None,
        "current_stream": lambda *_a: None,
        "stream": lambda _stream: contextlib.nullcontext(),
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    tensor_parallel_random._get_cuda_rng_state = _cpu_rng_state
    tensor_parallel_random._set_cuda_rng_state = _set_cpu_rng_state


@contextlib.contextmanager
def cpu_stands_in_for_cuda(device_type: str):
    """Run the body with the CPU as megatron-core's device when `device_type` is "cpu"; otherwise change nothing."""
    if device_type != "cpu":
        yield
        return
    _replace_cuda_functions()
    with CpuStandsInForCuda():
        yield
