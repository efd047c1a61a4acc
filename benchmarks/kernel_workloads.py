"""What benchmarks/kernels.py times: for each op, K2's shapes, the bytes it must move, and everyone who can compute it.

A workload makes fresh inputs, and each candidate maps them to outputs; gradients are taken of `wanted` for given
gradients of the outputs. "ours" is first. Bytes are those that no implementation can avoid: every input read and every
output written once, forward and backward counted apart.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from k2_megatron.kernels.adamw import AdamW
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.gradient_norm import gradient_norm_squared
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_reference, rotary_tables
from k2_megatron.kernels.rotary_packed import rotary_packed
from k2_megatron.kernels.swiglu import swiglu

EPSILON = 1e-5
HIDDEN, HEADS, HEAD_DIM, FFN, VOCABULARY, TENSOR_PARALLEL = 8192, 64, 128, 22_016, 32_032, 8
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Workload:
    op: str
    shape: str
    dtype: torch.dtype
    forward_bytes: int
    backward_bytes: int  # 0: the op has no backward
    inputs: Callable[[], Any]  # fresh arguments of the candidates
    wanted: Callable[[Any], Tensors]  # what gradients are taken of
    candidates: dict[str, Callable[..., Any]]
    compiled: Callable[..., Any] | None = None  # given to torch.compile


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peer(package: str, module: str, name: str) -> Any:
    """A function of a package that may or may not be there; None where it is not."""
    if not installed(package):
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError):
        return None


def offered(device: str, **candidates: Callable | Literal[False] | None) -> dict[str, Callable]:
    """Those that exist; packages other than torch have kernels for GPUs only."""
    return {name: run for name, run in candidates.items() if run and (device == "cuda" or name in ("ours", "eager"))}


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """A leaf of independent normal elements."""
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def computed(leaf: torch.Tensor) -> torch.Tensor:
    """The leaf's memory as a result of something: ops that write in place refuse leaves and their views."""
    return _Computed.apply(leaf)


def rms_norm_workload(tokens: int, dtype: torch.dtype, device: str, add: bool) -> Workload:
    size = torch.empty((), dtype=dtype).element_size() * tokens * HIDDEN
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    liger = peer(
        "liger_kernel", "liger_kernel.transformers.functional", "liger_fused_add_rms_norm" if add else "liger_rms_norm"
    )
    quack = peer("quack", "quack.rmsnorm", "rmsnorm")

    def torch_norm(x, weight):
        return F.rms_norm(x, (HIDDEN,), weight, EPSILON)

    def torch_add(x, residual, weight):
        h = x + residual
        return torch_norm(h, weight), h

    if add:
        candidates = offered(
            device,
            ours=lambda x, r, w: add_rms_norm(x, r, w, EPSILON, backend=device),
            eager=torch_add,
            liger=liger and (lambda x, r, w: liger(x, r, w, EPSILON, in_place=False)),
            quack=quack and (lambda x, r, w: quack(x, w, residual=r, eps=EPSILON, prenorm=True)),
        )
        return Workload(
            "add_rms_norm", f"{tokens} x {HIDDEN}", dtype, 4 * size, 4 * size,
            lambda: (normal(tokens, HIDDEN, **like), normal(tokens, HIDDEN, **like), normal(HIDDEN, **like)),
            lambda inputs: inputs, candidates, torch_add,
        )  # fmt: skip
    candidates = offered(
        device,
        ours=lambda x, w: rms_norm(x, w, EPSILON, backend=device),
        eager=torch_norm,
        liger=liger and (lambda x, w: liger(x, w, EPSILON, in_place=False)),
        quack=quack and (lambda x, w: quack(x, w, eps=EPSILON)),
        apex=installed("apex") and (lambda x, w: rms_norm(x, w, EPSILON, backend="apex")),
        transformer_engine=installed("transformer_engine")
        and (lambda x, w: rms_norm(x, w, EPSILON, backend="transformer_engine")),
    )
    return Workload(
        "rms_norm", f"{tokens} x {HIDDEN}", dtype, 2 * size, 3 * size,
        lambda: (normal(tokens, HIDDEN, **like), normal(HIDDEN, **like)), lambda inputs: inputs, candidates, torch_norm,
    )  # fmt: skip


