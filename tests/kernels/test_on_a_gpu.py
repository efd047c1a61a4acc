"""What only a GPU can show: streams, graphs, tensors beyond 2^31 elements, several devices.

The bodies run on a CPU too, where a stream is nothing, a graph's replay a second call and an extent small: on a GPU it
is then the kernels that are tested, not these tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from kernel_backends import COMPILED
from test_kernel_registration import OPS, op_samples

from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.rms_norm import rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.swiglu import swiglu

NAMES = sorted(op_samples("cpu"))


def tensors_of(arguments) -> list[torch.Tensor]:
    return [
        tensor
        for argument in arguments
        for tensor in (argument if isinstance(argument, list) else [argument])
        if isinstance(tensor, torch.Tensor)
    ]


def apart(arguments):
    """The same arguments in memory of their own, without a graph."""

    def copy(value):
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    return tuple([copy(one) for one in value] if isinstance(value, list) else copy(value) for value in arguments)


def call(name: str, arguments) -> list[torch.Tensor]:
    """The op's results, and its arguments after it: what it returns and what it writes in place."""
    results = getattr(OPS, name).default(*arguments)
    return [*(results if isinstance(results, tuple) else [] if results is None else [results]), *tensors_of(arguments)]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_an_op_runs_on_the_current_stream(name, backend):
    """Its inputs come into being on that stream, late: a kernel on another one would find the NaN from before."""
    source = apart(op_samples(backend)[name])
    expected = call(name, apart(source))
    arguments = apart(source)
    for tensor in tensors_of(arguments):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -100)
    stream = contextlib.nullcontext()
    if backend == "cuda":
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        stream = torch.cuda.stream(side)
    with stream:
        if backend == "cuda":
            torch.cuda._sleep(100_000_000)  # 50 ms: longer than it takes to enqueue the rest
        for tensor, value in zip(tensors_of(arguments), tensors_of(source), strict=True):
            tensor.copy_(value)
        found = call(name, arguments)
    if backend == "cuda":
        side.synchronize()
    assert_same_bits(found, expected)


def captured(run: Callable[[], list[torch.Tensor]], backend: str) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """What starts `run` once more on the same memory, and where its results then lie."""
    if backend == "cpu":
        found = run()

        def again():
            for place, value in zip(found, run(), strict=True):
                place.copy_(value)

        return again, found
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what a first call sets up must not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_captured_in_a_graph_and_replayed(name, backend):
    source = apart(op_samples(backend)[name])
    expected = call(name, apart(source))
    arguments = apart(source)
    again, found = captured(lambda: call(name, arguments), backend)
    for tensor, value in zip(tensors_of(arguments), tensors_of(source), strict=True):
        tensor.copy_(value)  # the inputs as they were before the op wrote into some of them
    again()
    assert_same_bits(found, expected)


# By op: what one row (or token) of it holds, and how a tensor of so many rows is run.
def _rms_norm(x, backend):
    return rms_norm(x, torch.ones(x.shape[1], device=x.device, dtype=x.dtype), 1e-5, backend=backend)


def _swiglu(packed, backend):
    return swiglu(packed, backend=backend)


def _rotary(q, backend):
    heads = q.view(1, len(q), -1, 128)
    tables = rotary_tables(1, 128, 100.0, q.device)
    return rotary(heads, heads[:, :, :0], *tables, backend=backend)[0].view(len(q), -1)


def _cross_entropy(logits, backend):
    """The gradient, which takes the place of the logits."""
    loss = vocab_parallel_cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 7, backend=backend)
    return torch.autograd.grad(loss, logits, torch.ones_like(loss))[0]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("run", [_rms_norm, _swiglu, _rotary, _cross_entropy], ids=lambda run: run.__name__[1:])
def test_the_last_rows_of_a_tensor_of_more_than_2_to_the_31_elements(run, backend):
    columns, few = 8192, 14
    rows = (2**31 // columns if backend == "cuda" else 0) + 4 * few  # few: of labels that repeat with 7 the same ones
    rows -= rows % 7
    if backend == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of the GPU's memory")
    leaf = torch.randn(rows, columns, device=backend, dtype=torch.bfloat16)
    last = leaf[-few:].clone()
    wide, narrow = (_Computed.apply(tensor.requires_grad_()) for tensor in (leaf, last))
    found, expected = run(wide, backend)[-few:], run(narrow, backend)
    assert torch.equal(found, expected)
    assert math.isfinite(float(found.detach().float().abs().sum()))


class _Computed(torch.autograd.Function):
    """A leaf's memory as a result of something, without a copy: in-place ops refuse leaves."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_device_than_the_current_one(name):
    expected = call(name, apart(op_samples("cuda:0")[name]))
    arguments = apart(op_samples("cuda:1")[name])
    with torch.cuda.device(0):
        found = call(name, arguments)
        assert torch.cuda.current_device() == 0
    assert_same_bits([tensor.to("cuda:0") for tensor in found], expected)
