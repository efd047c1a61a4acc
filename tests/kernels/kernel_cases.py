"""The cases every backend is tested on, and how answers are judged: one list for a CPU and, under `-m gpu`, a GPU.

A case makes its inputs from a seed and runs the op forward and backward. It runs three times: in fp64 with the torch
reference (the exact answer), in its own dtype with the torch reference, and in its own dtype with the tested backend.
The bound is the reference's own rounding: the error against the exact answer may be at most twice the reference's, plus
one unit in the last place of fp32 (FP32_ULPS), in any dtype. That is the arithmetic's own noise, two roundings, where
the reference is lucky: in fp32 on rows of two or three elements, the only cases in which it matters (half of it does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from k2_megatron.kernels.adamw import STEP as ADAMW_STEP
from k2_megatron.kernels.adamw import adamw_reference_
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.gradient_norm import clip_gradients_
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.rotary_packed import rotary_packed
from k2_megatron.kernels.swiglu import swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR_FACTOR = 2.0
FP32_ULPS = 1.0
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    offset: int = 0  # elements by which the main input misses its allocation's alignment
    options: dict = field(default_factory=dict)

    def __str__(self):
        options = "".join(f"-{key}={value}" for key, value in self.options.items())
        shape = "x".join(map(str, self.shape))
        return f"{self.op}-{shape}-{str(self.dtype)[6:]}{f'-offset{self.offset}' if self.offset else ''}{options}"

    def run(self, backend: str, device: str = "cpu", exact: bool = False) -> Results:
        return RUNNERS[self.op](Inputs(self, device, exact), backend)


class Inputs:
    """Random tensors in the case's dtype, the same for every run; in fp64 when the exact answer is wanted."""

    def __init__(self, case: Case, device: str, exact: bool):
        self.case, self.device = case, device
        self.dtype = torch.float64 if exact else case.dtype
        self.generator = torch.Generator().manual_seed(len(str(case)) + sum(case.shape))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, leaf: bool = True):
        values = (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.case.dtype)
        wide = self.dtype if self.dtype == torch.float64 else dtype or self.dtype
        return values.to(self.device, wide).requires_grad_(leaf)

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """The values at an address `offset` elements past an allocation's start, as a differentiable copy."""
        buffer = values.new_empty(values.numel() + self.case.offset)
        return _Place.apply(values, buffer, self.case.offset)

    def labels(self, *shape: int, size: int, ignored: float = 0.0):
        labels = torch.randint(0, size, shape, generator=self.generator)
        if ignored:
            labels[torch.rand(shape, generator=self.generator) < ignored] = -100
        return labels.to(self.device)


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, buffer, offset):
        return buffer[offset:].view(values.shape).copy_(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def _backward(inputs: Inputs, outputs: Results, leaves: Results) -> Results:
    """Adds the gradients of the leaves for random gradients of the outputs."""
    gradients = [inputs.normal(*out.shape, dtype=out.dtype, leaf=False) for out in outputs.values()]
    torch.autograd.backward(list(outputs.values()), gradients)
    return outputs | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def _run_rms_norm(inputs: Inputs, backend: str) -> Results:
    options = dict(inputs.case.options)
    fused, weight_dtype = options.pop("add", False), options.pop("weight_dtype", None)
    # One column alone cancels to nothing but epsilon: 1 - x^2 / (x^2 + epsilon).
    epsilon = 1e-5 if inputs.case.shape[-1] > 1 else 0.1
    x = inputs.normal(*inputs.case.shape)
    weight = inputs.normal(inputs.case.shape[-1], dtype=weight_dtype)
    leaves = {"x": x, "weight": weight}
    if fused:
        residual = inputs.normal(*inputs.case.shape)
        y, h = add_rms_norm(inputs.placed(x), inputs.placed(residual), weight, epsilon, backend=backend, **options)
        return _backward(inputs, {"y": y, "h": h}, leaves | {"residual": residual})
    return _backward(inputs, {"y": rms_norm(inputs.placed(x), weight, epsilon, backend=backend, **options)}, leaves)


def _run_swiglu(inputs: Inputs, backend: str) -> Results:
    packed = inputs.normal(*inputs.case.shape, scale=3.0)
    return _backward(inputs, {"y": swiglu(inputs.placed(packed), backend=backend)}, {"packed": packed})


def _run_rotary(inputs: Inputs, backend: str) -> Results:
    """shape (S, B, N, D); layout "packed": q, k, v are slices of one projection's output, as in megatron-core."""
    options = dict(inputs.case.options)
    layout, rotary_dim, with_positions = (options.pop(key, None) for key in ("layout", "rotary_dim", "positions"))
    kv_heads = options.pop("kv_heads", None)
    sequence, batch, heads, dim = inputs.case.shape
    rows = 2 * sequence if with_positions else sequence
    cos, sin = rotary_tables(rows, rotary_dim or dim, 10_000.0, inputs.device)
    if inputs.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    if with_positions:
        positions = torch.randint(0, rows, (sequence, batch), generator=inputs.generator).int()
        options["positions"] = positions.to(inputs.device)
    if layout == "packed":
        leaf = inputs.normal(sequence, batch, heads, 3 * dim)
        q, k, v = inputs.placed(leaf).split(dim, dim=-1)
        q, k = rotary(q, k, cos, sin, backend=backend, **options)
        return _backward(inputs, {"q": q, "k": k, "v": v}, {"qkv": leaf})
    q, k = inputs.normal(sequence, batch, heads, dim), inputs.normal(sequence, batch, kv_heads or heads, dim)
    rotated = rotary(inputs.placed(q), inputs.placed(k), cos, sin, backend=backend, **options)
    return _backward(inputs, dict(zip("qk", rotated, strict=True)), {"q": q, "k": k})


def _run_rotary_packed(inputs: Inputs, backend: str) -> Results:
    """shape (S, B, G, D), queries: query heads for each of the G key heads."""
    sequence, batch, groups, dim = inputs.case.shape
    leaf = inputs.normal(sequence, batch, groups, (inputs.case.options["queries"] + 2) * dim)
    tables = [table.to(torch.promote_types(inputs.dtype, torch.float32)) for table in rotary_tables(
        sequence, dim - 4, 10_000.0, inputs.device)]  # fmt: skip
    q, k, v = rotary_packed(inputs.placed(leaf), *tables, dim, backend=backend)
    return _backward(inputs, {"q": q, "k": k, "v": v}, {"qkv": leaf})


def _run_cross_entropy(inputs: Inputs, backend: str) -> Results:
    """shape (S, B, V); padding: columns between one row's end and the next row's start; late: so many columns come
    before any that matters, 4 to 67 below 0, and a kernel that guesses the row's maximum by them is far off."""
    options = dict(inputs.case.options)
    padding, ignored, scale = options.pop("padding", 0), options.pop("ignored", 0.0), options.pop("scale", 4.0)
    late, (sequence, batch, vocabulary) = options.pop("late", 0), inputs.case.shape
    leaf = inputs.normal(sequence, batch, vocabulary + padding, scale=scale)
    if late:
        with torch.no_grad():  # integers, exact in every dtype
            leaf[..., :late] = -4 - torch.arange(sequence * batch, device=inputs.device).view(sequence, batch, 1) % 64
    labels = inputs.labels(sequence, batch, size=vocabulary - late, ignored=ignored) + late
    logits = inputs.placed(leaf)[..., :vocabulary]
    loss = vocab_parallel_cross_entropy(logits, labels, backend=backend, **options)
    return _backward(inputs, {"loss": loss}, {"logits": leaf})


def _run_linear_cross_entropy(inputs: Inputs, backend: str) -> Results:
    """shape (T, H, V)"""
    tokens, hidden_size, vocabulary = inputs.case.shape
    hidden, weight = inputs.normal(tokens, hidden_size), inputs.normal(vocabulary, hidden_size, scale=0.1)
    labels = inputs.labels(tokens, size=vocabulary, ignored=0.1)
    loss = linear_cross_entropy(inputs.placed(hidden), weight, labels, backend=backend, **inputs.case.options)
    return _backward(inputs, {"loss": loss}, {"hidden": hidden, "weight": weight})


def _run_adamw(inputs: Inputs, backend: str) -> Results:
    """shape: the sizes of tensors; dtype: that of the gradients and of the model copies."""
    sizes, wide = inputs.case.shape, torch.promote_types(inputs.dtype, torch.float32)
    parameters, exp_avg = ([inputs.normal(size, dtype=torch.float32, leaf=False) for size in sizes] for _ in range(2))
    exp_avg_sq = [inputs.normal(size, dtype=torch.float32, leaf=False).square() for size in sizes]
    gradients = [inputs.placed(inputs.normal(size, leaf=False)) for size in sizes]
    copies = [torch.full_like(gradient, torch.nan) for gradient in gradients]
    factor = torch.tensor([0.25], device=inputs.device, dtype=wide)
    step = adamw_reference_ if backend == "torch" else ADAMW_STEP
    step(parameters, gradients, exp_avg, exp_avg_sq, copies, factor, 3e-2, 0.9, 0.95, 1e-6, 0.1, 3)
    lists = {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copies": copies}
    return {name: torch.cat(tensors) for name, tensors in lists.items()}


def _run_clip(inputs: Inputs, backend: str) -> Results:
    """shape: the sizes of tensors."""
    gradients = [inputs.placed(inputs.normal(size, leaf=False)) for size in inputs.case.shape]
    factor = clip_gradients_(gradients, torch.tensor(3.0, device=inputs.device), 1.0, backend=backend)
    return {"gradients": torch.cat(gradients), "factor": factor}


RUNNERS: dict[str, Callable[[Inputs, str], Results]] = {
    "rms_norm": _run_rms_norm,
    "swiglu": _run_swiglu,
    "rotary": _run_rotary,
    "rotary_packed": _run_rotary_packed,
    "cross_entropy": _run_cross_entropy,
    "linear_cross_entropy": _run_linear_cross_entropy,
    "adamw": _run_adamw,
    "clip_gradients": _run_clip,
}

# Shapes: empty, one element, narrower than a vector, below, at and above vector multiples, K2's widths, many rows.
_IN_FP32 = [
    *(
        Case("rms_norm", shape)
        for shape in [(0, 8), (1, 1), (3, 7), (2, 3, 31), (5, 64), (4, 257), (300, 33), (2, 4096), (3, 8192)]
    ),
    *(Case("rms_norm", shape, options={"add": True}) for shape in [(0, 8), (1, 3), (2, 3, 31), (4, 257), (5, 1024)]),
    Case("rms_norm", (2, 65_536), options={"add": True}),
    Case("rms_norm", (9, 96), offset=1),
    Case("rms_norm", (9, 99), offset=3, options={"add": True, "zero_centered": True}),
    Case("rms_norm", (7, 80), options={"zero_centered": True}),
    Case("rms_norm", (7, 80), options={"weight_dtype": torch.float32}),
    *(Case("swiglu", shape) for shape in [(0, 8), (1, 2), (3, 14), (2, 3, 62), (5, 64), (4, 514), (3, 5504)]),
    Case("swiglu", (9, 98), offset=1),
    *(Case("rotary", shape) for shape in [(0, 2, 2, 8), (1, 1, 1, 2), (5, 2, 3, 6), (7, 1, 2, 34), (4, 2, 8, 128)]),
    *(Case("rotary", (5, 2, 3, 32), options={"layout": "packed", "interleaved": pairs}) for pairs in (False, True)),
    Case("rotary", (5, 2, 3, 30), options={"interleaved": True}),
    Case("rotary", (5, 2, 4, 32), options={"kv_heads": 1}),
    Case("rotary", (5, 2, 3, 32), options={"rotary_dim": 12, "layout": "packed"}),
    Case("rotary", (5, 2, 3, 32), options={"rotary_dim": 12, "interleaved": True, "positions": True}),
    Case("rotary", (5, 2, 3, 32), offset=1, options={"positions": True, "layout": "packed"}),
    *(Case("rotary_packed", (5, 2, 3, 32), options={"queries": queries}) for queries in (1, 2, 3)),
    Case("rotary_packed", (0, 2, 3, 16), options={"queries": 1}),
    *(
        Case("cross_entropy", shape)
        for shape in [(0, 2, 5), (1, 1, 1), (3, 1, 7), (4, 2, 65), (2, 2, 4004), (2, 1, 32_032)]
    ),
    Case("cross_entropy", (5, 2, 131), options={"label_smoothing": 0.1, "ignored": 0.3}),
    Case("cross_entropy", (5, 2, 131), options={"z_loss": 1e-2, "padding": 3}),
    Case("cross_entropy", (5, 2, 131), offset=1, options={"label_smoothing": 0.2, "z_loss": 1e-3, "padding": 1}),
    Case("cross_entropy", (3, 2, 40), options={"scale": 60.0}),
    Case("cross_entropy", (64, 2, 69), options={"scale": 1.0, "late": 64}),
    Case("linear_cross_entropy", (13, 16, 37), options={"chunk_tokens": 5, "label_smoothing": 0.1, "z_loss": 1e-3}),
    Case("linear_cross_entropy", (8, 24, 50), offset=1),
    *(
        Case(op, sizes, offset=offset)
        for op in ("adamw", "clip_gradients")
        for sizes, offset in [((0, 1, 7, 99, 4099), 0), ((33, 70_001), 1)]
    ),
]


def _suits(case: Case) -> bool:
    return not (case.dtype == torch.float16 and case.options.get("scale", 0) > 50)


CASES = [case for dtype in DTYPES for case in (replace(case, dtype=dtype) for case in _IN_FP32) if _suits(case)]


def ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbours of `dtype` at each exact value."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=limits.tiny))[1] - 1
    return limits.eps * torch.pow(2.0, exponent.double())


def assert_as_good_as_reference(found: Results, reference: Results, exact: Results, what: object) -> None:
    """The bound of this file's head, on the greatest error and on the root mean square."""
    assert found.keys() == exact.keys(), f"{what}: {list(found)} came back, {list(exact)} were expected"
    for name, value in found.items():
        truth, other = exact[name].double(), reference[name].double().cpu()
        assert value.shape == truth.shape, f"{what}: {name} is {tuple(value.shape)}, not {tuple(truth.shape)}"
        assert value.dtype == reference[name].dtype, f"{what}: {name} is {value.dtype}, not {reference[name].dtype}"
        if not value.numel():
            continue
        floor = FP32_ULPS * ulp(truth, torch.float32)
        error, allowed = (value.double().cpu() - truth).abs(), (other - truth).abs()
        bound = ERROR_FACTOR * allowed.max() + floor
        worst = int((error - bound).nan_to_num(nan=torch.inf).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        numbers = [float(tensor.detach().flatten()[worst]) for tensor in (value, truth, error, bound)]
        assert bool((error <= bound).all()), "{}: {}{} is {:.9g}, exact {:.9g}: error {:.3g}, allowed {:.3g}".format(
            what, name, list(place), *numbers
        )
        rms, rms_bound = error.square().mean().sqrt(), ERROR_FACTOR * allowed.square().mean().sqrt()
        assert rms <= rms_bound + floor.square().mean().sqrt(), (
            f"{what}: {name} has rms error {rms:.3g} > {rms_bound:.3g}"
        )
