"""The ops as torch sees them: opcheck, one compiled graph, activation recompute, in-place rotation under autograd."""

from __future__ import annotations

import pytest
import torch
from kernel_backends import COMPILED, on_cpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from k2_megatron.kernels import adamw, gradient_norm  # noqa: F401 (registers their ops)
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.rotary_packed import in_wide_elements, rotary_packed
from k2_megatron.kernels.swiglu import swiglu

OPS = torch.ops.k2_megatron
DIM = 16


def op_samples(device):
    """One call of every registered op, differentiable inputs requiring gradients."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, grad=False):
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(grad)

    cos, sin = rotary_tables(4, 8, 100.0, device)
    labels = torch.tensor([0, 5, -100], device=device)
    rotation = (cos, sin, None, False, False)
    x, weight, rstd = normal(3, 8), normal(8), normal(3).abs()
    smooth = (0, 6, 0.1, 1e-3, -100)
    return {
        "rms_norm_forward": (normal(3, 8, grad=True), normal(8, grad=True), 1e-5, False),
        "add_rms_norm_forward": (normal(3, 8, grad=True), normal(3, 8, grad=True), normal(8, grad=True), 1e-5, True),
        "rms_norm_backward": (normal(3, 8), x, weight, rstd, False),
        "add_rms_norm_backward": (normal(3, 8), normal(3, 8), x, weight, rstd, False),
        "swiglu_forward": (normal(3, 8, grad=True),),
        "swiglu_backward": (normal(3, 4), normal(3, 8)),
        "rotary": (normal(4, 1, 2, 8, grad=True), normal(4, 1, 1, 8, grad=True), *rotation),
        "rotary_": (normal(4, 1, 2, 8), normal(4, 1, 1, 8), *rotation),
        "rotary_into": (
            *(normal(4, 1, 2, 8), normal(4, 1, 1, 8)),
            *(normal(4, 1, 2, 8), normal(4, 1, 1, 8)),
            *rotation,
        ),
        "cross_entropy_statistics": (normal(3, 6), labels, 0, 4),
        "cross_entropy_loss": (torch.ones(2, 4 * 3 + 1, device=device), labels, 12, 0.1, 1e-3, -100),
        "cross_entropy_gradient_": (normal(3, 6), labels, normal(3), normal(3), *smooth),
        "cross_entropy_gradient": (normal(3, 6), labels, normal(3), normal(3), *smooth),
        "squared_norm": ([normal(3), normal(4)],),
        "scale_": ([normal(3), normal(4)], normal(1)),
        "adamw_": ([normal(5)], [normal(5)], [normal(5)], [normal(5).abs()], [], None, 0.1, 0.9, 0.99, 1e-8, 0.1, 1),
    }


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend):
    for name, arguments in op_samples(backend).items():
        torch.library.opcheck(getattr(OPS, name).default, arguments)


class Block(torch.nn.Module):
    """Norm, projection, rotation on megatron-core's layout, SwiGLU, fused residual norm, loss: every op once."""

    def __init__(self, backend, device, heads=2, vocabulary=21):
        super().__init__()
        self.backend, self.heads = backend, heads
        hidden = heads * DIM
        torch.manual_seed(5)
        self.norm = torch.nn.Parameter(torch.rand(hidden, device=device))
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False, device=device)
        self.mlp = torch.nn.Linear(hidden, 2 * hidden, bias=False, device=device)
        self.head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
        self.tables = rotary_tables(8, DIM, 100.0, device)

    def body(self, x):
        sequence, batch, _ = x.shape
        qkv = self.qkv(rms_norm(x, self.norm, 1e-5, backend=self.backend))
        q, k, v = qkv.view(sequence, batch, self.heads, 3 * DIM).split(DIM, dim=-1)
        q, k = rotary(q, k, *self.tables, backend=self.backend)
        packed = self.qkv(v.reshape(x.shape)).view(sequence, batch, self.heads, 3 * DIM)
        other_q, other_k, other_v = rotary_packed(packed, *self.tables, DIM, backend=self.backend)
        k = k.contiguous()  # torch's sigmoid rounds otherwise where elements lie apart, as in the slices of qkv
        mixed = (q * k.sigmoid() + other_q * other_k.sigmoid() + other_v).reshape(x.shape)
        y, h = add_rms_norm(mixed, x, self.norm, 1e-5, backend=self.backend)
        return h + swiglu(self.mlp(y), backend=self.backend)

    def forward(self, x, labels):
        return self.loss(self.body(x), labels)

    def vocabulary_loss(self, hidden, labels):
        return vocab_parallel_cross_entropy(self.head(hidden), labels, label_smoothing=0.1, backend=self.backend)

    def loss(self, hidden, labels):
        whole = self.vocabulary_loss(hidden, labels)
        flat = linear_cross_entropy(
            hidden.flatten(0, 1), self.head.weight, labels.flatten(), chunk_tokens=9, backend=self.backend
        )
        return whole + flat.view(labels.shape)

    def losses_and_gradients(self, x, labels, function=None):
        x = x.detach().requires_grad_()
        self.zero_grad()
        loss = (self if function is None else function)(x, labels)
        (loss * torch.arange(1.0, 1 + loss.numel(), device=loss.device).view(loss.shape)).sum().backward()
        return [loss.detach(), x.grad, *(parameter.grad for parameter in self.parameters())]


