"""The bridge between torch.library ops and the compiled modules: registration, and one call with pointers.

In:   schemas, Python implementations, fake implementations; tensors.   Out: ops under torch.ops.k2_megatron, kernels
run. One Python implementation serves the CPU and the CUDA key: the tensors' device picks the module, k2_megatron._cpu
or _cuda, whose functions have the same names and arguments (csrc/ops.h) and end in a thread count or a raw stream.
Library.define/impl cost 2.5 microseconds a call where torch.library.custom_op costs about 20.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch

from k2_megatron.kernels.dispatch import extension

NAMESPACE = "k2_megatron"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def register(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines torch.ops.k2_megatron.<name> for CPU and CUDA tensors and returns its overload."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def module_for(op: str, device: torch.device):
    module, reason = extension(device.type) if device.type in ("cpu", "cuda") else (None, f"no kernels for {device}")
    if module is None:
        raise RuntimeError(f"{op}: {reason}, or use backend 'torch'")
    return module


def run(op: str, function: str, device: torch.device, *arguments: int | float | bool) -> None:
    """Calls csrc's `function` on the tensors' device: OpenMP threads on a CPU, the current stream on a GPU."""
    entry = getattr(module_for(op, device), function)
    if device.type == "cpu":
        entry(*arguments, torch.get_num_threads())
        return
    try:
        with torch.cuda.device(device):
            entry(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    except RuntimeError as error:
        raise RuntimeError(f"{op}: {function} on {device}: {error}") from error


def call_in_function(op: torch._ops.OpOverload, *arguments):
    """An op from inside an autograd.Function, past the op's own autograd key: 6 microseconds less."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def refuse_second_derivative(op: str, remedy: str = "use backend 'torch'") -> None:
    """For the head of a backward: with create_graph=True it runs in grad mode, and would count as constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: this backward cannot be differentiated again (create_graph=True); {remedy}")


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[torch.Tensor | None]) -> array:
    """The host array of int64 addresses that the multi-tensor functions take; keep it alive over the call."""
    return array("q", [pointer(tensor) for tensor in tensors])


def address_of(values: array) -> int:
    return values.buffer_info()[0]
