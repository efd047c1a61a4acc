"""Every compiled op against an exact answer: odd shapes, dtypes, alignments, strides; same bits for any threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from kernel_backends import COMPILED, on_cpu
from kernel_cases import CASES, Case, assert_as_good_as_reference

from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.dispatch import extension
from k2_megatron.kernels.gradient_norm import gradient_statistics
from k2_megatron.kernels.rms_norm import rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.swiglu import swiglu


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_the_references(case, backend):
    exact, reference = case.run("torch", exact=True), case.run("torch", device=backend)
    assert_as_good_as_reference(case.run(backend, device=backend), reference, exact, case)


# Large enough for every op to split its work over threads; those of 4 MiB an output also for stores past the caches.
THREADED = [
    Case("rms_norm", (517, 1000), options={"add": True}),
    Case("rms_norm", (700, 512), torch.bfloat16),
    Case("rms_norm", (513, 4096), torch.bfloat16, options={"add": True}),
    Case("swiglu", (300, 5504), torch.bfloat16),
    Case("swiglu", (1025, 2048), torch.bfloat16),
    Case("rotary", (256, 2, 8, 128), torch.bfloat16, options={"layout": "packed"}),
    Case("rotary", (1025, 2, 8, 128), torch.bfloat16, options={"rotary_dim": 64}),
    Case("rotary", (1025, 2, 8, 64), options={"interleaved": True}),
    Case("rotary", (1025, 2, 8, 128), torch.bfloat16),
    Case("rotary", (1025, 2, 8, 128), torch.bfloat16, options={"interleaved": True}),
    Case("cross_entropy", (200, 2, 4004), options={"label_smoothing": 0.1}),
    Case("cross_entropy", (3, 1, 160_000), torch.bfloat16),
    Case("cross_entropy", (129, 1, 16_384), torch.bfloat16),
]


@on_cpu
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_bits_do_not_depend_on_threads(case):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{case}: {name} differs between thread counts"


def rotate_what_is_not_finite(backend="cpu"):
    """{name: rotated q} of heads with a NaN, infinities and subnormals: the vector paths treat NaN apart."""
    found = {}
    for dtype, interleaved in product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        q = torch.randn(3, 1, 1, 128, generator=torch.Generator().manual_seed(1))
        q[0, 0, 0, 37], q[1, 0, 0, 100], q[2] = torch.nan, -torch.inf, q[2] * torch.finfo(dtype).tiny / 8
        tables = rotary_tables(3, 128, 10_000.0, "cpu")
        tables[1].view(torch.int32)[1, 5] = 0x7FFFFFFF  # a NaN that rounding to bf16 would carry into -0
        rotated, _ = rotary(q.to(dtype), q.to(dtype) * 1, *tables, interleaved=interleaved, backend=backend)
        found[f"{str(dtype)[6:]}, interleaved={interleaved}"] = rotated
    return found


def swiglu_of_what_is_extreme(backend="cpu"):
    """{dtype: (swiglu, its gradient)} where sigmoid is 0, 1 or NaN, whole steps and the rest of a row alike."""
    found = {}
    gates = torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0, 88.9, -88.9, 3e4, -3e4, torch.inf, -torch.inf, torch.nan])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = torch.cat([gates.repeat(4), torch.full((48,), -1.5)])[None].to(dtype).requires_grad_()
        out = swiglu(packed, backend=backend)
        (gradient,) = torch.autograd.grad(out, packed, torch.full_like(out, 0.75))
        found[str(dtype)[6:]] = torch.cat([out.detach(), gradient], dim=1)
    return found


def gradient_statistics_of_all_dtypes():
    """{dtype and size: (sum of squares and count, the tensor)}; odd sizes, several chunks, an infinity, subnormals."""
    found = {}
    for dtype, size in product((torch.float32, torch.bfloat16, torch.float16), (0, 5, 63, 97, 140_001)):
        values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        found[f"{str(dtype)[6:]} {size}"] = gradient_statistics([values], backend="cpu"), values
    values = torch.tensor([1e-41, 3e38, -3e38, torch.inf, 2.0] * 20, dtype=torch.bfloat16)
    found["not finite"] = gradient_statistics([values], backend="cpu"), values
    return found


RUN_ALL_CASES = """
import sys, torch
from test_kernel_accuracy import (CASES, THREADED, gradient_statistics_of_all_dtypes, rotate_what_is_not_finite,
                                  swiglu_of_what_is_extreme)
