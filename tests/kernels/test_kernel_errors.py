"""Every refusal of every op: it names the op, the tensor, what was found and what is allowed, all in Python."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_backends import on_cpu

from k2_megatron.kernels.adamw import AdamW
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.gradient_norm import clip_gradients_, gradient_norm_squared
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.rotary_packed import rotary_packed
from k2_megatron.kernels.swiglu import swiglu

pytestmark = on_cpu
OPS = torch.ops.k2_megatron
META_TABLES = [torch.empty(4, 4, device="meta")] * 2
X, W = torch.zeros(4, 6), torch.ones(6)
COS, SIN = rotary_tables(4, 8, 100.0, "cpu")
Q = torch.zeros(4, 2, 3, 8)
LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
HIDDEN, WEIGHT, TOKENS = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(4, dtype=torch.int64)


def norm(x=X, weight=W, residual=None, backend="cpu"):
    if residual is None:
        return rms_norm(x, weight, 1e-5, backend=backend)
    return add_rms_norm(x, residual, weight, 1e-5, backend=backend)


def turn(q=Q, k=None, cos=COS, sin=SIN, positions=None, backend="cpu"):
    k = torch.zeros(4, 2, 3, 8) if k is None else k
    return rotary(q, k, cos, sin, positions=positions, backend=backend)


def packed(qkv, backend="cpu"):
    return rotary_packed(qkv, COS, SIN, 8, backend=backend)


def loss(logits=LOGITS, labels=LABELS, backend="cpu", **options):
    return vocab_parallel_cross_entropy(logits, labels, backend=backend, **options)


def head(hidden=HIDDEN, weight=WEIGHT, labels=TOKENS, backend="cpu", **options):
    return linear_cross_entropy(hidden, weight, labels, backend=backend, **options)


def shared_q_and_k(offset):
    buffer = torch.zeros(4, 2, 3, 24)
    return buffer[..., :8], buffer[..., offset : offset + 8]


REFUSALS = [
    (lambda: norm(X.double()), r"rms_norm: x is torch.float64; allowed: torch.float32, torch.bfloat16, torch.float16"),
    (lambda: norm(torch.tensor(1.0)), r"rms_norm: x is a scalar; it needs shape \[..., H\]"),
    (lambda: norm(torch.zeros(2, 0), torch.ones(0)), r"rms_norm: hidden size 0; allowed: 1 to 65536"),
    (lambda: norm(torch.zeros(1, 65537), torch.ones(65537)), r"rms_norm: hidden size 65537; allowed: 1 to 65536"),
    (lambda: norm(weight=W.half()), r"rms_norm: weight is torch.float16; allowed: torch.float32"),
    (lambda: norm(weight=torch.ones(5)), r"rms_norm: weight has shape \(5,\); needed: \(6,\) = \[H\] of x"),
    (lambda: norm(torch.zeros(6, 4).t()), r"rms_norm: x of shape \(4, 6\) has strides \(1, 4\); it must be contiguous"),
    (
        lambda: norm(weight=torch.ones(12)[::2]),
        r"rms_norm: weight of shape \(6,\) has strides \(2,\); it must be contig",
    ),
    (lambda: norm(residual=X.half()), r"add_rms_norm: residual is torch.float16; allowed: torch.float32"),
    (lambda: norm(residual=X[:3]), r"add_rms_norm: residual has shape \(3, 6\); needed: \(4, 6\) = x's shape"),
    (lambda: norm(weight=W.to("meta")), r"rms_norm: weight is on meta, x on cpu; they must be together"),
    (lambda: norm(backend="cuda"), r"rms_norm: backend 'cuda' was asked for tensors on cpu; they must be on cuda"),
    (lambda: norm(backend="fast"), r"rms_norm: no backend 'fast'; known: cuda, cpu, torch, apex, transformer_engine"),
    (lambda: norm(residual=X, backend="fast"), r"add_rms_norm: no backend 'fast'"),
    (lambda: norm(backend="apex"), r"rms_norm: apex.normalization.fused_layer_norm:fused_rms_norm_affine is not there"),
    (lambda: norm(weight=None), r"rms_norm: weight is a NoneType; it must be a torch.Tensor"),
    (lambda: norm(X.numpy()), r"rms_norm: x is a ndarray; it must be a torch.Tensor"),
    (lambda: norm(X.to_sparse()), r"rms_norm: x has layout torch.sparse_coo; it must be dense"),
    (lambda: swiglu(X.int(), backend="cpu"), r"swiglu: packed is torch.int32; allowed"),
    (lambda: swiglu(torch.tensor(1.0), backend="cpu"), r"swiglu: packed is a scalar"),
    (
        lambda: swiglu(torch.zeros(2, 5), backend="cpu"),
        r"swiglu: packed has 5 columns; \[gate \| up\] needs an even number",
    ),
    (
        lambda: swiglu(X[:, :4], backend="cpu"),
        r"swiglu: packed of shape \(4, 4\) has strides \(6, 1\); it must be contig",
    ),
    (lambda: swiglu(X, backend="apex"), r"swiglu: no backend 'apex'; known: cuda, cpu, torch"),
    (lambda: turn(Q[0]), r"rotary: q has shape \(2, 3, 8\); it needs \[S, B, N, D\]"),
    (lambda: turn(Q.double()), r"rotary: q is torch.float64; allowed"),
    (lambda: turn(Q, Q.half()), r"rotary: k is torch.float16; allowed: torch.float32"),
    (
        lambda: turn(torch.zeros(4, 2, 8, 3).transpose(2, 3)),
        r"rotary: q has strides \(48, 24, 1, 3\); the last must be 1",
    ),
    (lambda: turn(Q, torch.zeros(3, 2, 3, 8)), r"rotary: k has shape \(3, 2, 3, 8\); needed: \(4, 2, 3, 8\)"),
    (lambda: turn(cos=COS.double()), r"rotary: cos is torch.float64; allowed: torch.float32"),
    (lambda: turn(cos=COS[0]), r"rotary: cos has shape \(4,\); it needs \[rows, R/2\]"),
    (lambda: turn(sin=SIN[:2]), r"rotary: sin has shape \(2, 4\); needed: \(4, 4\) = cos' shape"),
    (lambda: turn(cos=torch.ones(4, 5), sin=torch.ones(4, 5)), r"rotary: cos has 5 columns: R = 10 of D = 8 elements"),
    (lambda: turn(cos=COS[:3], sin=SIN[:3]), r"rotary: cos has 3 rows for a sequence of 4; build longer tables"),
    (
        lambda: turn(cos=torch.ones(4, 8)[:, ::2]),
        r"rotary: cos of shape \(4, 4\) has strides \(8, 2\); it must be contig",
    ),
    (lambda: turn(positions=torch.zeros(4, 2)), r"rotary: positions is torch.float32; allowed: torch.int32"),
    (lambda: turn(positions=torch.zeros(4).int()), r"rotary: positions has shape \(4,\); needed: \(4, 2\) = \[S, B\]"),
    (lambda: turn(positions=torch.full((4, 2), 4).int()), r"rotary: positions run from 4 to 4; the tables hold 0 to 3"),
    (lambda: turn(positions=-torch.ones(4, 2).int(), backend="torch"), r"rotary: positions run from -1 to -1"),
    (lambda: turn(*shared_q_and_k(4)), r"rotary: q \(strides .*\) and k \(strides .*\) share memory"),
    (lambda: turn(Q, Q), r"rotary: q \(strides .*\) and k \(strides .*\) share memory"),
    (
        lambda: turn(torch.zeros(4, 2, 1, 8).expand(4, 2, 3, 8)),
        r"rotary: q of shape .*: elements overlap, and it is written",
    ),
    (
        lambda: turn(Q.clone().requires_grad_()),
        r"rotary: q is a leaf that requires a gradient, or a view of one, and would be rotated in place; pass a com",
    ),
    (lambda: turn(Q, Q.clone().requires_grad_().view(4, 2, 3, 8)), r"rotary: k is a leaf .* or a view of one"),
    (lambda: packed(torch.zeros(4, 72, requires_grad=True)[:, None].view(4, 1, 3, 24)), r"rotary: qkv is a leaf"),
    (lambda: loss(torch.zeros(30, requires_grad=True).view(2, 3, 5)), r"cross_entropy: logits are a leaf .* or a view"),
    (
        lambda: turn(Q, torch._neg_view(Q.clone())),
        r"rotary: k has torch's negative bit set, and is written in place; pass k.resolve_neg\(\)",
    ),
    (lambda: packed(torch._neg_view(torch.zeros(4, 2, 3, 24))), r"rotary: qkv has torch's negative bit set"),
    (
        lambda: loss(torch._neg_view(LOGITS.clone().requires_grad_() * 1)),
        r"cross_entropy: logits has torch's negative bit set",
    ),
    (lambda: turn(backend="apex"), r"rotary: no backend 'apex'; known: cuda, cpu, torch, transformer_engine"),
    (
        lambda: packed(torch.zeros(4, 2, 24)),
        r"rotary: qkv has shape \(4, 2, 24\); it needs \[S, B, G, \(n \+ 2\) \* D\]",
    ),
    (lambda: packed(torch.zeros(4, 2, 3, 16)), r"rotary: qkv has 16 columns a group; needed: \(n \+ 2\) \* 8, n >= 1"),
    (lambda: rotary_packed(torch.zeros(4, 2, 3, 24), COS, SIN, 0, backend="cpu"), r"rotary: head_dim is 0; it must be"),
    (lambda: packed(torch.zeros(4, 2, 3, 48)[..., ::2]), r"rotary: qkv of shape \(4, 2, 3, 24\) has strides"),
    (lambda: packed(torch.zeros(4, 2, 3, 24).requires_grad_()), r"rotary: qkv is a leaf that requires a gradient"),
    (lambda: packed(torch.zeros(4, 2, 3, 24), backend="apex"), r"rotary: no backend 'apex'"),
    (lambda: rotary_tables(4, 7, 10.0, "cpu"), r"rotary: rotary_dim is 7; it must be even and positive"),
    (lambda: rotary_tables(-1, 8, 10.0, "cpu"), r"rotary: sequence_length is -1; it cannot be negative"),
    (lambda: loss(torch.zeros(5)), r"cross_entropy: logits have shape \(5,\); needed: \[S, B, V/tp\]"),
    (lambda: loss(LOGITS.double()), r"cross_entropy: logits is torch.float64; allowed"),
    (lambda: loss(labels=LABELS.int()), r"cross_entropy: labels is torch.int32; allowed: torch.int64"),
    (
        lambda: loss(labels=LABELS[:1]),
        r"cross_entropy: labels has shape \(1, 3\); needed: \(2, 3\) = logits' shape without",
    ),
    (
        lambda: loss(labels=torch.zeros(3, 2).long().t()),
        r"cross_entropy: labels of shape \(2, 3\) has strides \(1, 2\)",
    ),
    (
        lambda: loss(LOGITS.transpose(0, 1), LABELS.view(3, 2)),
        r"cross_entropy: logits of shape .* rows must lie at one str",
    ),
    (lambda: loss(torch.zeros(6, 10)[:, ::2].view(2, 3, 5)), r"cross_entropy: logits of shape .*columns must be dense"),
    (lambda: loss(torch.zeros(2, 3, 0), LABELS - 100), r"cross_entropy: logits have 0 columns"),
    (
        lambda: loss(labels=LABELS + 5),
        r"cross_entropy: labels\[0, 0\] is 5; allowed: 0 to 4 \(ids are global\), and ignore_i",
    ),
    (lambda: loss(labels=LABELS - 1, backend="torch"), r"cross_entropy: labels\[0, 0\] is -1; allowed: 0 to 4"),
    (lambda: loss(label_smoothing=1.0), r"cross_entropy: label_smoothing is 1.0; it lies in \[0, 1\)"),
    (lambda: loss(z_loss=-1.0), r"cross_entropy: z_loss is -1.0; it cannot be negative"),
    (
        lambda: loss(LOGITS.clone().requires_grad_()),
        r"cross_entropy: logits are a leaf that requires a gradient, which",
    ),
    (lambda: loss(backend="apex"), r"cross_entropy: no backend 'apex'; known: cuda, cpu, torch, transformer_engine"),
    (lambda: head(HIDDEN[0]), r"linear_cross_entropy: hidden has shape \(6,\); needed: \[T, H\]"),
    (lambda: head(weight=W), r"linear_cross_entropy: weight has shape \(6,\); needed: \[V/tp, H\]"),
    (lambda: head(weight=torch.zeros(5, 7)), r"linear_cross_entropy: weight has shape \(5, 7\); needed: \(5, 6\)"),
    (lambda: head(weight=WEIGHT.half()), r"linear_cross_entropy: weight is torch.float16; allowed: torch.float32"),
    (
        lambda: head(labels=TOKENS[:2]),
        r"linear_cross_entropy: labels has shape \(2,\); needed: \(4,\) = \[T\] of hidden",
    ),
    (lambda: head(chunk_tokens=0), r"linear_cross_entropy: chunk_tokens is 0; it must be positive"),
    (lambda: head(labels=TOKENS + 9), r"labels\[0\] is 9; allowed: 0 to 4"),
    (lambda: head(backend="apex"), r"linear_cross_entropy: no backend 'apex'; known: cuda, cpu, torch"),
    (lambda: AdamW([X], adam_w_mode=False), r"adamw: only decoupled weight decay with bias correction is offered"),
    (lambda: AdamW([X], master_weights=True), r"adamw: options \{'master_weights': True\} are not offered"),
    (lambda: AdamW([X], lr=-1), r"adamw: lr -1, eps 1e-08, weight_decay 0.0; none may be negative"),
    (lambda: AdamW([X], betas=(0.9, 1.0)), r"adamw: betas are \(0.9, 1.0\); both lie in \[0, 1\)"),
    (
        lambda: AdamW([X], backend="transformer_engine"),
        r"adamw: no backend 'transformer_engine'; known: cuda, cpu, torch, a",
    ),
    (lambda: gradient_norm_squared([X], backend="apex"), r"gradient_norm: no backend 'apex'"),
    (lambda: clip_gradients_([X], X[0, 0], 1.0, backend="apex"), r"clip_gradients: no backend 'apex'"),
    (lambda: gradient_norm_squared([], backend="cpu"), r"gradient_norm: the list of gradients is empty"),
    (
        lambda: gradient_norm_squared([X, X[:, :2]], backend="cpu"),
        r"gradient_norm: gradients\[1\] of shape \(4, 2\) has str",
    ),
    (lambda: gradient_norm_squared([X, X.to("meta")], backend="cpu"), r"gradient_norm: gradients\[1\] is on meta"),
    (lambda: gradient_norm_squared([X.double()], backend="cpu"), r"gradient_norm: gradients is torch.float64; allowed"),
    (
        lambda: clip_gradients_([X], 2.0, 1.0, backend="cpu"),
        r"clip_gradients: norm is a float; it must be a torch.Tens",
    ),
    (lambda: clip_gradients_([X], torch.ones(4), 1.0, backend="cpu"), r"clip_gradients: norm has shape \(4,\)"),
    (
        lambda: clip_gradients_([X], torch.tensor(1.0), 0.0, backend="cpu"),
        r"clip_gradients: maximum_norm is 0.0; it must",
    ),
]


REFUSALS += [
    (lambda: rms_norm(X, W, None, backend="cpu"), r"rms_norm: epsilon is None, a NoneType; it must be a number"),
    (lambda: rms_norm(X, W, math.nan, backend="cpu"), r"rms_norm: epsilon is nan; it must be finite and not negative"),
    (lambda: add_rms_norm(X, X, W, -1, backend="torch"), r"add_rms_norm: epsilon is -1; it must be finite and not"),
    (lambda: OPS.swiglu_forward(torch.empty(1, 2**31, device="meta")), r"swiglu: packed has rows of 2147483648 elem"),
    (
        lambda: OPS.cross_entropy_statistics(torch.empty(4, 2**31, device="meta"), TOKENS.to("meta"), 0, 3),
        r"cross_entropy: logits has rows of 2147483648 elements; at most 1073741824 are offered",
    ),
    (
        lambda: OPS.rotary(*[torch.empty(4, 1, 2**28, 8, device="meta")] * 2, *META_TABLES, None, False, False),
        r"rotary: q has rows of 2147483648 elements",
    ),
    (lambda: loss(group=3), r"cross_entropy: group is a int; it must be a ProcessGroup of this rank, or None"),
    (lambda: loss(ignore_index=-100.0), r"cross_entropy: ignore_index is -100.0, a float; it must be an integer"),
    (lambda: loss(z_loss="1"), r"cross_entropy: z_loss is '1', a str; it must be a number"),
    (lambda: head(chunk_tokens=2.5), r"linear_cross_entropy: chunk_tokens is 2.5, a float; it must be an integer"),
    (
        lambda: head(labels=torch.zeros(8, dtype=torch.int64)[::2]),
        r"linear_cross_entropy: labels of shape \(4,\) has strides \(2,\); it must be contiguous",
    ),
    (
        lambda: torch.autocast("cpu", torch.bfloat16)(head)(),
        r"linear_cross_entropy: autocast is on for cpu; the products are taken in hidden's dtype \(torch.float32\)",
    ),
    (
        lambda: clip_gradients_([X], X[0, 0], "1", backend="cpu"),
        r"clip_gradients: maximum_norm is '1', a str; it must be a number",
    ),
    (lambda: gradient_norm_squared(None, backend="cpu"), r"gradient_norm: gradients is a NoneType; it must be a list"),
    (
        lambda: clip_gradients_((x for x in [X]), X[0, 0], 1.0, backend="cpu"),
        r"clip_gradients: gradients is a generator; it must be a list or a tuple of tensors",
    ),
]


# What torch itself would take, and broadcast or cast without a word.
REFUSALS_OF_THE_REFERENCES = [
    (lambda: norm(X.int(), backend="torch"), r"rms_norm: x is torch.int32; allowed: .*torch.float64"),
    (lambda: norm(weight=torch.ones(1), backend="torch"), r"rms_norm: weight has shape \(1,\); needed: \(6,\)"),
    (lambda: norm(torch.tensor(1.0), backend="torch"), r"rms_norm: x is a scalar"),
    (lambda: norm(residual=X[:1], backend="torch"), r"add_rms_norm: residual has shape \(1, 6\); needed: \(4, 6\)"),
    (lambda: norm(weight=W.to("meta"), backend="torch"), r"rms_norm: weight is on meta, x on cpu"),
    (lambda: swiglu(X.int(), backend="torch"), r"swiglu: packed is torch.int32; allowed"),
    (lambda: swiglu(torch.zeros(2, 0), backend="torch"), r"swiglu: packed has 0 columns"),
    (lambda: turn(cos=COS[:1], sin=SIN[:1], backend="torch"), r"rotary: cos has 1 rows for a sequence of 4"),
    (lambda: turn(Q.int(), Q.int(), backend="torch"), r"rotary: q is torch.int32; allowed"),
    (lambda: turn(k=torch.zeros(4, 2, 3, 10), backend="torch"), r"rotary: k has shape \(4, 2, 3, 10\); needed"),
    (lambda: turn(positions=torch.zeros(4, 2), backend="torch"), r"rotary: positions is torch.float32; allowed"),
    (lambda: loss(LOGITS.int(), backend="torch"), r"cross_entropy: logits is torch.int32; allowed"),
    (lambda: loss(labels=LABELS.to("meta"), backend="torch"), r"cross_entropy: labels is on meta, logits on cpu"),
    (lambda: gradient_norm_squared([X.int()], backend="torch"), r"gradient_norm: gradients is torch.int32; allowed"),
    (lambda: clip_gradients_([X.int()], X[0, 0], 1.0, backend="torch"), r"clip_gradients: gradients is torch.int32"),
    (
        lambda: clip_gradients_([X, X], torch.tensor(1.0), 1.0, backend="torch"),
        r"clip_gradients: gradients\[0\] and gradients\[1\] share memory",
    ),
]
REFUSALS += REFUSALS_OF_THE_REFERENCES


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[message[:60] for _, message in REFUSALS])
def test_refusal(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ops_called_past_the_public_functions_check_too():
    """torch.ops.k2_megatron is reachable by anyone: nothing unchecked gets to a pointer."""
    ops = torch.ops.k2_megatron
    with pytest.raises(ValueError, match=r"rms_norm: grad_y has shape \(4, 5\)"):
        ops.rms_norm_backward(torch.zeros(4, 5), X, W, torch.zeros(4), False)
    with pytest.raises(ValueError, match=r"rms_norm: rstd has shape \(3,\)"):
        ops.rms_norm_backward(X, X, W, torch.zeros(3), False)
    with pytest.raises(ValueError, match=r"swiglu: grad_y has shape \(4, 6\)"):
        ops.swiglu_backward(X, X)
    rotation = (COS, SIN, None, False, True)
    with pytest.raises(ValueError, match=r"rotary: to_q has shape \(4, 2, 2, 8\); needed: \(4, 2, 3, 8\) = q's shape"):
        ops.rotary_into(Q, Q, torch.zeros(4, 2, 2, 8), torch.zeros(4, 2, 3, 8), *rotation)
    with pytest.raises(ValueError, match=r"rotary: to_k is torch.float16; allowed: torch.float32"):
        ops.rotary_into(Q, Q, torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3, 8).half(), *rotation)
    with pytest.raises(ValueError, match=r"rotary: to_q has strides \(48, 24, 1, 3\); the last must be 1"):
        ops.rotary_into(Q, Q, torch.zeros(4, 2, 8, 3).transpose(2, 3), torch.zeros(4, 2, 3, 8), *rotation)
    with pytest.raises(ValueError, match=r"rotary: q and to_q share memory; they must not overlap"):
        ops.rotary_into(Q, Q.clone(), Q, torch.zeros(4, 2, 3, 8), *rotation)
    with pytest.raises(ValueError, match=r"rotary: k and to_q share memory; they must not overlap"):
        ops.rotary_into(Q, (shared := torch.zeros(9, 2, 3, 8))[5:], shared[2:6], torch.zeros(4, 2, 3, 8), *rotation)
    with pytest.raises(ValueError, match=r"rotary: q \(strides .*\) and k \(strides .*\) share memory"):
        ops.rotary_into(Q, Q, *shared_q_and_k(4), *rotation)
    with pytest.raises(ValueError, match=r"cross_entropy: logits have strides|cross_entropy: logits of shape"):
        ops.cross_entropy_statistics(torch.zeros(1, 5).expand(4, 5), TOKENS, 0, 3)
    with pytest.raises(ValueError, match=r"cross_entropy: lse has shape \(3,\)"):
        ops.cross_entropy_gradient_(torch.zeros(4, 5), TOKENS, torch.zeros(3), torch.zeros(4), 0, 5, 0.0, 0.0, -100)
    with pytest.raises(ValueError, match=r"cross_entropy: all_statistics has shape \(1, 12\); needed: \[ranks, 3 \* T"):
        ops.cross_entropy_loss(torch.zeros(1, 12), TOKENS, 5, 0.0, 0.0, -100)
    with pytest.raises(ValueError, match=r"adamw: exp_avg\[0\] has shape \(3,\)"):
        ops.adamw_([W], [W], [torch.zeros(3)], [W], [], None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1)
    with pytest.raises(ValueError, match=r"adamw: 2 gradients for 1 parameters"):
        ops.adamw_([W], [W, W], [W], [W], [], None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1)
    with pytest.raises(
        ValueError, match=r"adamw: (exp_avg|exp_avg_sq)\[0\] and (exp_avg|exp_avg_sq)\[0\] share memory"
    ):
        ops.adamw_([W.clone()], [W], [(moment := W.clone())], [moment], [], None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1)
    with pytest.raises(ValueError, match=r"clip_gradients: .*gradients\[0\].* share memory"):
        ops.scale_([X], X[0, :1])
    with pytest.raises(ValueError, match=r"clip_gradients: factor has 2 elements"):
        ops.scale_([X], torch.zeros(2))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("copy", "scale", "message"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), None, r"adamw: model_copies\[0\] has shape \(2,\); needed: \(3,\)"),
        (torch.zeros(3, dtype=torch.int32), None, r"adamw: model_copies\[0\] is torch.int32; allowed"),
        (None, torch.ones(2), r"adamw: gradient_scale has 2 elements; it must have one"),
        (None, torch.ones(1).double(), r"adamw: gradient_scale is torch.float64; allowed: torch.float32"),
        (None, 2.0, r"adamw: gradient_scale is a float; it must be a torch.Tensor"),
        ("the gradient", None, r"adamw: .* share memory, and the op writes in place"),
    ],
)
def test_a_step_refuses(backend, copy, scale, message):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = AdamW([parameter], backend=backend)
    if copy is not None:
        optimizer.model_copies[parameter] = parameter.grad if isinstance(copy, str) else copy
    with pytest.raises(ValueError, match=message):
        optimizer.step(gradient_scale=scale)
    assert torch.equal(parameter, torch.ones(3))


def test_a_parameter_in_low_precision_is_refused_at_the_step():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"adamw: a parameter is torch.bfloat16; allowed: torch.float32"):
        AdamW([parameter], backend="cpu").step()