@pytest.fixture(params=COMPILED)
def block(request):
    return Block(request.param, request.param)


@pytest.fixture
def batch(block):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8, 2, block.norm.numel(), generator=generator)
    return x.to(block.norm.device), torch.randint(0, 21, (8, 2), generator=generator).to(block.norm.device)


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_block_of_all_ops_equals_the_reference(block, batch):
    reference = Block("torch", block.norm.device)
    assert_all_close(block.losses_and_gradients(*batch), reference.losses_and_gradients(*batch))


def test_compile_in_one_graph(block, batch):
    compiled = torch.compile(block, fullgraph=True)
    assert_all_close(block.losses_and_gradients(*batch, compiled), block.losses_and_gradients(*batch))


@pytest.mark.parametrize("backend", [*COMPILED, "torch"])
def test_compiled_graphs_serve_sequences_of_any_length(backend):
    """Checks that put a size into a text made it a constant: a graph for each length, and after eight an error."""
    block = Block(backend, "cpu" if backend == "torch" else backend)
    device = block.norm.device
    torch._dynamo.reset()  # what other tests compiled would count
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, labels: block.vocabulary_loss(block.body(x), labels), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (3, 4, 5, 7, 8):
        x, labels = torch.randn(length, 2, block.norm.numel(), device=device), torch.zeros(length, 2, device=device)
        compiled(x, labels.long()).sum().backward()
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for 5 lengths"


