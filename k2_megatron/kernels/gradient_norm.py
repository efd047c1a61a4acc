"""Global gradient norm and clipping over many tensors (Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1).

    norm = sqrt(sum over tensors of g^2),   g = g * min(1, maximum_norm / (norm + 1e-6))

In:   gradients, a sequence of dense fp32, bf16 or fp16 tensors on one device.
Out:  the sum of squares in fp64 (so that shards add up in any grouping to the same rounding), and gradients scaled in
place. The order of summation is fixed: the result does not depend on threads or grid. No device synchronization.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_dtype,
    require_no_overlap,
    require_number,
    require_one_device,
    require_tensors,
)
from k2_megatron.kernels.library import DTYPE_CODES, address_of, addresses, module_for, pointer, register, run


def gradient_norm_squared(gradients: Sequence[torch.Tensor], *, backend: str) -> torch.Tensor:
    """Sum of squares [] fp64 on the gradients' device. inf and NaN flow into it. Raises ValueError for an empty
    list."""
    return gradient_statistics(gradients, backend=backend)[0]


def gradient_statistics(gradients: Sequence[torch.Tensor], *, backend: str) -> torch.Tensor:
    """[2] fp64: the sum of squares, and how many elements are not finite."""
    require_backend("gradient_norm", backend)
    _check_all("gradient_norm", gradients)
    floats = REFERENCE_FLOATS if backend == "torch" else FLOATS
    parts = []
    for tensors in _by_dtype(gradients).values():
        require_dtype("gradient_norm", "gradients", tensors[0], floats)
        if backend == "torch":
            parts.append(squared_norm_reference(tensors))
            continue
        require_backend_device("gradient_norm", backend, tensors[0])
        parts.append(SQUARED_NORM(tensors))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def clip_factor(norm: torch.Tensor, maximum_norm: float) -> torch.Tensor:
    """min(1, maximum_norm / (norm + 1e-6)) [] fp32 of a norm [], on its device."""
    return torch.clamp(maximum_norm / (norm.double() + 1e-6), max=1.0).float()


def clip_gradients_(
    gradients: Sequence[torch.Tensor], norm: torch.Tensor, maximum_norm: float, *, backend: str
) -> torch.Tensor:
    """Scales the gradients in place by min(1, maximum_norm / (norm + 1e-6)); returns that factor [] fp32.

    Training does not call it: AdamW scales by `clip_factor` in the pass that updates (train/optimizer.py).

    norm [] is the global norm, a tensor on the gradients' device (so that nothing waits for it). As in
    torch.nn.utils.clip_grad_norm_ a norm of NaN gives the factor NaN, and an infinite one 0, which makes NaN of the
    elements that are not finite and 0 of all others: look at the norm before.
    """
    require_backend("clip_gradients", backend)
    _check_all("clip_gradients", gradients)
    require_number("clip_gradients", "maximum_norm", maximum_norm)
    require(maximum_norm > 0, "clip_gradients", "maximum_norm is {}; it must be positive", maximum_norm)
    require_tensors("clip_gradients", norm=norm)
    require(norm.numel() == 1, "clip_gradients", "norm has shape {}; it must be one number", tuple(norm.shape))
    if backend == "torch" and not torch.compiler.is_compiling():
        require_no_overlap("clip_gradients", {"gradients": gradients}, {})
    factor = clip_factor(norm.reshape(()), maximum_norm)
    for tensors in _by_dtype(gradients).values():
        require_dtype("clip_gradients", "gradients", tensors[0], REFERENCE_FLOATS if backend == "torch" else FLOATS)
        if backend == "torch":
            torch._foreach_mul_(tensors, factor)
            continue
        require_backend_device("clip_gradients", backend, tensors[0])
        SCALE(tensors, factor)
    return factor


def squared_norm_reference(tensors):
    squares = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
    bad = torch.stack([(~torch.isfinite(tensor)).sum() for tensor in tensors]).sum()
    return torch.stack([squares, bad.double()])


def _check_all(op, gradients):
    listed = isinstance(gradients, (list, tuple))
    require(listed, op, "gradients is a {}; it must be a list or a tuple of tensors", type(gradients).__name__)
    require(len(gradients) > 0, op, "the list of gradients is empty")
    for index, gradient in enumerate(gradients):
        name = f"gradients[{index}]"
        require_tensors(op, **{name: gradient})
        require_contiguous(op, name, gradient)
        require(gradient.device == gradients[0].device, op, "{} is on {}, gradients[0] on {}; they must be together",
                name, gradient.device, gradients[0].device)  # fmt: skip


def _by_dtype(tensors):
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups


def _check_list(op, tensors):
    _check_all(op, tensors)
    for index, tensor in enumerate(tensors):
        require_dtype(op, f"gradients[{index}]", tensor, FLOATS)
        require(tensor.dtype == tensors[0].dtype, op, "gradients[{}] is {}, gradients[0] is {}; one call takes one "
                "dtype", index, tensor.dtype, tensors[0].dtype)  # fmt: skip


def _squared_norm_fake(tensors):
    _check_list("gradient_norm", tensors)
    return tensors[0].new_empty((2,), dtype=torch.float64)


def _squared_norm_op(tensors):
    result = _squared_norm_fake(tensors)
    sizes = array("q", [tensor.numel() for tensor in tensors])
    device = tensors[0].device
    length = module_for("gradient_norm", device).squared_norm_workspace(address_of(sizes), len(tensors))
    workspace = torch.empty(max(length, 1), dtype=torch.float64, device=device)
    pointers = addresses(tensors)
    run("gradient_norm", "squared_norm", device, address_of(pointers), address_of(sizes), len(tensors),
        pointer(workspace), pointer(result), DTYPE_CODES[tensors[0].dtype])  # fmt: skip
    return result


def _scale_fake(tensors, factor):
    _check_list("clip_gradients", tensors)
    require_dtype("clip_gradients", "factor", factor, (torch.float32,))
    require(factor.numel() == 1, "clip_gradients", "factor has {} elements; it must have one", factor.numel())
    require_one_device("clip_gradients", **{"gradients[0]": tensors[0], "factor": factor})


def _scale_op(tensors, factor):
    _scale_fake(tensors, factor)
    require_no_overlap("clip_gradients", {"gradients": tensors}, {"factor": [factor]})
    sizes = array("q", [tensor.numel() for tensor in tensors])
    pointers = addresses(tensors)
    run("clip_gradients", "scale", tensors[0].device, address_of(pointers), address_of(sizes), len(tensors),
        pointer(factor), DTYPE_CODES[tensors[0].dtype])  # fmt: skip
    torch.autograd.graph.increment_version(tensors)


SQUARED_NORM = register("squared_norm(Tensor[] tensors) -> Tensor", _squared_norm_op, _squared_norm_fake)
SCALE = register("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()", _scale_op, _scale_fake)