def rotary_workload(sequence: int, batch: int, dtype: torch.dtype, device: str) -> Workload:
    """On megatron-core's layout: q and k are slices, head stride 3 * 128, of the QKV projection's output."""
    heads = HEADS // TENSOR_PARALLEL
    size = torch.empty((), dtype=dtype).element_size() * sequence * batch * 2 * heads * HEAD_DIM
    cos, sin = rotary_tables(sequence, HEAD_DIM, 10_000.0, device)
    wide_cos, wide_sin = (torch.cat([table, table], -1)[None] for table in (cos, sin))
    liger = peer("liger_kernel", "liger_kernel.transformers.functional", "liger_rope")

    def inputs():
        packed = normal(sequence, batch, heads, 3 * HEAD_DIM, device=device, dtype=dtype)
        return computed(packed).split(HEAD_DIM, dim=-1)[:2]

    def by_liger(q, k):
        return liger(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), wide_cos, wide_sin)

    def reference(q, k):
        return rotary_reference(q, k, cos, sin)

    te = installed("transformer_engine") and (lambda q, k: rotary(q, k, cos, sin, backend="transformer_engine"))
    candidates = offered(
        device,
        ours=lambda q, k: rotary(q, k, cos, sin, backend=device),
        eager=reference,
        liger=liger and by_liger,
        transformer_engine=te,
    )
    shape = f"{sequence} x {batch} x {heads} x {HEAD_DIM}, q and k"
    return Workload("rotary", shape, dtype, 2 * size, 2 * size, inputs, lambda inputs: inputs, candidates, reference)


def rotary_packed_workload(sequence: int, batch: int, dtype: torch.dtype, device: str) -> Workload:
    """From the projection's output to q, k, v, and back to its gradient, which the others concatenate."""
    heads = HEADS // TENSOR_PARALLEL
    size = torch.empty((), dtype=dtype).element_size() * sequence * batch * heads * HEAD_DIM
    cos, sin = rotary_tables(sequence, HEAD_DIM, 10_000.0, device)

    def inputs():
        packed = normal(sequence, batch, heads, 3 * HEAD_DIM, device=device, dtype=dtype)
        return (computed(packed),)

    def reference(qkv):
        q, k, v = qkv.split(HEAD_DIM, dim=-1)
        return *rotary_reference(q, k, cos, sin), v

    candidates = offered(
        device, ours=lambda qkv: rotary_packed(qkv, cos, sin, HEAD_DIM, backend=device), eager=reference
    )
    shape = f"{sequence} x {batch} x {heads} x {HEAD_DIM}, q, k, v"
    return Workload(
        "rotary_packed", shape, dtype, 4 * size, 6 * size, inputs, lambda inputs: inputs, candidates, reference
    )