results = {
    str(case): {name: value.detach() for name, value in case.run("cpu").items()} for case in [*CASES, *THREADED]
}
results["rotate what is not finite"] = rotate_what_is_not_finite()
results["swiglu of what is extreme"] = swiglu_of_what_is_extreme()
results["gradient statistics"] = {name: found for name, (found, _) in gradient_statistics_of_all_dtypes().items()}
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def by_instruction_set(tmp_path_factory):
    """Results of all cases in each instruction set that this processor has, each in a process of its own."""
    sets, found = ("portable", "avx2", "avx512"), {}
    for name in sets[: sets.index(extension("cpu")[0].instruction_set) + 1]:
        path = str(tmp_path_factory.mktemp(name) / "results.pt")
        environment = os.environ | {"K2_CPU_INSTRUCTION_SET": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", RUN_ALL_CASES, path], env=environment, check=True)
        found[name] = torch.load(path)
    return found


@on_cpu
def test_every_instruction_set_is_as_exact_as_the_reference(by_instruction_set):
    for case in [*CASES, *THREADED]:
        exact, reference = case.run("torch", exact=True), case.run("torch")
        for name in by_instruction_set:
            assert_as_good_as_reference(by_instruction_set[name][str(case)], reference, exact, f"{name}: {case}")


@on_cpu
def test_every_instruction_set_keeps_nan_infinities_and_subnormals_apart(by_instruction_set):
    for name, expected in rotate_what_is_not_finite("torch").items():
        for instruction_set, results in by_instruction_set.items():
            found = results["rotate what is not finite"][name]
            assert torch.equal(found.isnan(), expected.isnan()), f"{instruction_set}: {name}"
            limits = torch.finfo(found.dtype)
            torch.testing.assert_close(found, expected, rtol=limits.eps, atol=limits.tiny * limits.eps, equal_nan=True)


@on_cpu
def test_every_instruction_set_has_the_same_limits_of_swiglu(by_instruction_set):
    for name, expected in swiglu_of_what_is_extreme("torch").items():
        for instruction_set, results in by_instruction_set.items():
            found = results["swiglu of what is extreme"][name]
            torch.testing.assert_close(
                found, expected, rtol=torch.finfo(found.dtype).eps, atol=1e-30, equal_nan=True,
                msg=lambda text, where=f"{instruction_set}, {name}": f"{where}: {text}",
            )  # fmt: skip


@on_cpu
def test_every_instruction_set_adds_all_squares(by_instruction_set):
    for name, (_, values) in gradient_statistics_of_all_dtypes().items():
        exact = math.fsum(float(value) ** 2 for value in values)
        for instruction_set, results in by_instruction_set.items():
            squares, count = results["gradient statistics"][name].tolist()
            assert squares == pytest.approx(exact, rel=1e-14), f"{instruction_set}: {name}"
            assert count == int((~values.isfinite()).sum())


@on_cpu
def test_avx2_and_avx512_give_the_same_bits(by_instruction_set):
    if "avx512" not in by_instruction_set:
        pytest.skip("this processor has no AVX-512")
    for case, tensors in by_instruction_set["avx512"].items():
        for name, value in tensors.items():
            other = by_instruction_set["avx2"][case][name]
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), f"{case}: {name} differs"


@pytest.mark.parametrize("backend", COMPILED)
def test_infinite_logits_are_masked_and_nan_shows(backend):
    """A column of -inf takes no part; a NaN logit makes its own row NaN and no other."""
    leaf = torch.randn(3, 9, device=backend)
    leaf[0, 4] = -torch.inf
    leaf[1, 2] = torch.nan
    leaf.requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf * 1, torch.tensor([0, 1, 2], device=backend), backend=backend)
    loss.sum().backward()
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    alone = torch.nn.functional.cross_entropy(leaf.detach()[:1, kept], torch.tensor([0], device=backend))
    torch.testing.assert_close(loss[0].detach(), alone, rtol=1e-6, atol=1e-6)
    assert leaf.grad[0, 4] == 0
    assert loss.isnan().tolist() == [False, True, False]
    assert leaf.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", COMPILED)
def test_the_maximum_may_stand_anywhere_in_a_row(backend, dtype):
    """Logits far below those that come later, far above, and after columns that are masked: nothing over- or
    underflows, in a row of several blocks."""
    columns = 2500
    leaf = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    slope = torch.linspace(0, 400, columns)
    leaf[0] += slope
    leaf[1] -= slope
    leaf[2] -= 150
    leaf[2, :1100] = -torch.inf
    leaf[3, 1300] = torch.inf
    leaf = leaf.to(backend, dtype).requires_grad_()
    labels = torch.tensor([5, 1200, 2000, 7], device=backend)
    loss = vocab_parallel_cross_entropy(leaf * 1, labels, backend=backend)
    loss[:3].sum().backward()
    wide = leaf.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide[:3], labels[:3], reduction="none")
    exact.sum().backward()
    rounding_of_lse = 2.0**-16  # half a unit in the last place of 400, a whole one of -142
    torch.testing.assert_close(loss[:3].detach().double(), exact.detach(), rtol=2e-7, atol=rounding_of_lse)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad[:3].double(), wide.grad[:3], rtol=rounding, atol=rounding_of_lse)
    assert loss[3].isnan()


@pytest.mark.parametrize("backend", COMPILED)
def test_ignored_rows_have_exactly_no_loss_and_no_gradient(backend):
    leaf = torch.full((2, 5), torch.nan, device=backend)
    leaf[1] = torch.arange(5.0)
    leaf.requires_grad_()
    labels = torch.tensor([-100, 3], device=backend)
    loss = vocab_parallel_cross_entropy(leaf * 1, labels, label_smoothing=0.1, z_loss=1e-3, backend=backend)
    loss.sum().backward()
    assert loss[0] == 0
    assert torch.equal(leaf.grad[0], torch.zeros(5, device=backend))
    assert leaf.grad[1].abs().sum() > 0


@pytest.mark.parametrize("backend", COMPILED)
def test_gradients_of_any_layout_are_taken(backend):
    """Autograd hands over an expanded gradient from sum(), a transposed one from a transposed use."""
    x = torch.randn(6, 4, 16, device=backend, requires_grad=True)
    weight = torch.randn(16, device=backend, requires_grad=True)
    factor = torch.randn(16, 4, 6, device=backend)
    for backend_name in ("torch", backend):
        y = rms_norm(x, weight, 1e-5, backend=backend_name)
        (y.permute(2, 1, 0) * factor).sum().backward()
        rms_norm(x, weight, 1e-5, backend=backend_name).sum().backward()
        if backend_name == "torch":
            expected, x.grad = x.grad, None
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