@on_cpu
def test_labels_out_of_range_are_refused_in_compiled_graphs_too():
    def loss(logits, labels):
        return vocab_parallel_cross_entropy(logits * 1, labels, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, 1, 7), torch.tensor([[1], [6], [-100]]))
    with pytest.raises(ValueError, match=r"cross_entropy: labels\[1\] is 7; allowed: 0 to 6"):
        compiled(torch.randn(3, 1, 7), torch.tensor([[1], [7], [-100]]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_same_bits(block, batch, reentrant):
    def recomputed(x, labels):
        hidden = checkpoint(block.body, x, use_reentrant=reentrant)
        return block.loss(hidden, labels)

    found, expected = block.losses_and_gradients(*batch, recomputed), block.losses_and_gradients(*batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_recompute_of_the_loss_gives_the_same_bits(block, batch):
    def recomputed(x, labels):
        return checkpoint(block, x, labels, use_reentrant=False)

    found, expected = block.losses_and_gradients(*batch, recomputed), block.losses_and_gradients(*batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@on_cpu
def test_rotation_is_in_place_and_leaves_the_rest_alone():
    qkv = torch.randn(4, 1, 2, 3 * DIM)
    before = qkv.clone()
    q, k, _ = qkv.split(DIM, dim=-1)
    out_q, out_k = rotary(q, k, *rotary_tables(4, DIM, 100.0, "cpu"), backend="cpu")
    assert out_q.data_ptr() == q.data_ptr()
    assert out_k.data_ptr() == k.data_ptr()
    assert not torch.equal(q[1:], before[1:, ..., :DIM])
    assert torch.equal(qkv[..., 2 * DIM :], before[..., 2 * DIM :])


@on_cpu
def test_rotation_of_a_tensor_that_autograd_saved_is_reported():
    q = torch.randn(4, 1, 2, DIM, requires_grad=True).exp()  # exp saves its result
    k = torch.randn(4, 1, 2, DIM) * 1
    out, _ = rotary(q, k, *rotary_tables(4, DIM, 100.0, "cpu"), backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_cpu
def test_packed_rotation_of_a_tensor_that_autograd_saved_is_reported():
    packed = torch.randn(4, 1, 2, 3 * DIM, requires_grad=True).exp()
    outputs = rotary_packed(packed, *rotary_tables(4, DIM, 100.0, "cpu"), DIM, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()


@pytest.mark.parametrize(
    ("dim", "offset", "dtype", "elements"),
    [
        (32, 0, torch.bfloat16, torch.complex128),
        (4, 0, torch.float32, torch.complex128),
        (12, 0, torch.bfloat16, torch.bfloat16),  # a head and a half of 16 bytes
        (32, 3, torch.bfloat16, torch.bfloat16),  # starts between them
    ],
)
def test_heads_are_copied_16_bytes_at_a_time_where_memory_allows(dim, offset, dtype, elements):
    packed = torch.zeros(offset + 5 * 2 * 3 * 3 * dim, dtype=dtype)[offset:].view(5, 2, 3, 3 * dim)
    value = torch.randn(3, 1, dim).to(dtype).expand(5, 3, 2, dim).transpose(1, 2)  # one batch row for all
    to, source = in_wide_elements(packed[..., 2 * dim :], value)
    assert to.dtype == source.dtype == elements
    to.copy_(source)
    assert torch.equal(packed[..., 2 * dim :], value)
    assert not packed[..., : 2 * dim].any()


@on_cpu
def test_rotation_does_not_touch_a_gradient_with_other_readers():
    """An addition hands the same gradient tensor to both of its inputs."""
    leaf, other = torch.randn(4, 1, 2, DIM, requires_grad=True), torch.randn(4, 1, 2, DIM, requires_grad=True)
    out, _ = rotary(leaf * 1, torch.zeros(4, 1, 1, DIM), *rotary_tables(4, DIM, 100.0, "cpu"), backend="cpu")
    gradient = torch.randn(4, 1, 2, DIM)
    kept = gradient.clone()
    (out + other * 1).backward(gradient)
    assert torch.equal(other.grad, kept)
    assert torch.equal(gradient, kept)


@on_cpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_any_layout_reach_the_rotation(compiled):
    """sum() sends an expanded gradient, all strides 0; a transposed use sends one whose heads' elements lie apart."""

    def use(q, k, backend):
        rotated_q, rotated_k = rotary(q * 1, k * 1, *rotary_tables(4, DIM, 100.0, "cpu"), backend=backend)
        return rotated_q.sum() + (rotated_k.transpose(1, 3) * factor).sum()

    q, k = (torch.randn(4, 1, heads, DIM, requires_grad=True) for heads in (2, 3))
    factor = torch.randn(4, DIM, 3, 1)
    expected = torch.autograd.grad(use(q, k, "torch"), (q, k))
    run = torch.compile(use, fullgraph=True, backend="aot_eager") if compiled else use
    assert_all_close(torch.autograd.grad(run(q, k, "cpu"), (q, k)), expected)


@on_cpu
def test_the_gradient_lies_in_the_logits_storage_and_is_taken_once():
    leaf = torch.randn(3, 1, 7, requires_grad=True)
    logits = leaf * 1
    logits.retain_grad()
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([[1], [2], [3]]), backend="cpu").sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), leaf.grad)
    with pytest.raises(
        RuntimeError, match="cross_entropy: the logits were overwritten by the gradient in an earlier back"
    ):
        loss.backward()


@on_cpu
@pytest.mark.parametrize("view", [lambda leaf: leaf, lambda leaf: leaf[:, None], lambda leaf: leaf.view(3, 1, 7)])
def test_a_compiled_graph_leaves_parameters_and_their_views_as_they_are(view):
    """It cannot tell a view of a parameter from a computed tensor: eager mode refuses the one and spends the other."""
    leaf, labels = torch.nn.Parameter(torch.randn(3, 7)), torch.tensor([1, 2, 3])
    before = leaf.detach().clone()

    def loss(logits):
        return vocab_parallel_cross_entropy(view(logits), labels.view(view(logits).shape[:-1]), backend="cpu")

    torch._dynamo.reset()  # the other views would count as recompilations
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).sum().backward()
    assert torch.equal(leaf.detach(), before)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, labels, reduction="sum"), leaf)
    assert_all_close([leaf.grad], expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=on_cpu)])
def test_the_losses_have_no_second_derivative_in_any_backend(backend):
    logits, labels = torch.randn(3, 1, 7, requires_grad=True), torch.tensor([[1], [2], [3]])
    losses = [
        vocab_parallel_cross_entropy(logits * 1, labels, backend=backend),
        linear_cross_entropy(logits[:, 0], torch.eye(7), labels[:, 0], backend=backend),
    ]
    for loss in losses:
        with pytest.raises(
            RuntimeError, match=r"cross_entropy: this backward cannot be differentiated again .*; no backend can; take"
        ):
            torch.autograd.grad(loss.sum(), logits, create_graph=True)


@on_cpu
@pytest.mark.parametrize(("batch", "k_heads"), [(1, 0), (0, 3), (0, 0)])
def test_empty_tensors_rotate_back(batch, k_heads):
    """Autograd hands over their gradients with any strides, all 0 from a sum."""
    q, k = (torch.randn(4, batch, heads, DIM, requires_grad=True) for heads in (2, k_heads))
    rotated = rotary(q * 1, k * 1, *rotary_tables(4, DIM, 100.0, "cpu"), backend="cpu")
    found = torch.autograd.grad(sum(output.sum() for output in rotated), (q, k))
    expected = rotary(q, k, *rotary_tables(4, DIM, 100.0, "cpu"), backend="torch")
    assert_all_close(found, torch.autograd.grad(sum(output.sum() for output in expected), (q, k)))