def swiglu_workload(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Workload:
    size = torch.empty((), dtype=dtype).element_size() * tokens * columns
    liger = peer("liger_kernel", "liger_kernel.transformers.functional", "liger_swiglu")

    def reference(packed):
        gate, up = packed.chunk(2, dim=-1)
        return F.silu(gate) * up

    candidates = offered(
        device,
        ours=lambda packed: swiglu(packed, backend=device),
        eager=reference,
        liger=liger and (lambda packed: liger(*packed.chunk(2, dim=-1))),
    )
    return Workload(
        "swiglu", f"{tokens} x {columns}", dtype, 3 * size, 5 * size,
        lambda: (normal(tokens, 2 * columns, device=device, dtype=dtype),), lambda inputs: inputs,
        candidates, reference,
    )  # fmt: skip


def cross_entropy_workload(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Workload:
    size = torch.empty((), dtype=dtype).element_size() * tokens * columns
    labels = torch.randint(0, columns, (tokens,), device=device)
    liger = peer("liger_kernel", "liger_kernel.transformers.functional", "liger_cross_entropy")
    quack = peer("quack", "quack.cross_entropy", "cross_entropy")

    def reference(logits):
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def eager(logits):
        return F.cross_entropy(logits, labels, reduction="none")

    te = installed("transformer_engine") and (
        lambda logits: vocab_parallel_cross_entropy(logits[None], labels[None], backend="transformer_engine")
    )
    candidates = offered(
        device,
        ours=lambda logits: vocab_parallel_cross_entropy(logits, labels, backend=device),
        eager=eager,
        liger=liger and (lambda logits: liger(logits, labels, reduction="none")),
        quack=quack and (lambda logits: quack(logits, labels, reduction="none", inplace_backward=True)),
        transformer_engine=te,
    )

    def inputs():
        logits = normal(tokens, columns, device=device, dtype=dtype)
        return (computed(logits),)  # gradients overwrite it

    shape = f"{tokens} x {columns}"
    return Workload("cross_entropy", shape, dtype, size, 2 * size, inputs, lambda inputs: inputs, candidates, reference)


def linear_cross_entropy_workload(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Workload:
    """Bound by its GEMMs: no bytes are claimed. The weights are of an output layer's size: with logits that run over
    a hundred, half the gradient is subnormal numbers, which a CPU's GEMM multiplies ten times as slowly."""
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    def reference(hidden, weight):
        return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")

    candidates = offered(
        device,
        ours=lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, backend=device),
        eager=reference,
    )
    return Workload(
        "linear_cross_entropy", f"{tokens} x {hidden} x {vocabulary}", dtype, 0, 0,
        lambda: (normal(tokens, hidden, **like), normal(vocabulary, hidden, scale=hidden**-0.5, **like)),
        lambda inputs: inputs, candidates, reference,
    )  # fmt: skip


def optimizer_workloads(elements: int, device: str) -> Iterator[Workload]:
    """fp32 shards as a distributed optimizer holds them: one large and many small tensors."""
    sizes = [elements // 2] + [elements // 128] * 63 + [HIDDEN] * 8
    shape = f"{sum(sizes)} elements, {len(sizes)} tensors"
    yield adamw_workload(sizes, shape, device, with_copies=False)
    yield adamw_workload(sizes, shape, device, with_copies=True)

    def gradients(dtype: torch.dtype):
        return ([torch.randn(size, device=device).to(dtype) for size in sizes],)

    for dtype in (torch.float32, torch.bfloat16):
        yield Workload(
            "gradient_norm", shape, dtype, dtype.itemsize * sum(sizes), 0,
            partial(gradients, dtype), lambda inputs: (),
            {
                "ours": lambda gradients: gradient_norm_squared(gradients, backend=device),
                "eager": lambda gradients: torch.nn.utils.get_total_norm(gradients),
            },
        )  # fmt: skip


def adamw_workload(sizes: list[int], shape: str, device: str, with_copies: bool) -> Workload:
    """with_copies: the bf16 weights of the model are written too, in eager mode by a pass of their own."""

    def optimizer(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> tuple[Any, list, list]:
        tensors = [torch.randn(size, device=device) for size in sizes]
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        copies = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors] if with_copies else []
        return kind(tensors, lr=1e-4, weight_decay=0.1, **options), tensors, copies

    def inputs() -> tuple[dict]:
        ours, tensors, copies = optimizer(AdamW, backend=device)
        ours.model_copies.update(zip(tensors, copies, strict=False))
        return ({"ours": ours, "eager": optimizer(torch.optim.AdamW, fused=True)},)

    def eager(optimizers: dict) -> None:
        theirs, tensors, copies = optimizers["eager"]
        theirs.step()
        if with_copies:
            torch._foreach_copy_(copies, tensors)

    name, each = ("adamw, bf16 copies", 30) if with_copies else ("adamw", 28)
    return Workload(
        name, shape, torch.float32, each * sum(sizes), 0, inputs, lambda inputs: (),
        {"ours": lambda optimizers: optimizers["ours"].step(), "eager": eager},
    )  # fmt: skip


def cpu_workloads(quick: bool) -> Iterator[Workload]:
    """Shapes that fit two cores: 1024 rows of K2's widths, a quarter of the FFN's width, all of the vocabulary."""
    for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16):
        yield rms_norm_workload(1024, dtype, "cpu", add=False)
        yield rms_norm_workload(1024, dtype, "cpu", add=True)
        yield rotary_workload(2048, 1, dtype, "cpu")
        yield rotary_packed_workload(2048, 1, dtype, "cpu")
        yield swiglu_workload(1024, FFN // 4, dtype, "cpu")
        yield cross_entropy_workload(1024, VOCABULARY, dtype, "cpu")
    if not quick:
        yield cross_entropy_workload(4096, VOCABULARY // TENSOR_PARALLEL, torch.bfloat16, "cpu")
        for dtype in (torch.float32, torch.bfloat16):
            yield linear_cross_entropy_workload(512, 256, VOCABULARY, dtype, "cpu")
    yield from optimizer_workloads(4 << 20 if quick else 16 << 20, "cpu")


def cuda_workloads(quick: bool, device: str = "cuda") -> Iterator[Workload]:
    """One rank of K2's layout: TP 8 shards; rows whole and, under sequence parallelism, an eighth of them. A run that
    is stopped has measured what comes first."""
    yield from optimizer_workloads(64 << 20, device)
    others = [(2048, 1), (2048, 2), (2048, 4), (8192, 4), (8192, 2), (2048, 3), (8192, 3)]
    tokens = [(8192, 1)] if quick else [(8192, 1), *others]
    for sequence, batch in tokens:
        rows = sequence * batch
        for norm_rows in (rows // TENSOR_PARALLEL, rows):
            yield rms_norm_workload(norm_rows, torch.bfloat16, device, add=False)
            yield rms_norm_workload(norm_rows, torch.bfloat16, device, add=True)
        yield rotary_workload(sequence, batch, torch.bfloat16, device)
        yield rotary_packed_workload(sequence, batch, torch.bfloat16, device)
        yield swiglu_workload(rows, FFN // TENSOR_PARALLEL, torch.bfloat16, device)
        yield cross_entropy_workload(rows, VOCABULARY // TENSOR_PARALLEL, torch.bfloat16, device)
    yield cross_entropy_workload(4096, VOCABULARY, torch.float32, device)
    if not quick:
        yield linear_cross_entropy_workload(8192, HIDDEN, 16 * VOCABULARY // TENSOR_PARALLEL, torch.bfloat16, device)
