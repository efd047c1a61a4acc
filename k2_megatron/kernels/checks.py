"""Argument checks of every operation: each names the op, the tensor, what was found and what is allowed.

In:   an op's name and its tensors by name.      Out: nothing, or a ValueError. No check reads a tensor's elements.
They run on real and on fake tensors alike, before a pointer reaches C++, which checks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_FLOATS = (*FLOATS, torch.float64)  # the torch references compute in fp64 too, for gradcheck
MAXIMUM_HIDDEN_SIZE = 65_536
MAXIMUM_COLUMNS = 2**30  # of a row: the kernels count columns in 32 bits


def require(condition: bool, op: str, message: str, *values: object) -> None:
    """`message` is formatted with `values` only where the condition fails: under torch.compile with dynamic shapes the
    text of a size would be a constant of the graph, one graph for each size."""
    if not condition:
        raise ValueError(f"{op}: {message.format(*values)}")


def require_tensors(op: str, **arguments: object) -> None:
    """Before anything is asked of them: a dense torch.Tensor each, not None, an array or a list."""
    for name, argument in arguments.items():
        if not isinstance(argument, torch.Tensor):
            raise ValueError(f"{op}: {name} is a {type(argument).__name__}; it must be a torch.Tensor")
        if argument.layout != torch.strided:
            raise ValueError(f"{op}: {name} has layout {argument.layout}; it must be dense (torch.strided)")


def require_integer(op: str, name: str, value: object) -> None:
    """A float that happens to be whole is refused too: C++ takes none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{op}: {name} is {value!r}, a {type(value).__name__}; it must be an integer")


def require_number(op: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{op}: {name} is {value!r}, a {type(value).__name__}; it must be a number")


def require_columns(op: str, name: str, columns: int) -> None:
    require(columns <= MAXIMUM_COLUMNS, op, "{} has rows of {} elements; at most {} are offered", name, columns,
            MAXIMUM_COLUMNS)  # fmt: skip


def require_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{op}: {name} is {tensor.dtype}; allowed: {names}")


def require_shape(op: str, name: str, tensor: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; needed: {tuple(shape)} = {meaning}")


def require_contiguous(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tuple(tensor.stride())}; it must be contiguous "
            f"(call {name}.contiguous() where it is made: no copy is made here)"
        )


def require_one_device(op: str, **tensors: torch.Tensor) -> None:
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {first_name} on {first.device}; they must be together"
            )


def require_backend(op: str, backend: str, *peers: str) -> None:
    known = ("cuda", "cpu", "torch", *peers)
    require(backend in known, op, "no backend {!r}; known: {}", backend, ", ".join(known))


def require_backend_device(op: str, backend: str, tensor: torch.Tensor) -> None:
    """The compiled backends are named after the device they run on."""
    if backend in ("cpu", "cuda") and tensor.device.type != backend:
        raise ValueError(
            f"{op}: backend {backend!r} was asked for tensors on {tensor.device}; they must be on {backend}"
        )


Lists = dict[str, Sequence[torch.Tensor]]


def require_no_overlap(op: str, written: Lists, read: Lists) -> None:
    """Refuses a contiguous tensor, to be written in place, whose bytes are another one's too."""
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name, index, name in written)
        for name, tensors in (written | read).items()
        for index, tensor in enumerate(tensors)
        if tensor.nbytes and tensor.is_contiguous()
    ]
    spans.sort()
    reach, owner, owner_written = 0, "", False
    for start, end, name, index, is_written in spans:
        if start < reach and (is_written or owner_written):
            raise ValueError(
                f"{op}: {owner} and {name}[{index}] share memory, and the op writes in place; they must not overlap"
            )
        if end > reach:
            reach, owner, owner_written = end, f"{name}[{index}]", is_written


def is_leafs_memory(tensor: torch.Tensor) -> bool:
    """Whether writing into the tensor writes into a leaf that requires a gradient: it is one, or a view of one. For
    eager mode: a compiled graph cannot ask for a view's base, and so the ops write nothing in place there."""
    if tensor.is_leaf:
        return tensor.requires_grad
    base = tensor._base
    return base is not None and base.is_leaf and base.requires_grad


def require_plain_memory(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor written in place whose memory holds the negated values (a view of a conjugated complex one)."""
    if tensor.is_neg():
        raise ValueError(
            f"{op}: {name} has torch's negative bit set, and is written in place; pass {name}.resolve_neg()"
        )


# Private, since torch 2.8. The public way (below) takes 7 microseconds, as much as some kernels.
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def may_overwrite() -> bool:
    """Whether autograd would tell of another reader of a tensor that is written in place here and now. It would not in
    compiled graphs; nor where saved-tensor hooks are on, as by torch.utils.checkpoint(use_reentrant=False) and by
    offloading: what they hand back has no version to check, and a reader would get the new values without a word."""
    if torch.compiler.is_compiling():
        return False
    if _TOP_HOOKS is not None:
        return _TOP_HOOKS(True) is None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("never shown"):  # raises where there are any
            return True
    except RuntimeError:
        return False


@lru_cache(maxsize=256)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * (size - 1) + reach)
    return False


def require_own_elements(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor written in place that holds one memory cell under two indices (an expanded tensor)."""
    if _overlaps_itself(tuple(tensor.shape), tensor.stride()):
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tuple(tensor.stride())}: elements overlap, "
            "and it is written in place; pass a tensor with its own memory"
        )
