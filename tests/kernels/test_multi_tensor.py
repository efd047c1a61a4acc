"""AdamW, the gradient norm and clipping over lists of tensors: against the exact answer and torch's own."""

from __future__ import annotations

import io
import math
from copy import deepcopy

import pytest
import torch
from kernel_backends import COMPILED, on_cpu
from kernel_cases import assert_as_good_as_reference

from k2_megatron.kernels.adamw import STEP, AdamW, adamw_reference_
from k2_megatron.kernels.gradient_norm import clip_gradients_, gradient_norm_squared, gradient_statistics

SIZES = [(1,), (0,), (7,), (33, 3), (4099,), (2, 3, 5)]
OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NUMBERS = (3e-2, 0.9, 0.95, 1e-6, 0.1, 3)


def start(backend, device="cpu", dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(2)
    parameters = [torch.randn(*size, generator=generator).to(device, dtype) for size in sizes]
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}]
    return parameters, AdamW(groups, backend=backend, **OPTIONS), generator


def advance(parameters, optimizer, generator, steps=4, **options):
    """Some steps; the learning rate changes on the way, as a schedule's does."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] / (1 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step(**options)


def run_adamw(backend, device="cpu", dtype=torch.float32, scale=None, sizes=SIZES):
    parameters, optimizer, generator = start(backend, device, dtype, sizes)
    factor = None if scale is None else torch.tensor([scale], device=device)
    advance(parameters, optimizer, generator, gradient_scale=factor)
    results = {f"parameter{index}": parameter for index, parameter in enumerate(parameters)}
    for index, parameter in enumerate(parameters):
        results |= {f"{key}{index}": value for key, value in optimizer.state[parameter].items()}
    return results


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_adamw_is_as_exact_as_the_reference(backend, scale):
    exact = run_adamw("torch", dtype=torch.float64, scale=scale)
    reference = run_adamw("torch", device=backend, scale=scale)
    assert_as_good_as_reference(run_adamw(backend, backend, scale=scale), reference, exact, f"adamw, scale {scale}")


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_adamw_steps_like_torchs(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    parameters, optimizer, generator = start(backend, device)
    others = [parameter.clone() for parameter in parameters]
    theirs = torch.optim.AdamW([{"params": others[:3]}, {"params": others[3:], "weight_decay": 0.0}], **OPTIONS)
    for _ in range(3):
        for one, other in zip(parameters, others, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(device)
            other.grad = one.grad.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(parameters, others, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_takes_low_precision_gradients_and_writes_rounded_copies(backend, dtype):
    def lists():
        generator = torch.Generator().manual_seed(4)
        p, g, m = ([torch.randn(size, generator=generator).to(backend) for size in SIZES] for _ in range(3))
        v = [torch.rand(size, generator=generator).to(backend) for size in SIZES]
        return p, [gradient.to(dtype) for gradient in g], m, v, [torch.empty_like(x, dtype=dtype) for x in p]

    expected, found = lists(), lists()
    adamw_reference_(*expected, None, *NUMBERS)
    STEP(*found, None, *NUMBERS)
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(copy, parameter.to(dtype)) for copy, parameter in zip(found[4], found[0], strict=True))


@pytest.mark.parametrize("backend", ["torch", COMPILED[0]])
def test_model_copies_follow_their_parameters(backend):
    parameters, optimizer, generator = start(backend)
    optimizer.model_copies[parameters[3]] = torch.zeros_like(parameters[3], dtype=torch.bfloat16)
    advance(parameters, optimizer, generator, steps=1)
    assert torch.equal(optimizer.model_copies[parameters[3]], parameters[3].to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_where_a_shard_begins_changes_no_bit(backend):
    """Each data-parallel size cuts the distributed optimizer's parameters elsewhere: an element in the body of a vector
    loop comes to be in its tail, at another alignment."""
    device = "cuda" if backend == "cuda" else "cpu"
    generator, size = torch.Generator().manual_seed(3), 1000
    columns = [torch.randn(size, generator=generator) for _ in range(3)]
    columns.append(torch.rand(size, generator=generator))
    factor = torch.tensor([0.37], device=device)

    def updated(cuts: list[int]) -> torch.Tensor:
        lists = [[piece.clone().to(device) for piece in torch.tensor_split(column, cuts)] for column in columns]
        copies = [torch.empty_like(piece, dtype=torch.bfloat16) for piece in lists[0]]
        step = adamw_reference_ if backend == "torch" else STEP
        step(*lists, copies, factor, *NUMBERS)
        return torch.stack([torch.cat([piece.float() for piece in column]) for column in (*lists, copies)])

    whole = updated([])
    for first in range(1, 70):
        assert torch.equal(updated([first, 500 + first]), whole), first


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_what_is_overwritten_in_place_is_no_longer_good_for_a_backward(backend):
    """Autograd counts the writes to a tensor; kernels that are given its address have to tell."""
    device = "cuda" if backend == "cuda" else "cpu"
    parameter, model = (torch.nn.Parameter(torch.ones(3, device=device, dtype=dtype)) for dtype in
                        (torch.float32, torch.bfloat16))  # fmt: skip
    losses = [parameter.square().sum(), model.square().sum()]
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW([parameter], backend=backend)
    optimizer.model_copies[parameter] = model.detach()
    optimizer.step()
    gradient = torch.ones(3, device=device) * 1
    losses.append((torch.ones(3, device=device, requires_grad=True) * gradient).sum())
    clip_gradients_([gradient], torch.tensor(2.0, device=device), 1.0, backend=backend)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_step_lives_in_the_group_and_state_survives_a_round_trip():
    """megatron-core's distributed optimizer treats us as Apex: int step in each group, two fp32 moments a parameter."""
    parameters, optimizer, generator = start("torch")
    advance(parameters, optimizer, generator, steps=2)
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    assert all(set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"} for parameter in parameters)
    copies, resumed, _ = start("torch")
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.copy_(parameter)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    again = torch.Generator().manual_seed(9)
    advance(copies, resumed, again, steps=1)
    again.manual_seed(9)
    advance(parameters, optimizer, again, steps=1)
    assert all(torch.equal(copy, parameter) for copy, parameter in zip(copies, parameters, strict=True))
    assert resumed.param_groups[0]["step"] == 3


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@on_cpu
@pytest.mark.parametrize("copied", [deepcopy, saved_and_loaded])
def test_a_copied_optimizer_steps_like_the_original(copied):
    """With its backend and its scale, into model copies of its own, under its own parameters."""
    parameters, optimizer, generator = start("cpu")
    optimizer.model_copies[parameters[3]] = torch.zeros_like(parameters[3], dtype=torch.bfloat16)
    optimizer.gradient_scale = torch.tensor([0.5])
    advance(parameters, optimizer, generator, steps=2)
    other = copied(optimizer)
    assert other.backend == "cpu"
    theirs = [parameter for group in other.param_groups for parameter in group["params"]]
    before = [parameter.clone() for parameter in parameters]
    advance(theirs, other, torch.Generator().manual_seed(9), steps=1)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    advance(parameters, optimizer, torch.Generator().manual_seed(9), steps=1)
    assert all(torch.equal(one, two) for one, two in zip(theirs, parameters, strict=True))
    ((key, value),) = other.model_copies.items()
    assert key is theirs[3]
    assert value is not optimizer.model_copies[parameters[3]]
    assert torch.equal(value, theirs[3].to(torch.bfloat16))


def test_a_state_of_torchs_goes_on_at_its_step():
    """torch keeps `step` a parameter; ours would begin at 1, and correct a bias that is long gone."""
    parameters, optimizer, generator = start("torch")
    theirs_of = [parameter.clone() for parameter in parameters]
    theirs = torch.optim.AdamW([{"params": theirs_of[:3]}, {"params": theirs_of[3:], "weight_decay": 0.0}], **OPTIONS)
    advance(theirs_of, theirs, generator, steps=30)
    for one, other in zip(parameters, theirs_of, strict=True):
        one.copy_(other)
    saved = deepcopy(theirs.state_dict())
    optimizer.load_state_dict(saved)
    assert "step" in saved["state"][0], "what it was given has changed"
    assert [group["step"] for group in optimizer.param_groups] == [30, 30]
    assert all(set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"} for parameter in parameters)
    for kind in ((parameters, optimizer), (theirs_of, theirs)):
        advance(*kind, torch.Generator().manual_seed(9), steps=1)
    torch.testing.assert_close(parameters, theirs_of, rtol=1e-6, atol=1e-6)


def test_a_state_whose_steps_differ_is_refused_and_nothing_taken_of_it():
    parameters, optimizer, generator = start("torch")
    theirs = torch.optim.AdamW(parameters, **OPTIONS)
    advance(parameters, theirs, generator, steps=2)
    parameters[1].grad = None
    theirs.step()
    optimizer = AdamW(parameters, **OPTIONS)
    with pytest.raises(ValueError, match=r"adamw: .* parameters of group 0 are at steps \[2, 3\]; a group has one"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


def test_parameters_without_gradient_stay():
    parameters, optimizer, _ = start("torch")
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_norm_is_exact_and_clipping_reaches_the_maximum(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    tensors = [torch.randn(size).to(device) for size in SIZES] + [torch.randn(100).to(device, torch.bfloat16)]
    exact = math.fsum(float(tensor.double().square().sum()) for tensor in tensors)
    squared = gradient_norm_squared(tensors, backend=backend)
    assert float(squared) == pytest.approx(exact, rel=1e-12)
    expected = [tensor.double() * 2.0 / (math.sqrt(exact) + 1e-6) for tensor in tensors]
    clip_gradients_(tensors, squared.sqrt(), 2.0, backend=backend)
    for tensor, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=2 * torch.finfo(tensor.dtype).eps, atol=0)
    before = [tensor.clone() for tensor in tensors]
    assert clip_gradients_(tensors, gradient_norm_squared(tensors, backend=backend).sqrt(), 9.0, backend=backend) == 1
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_what_is_not_finite_is_counted(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    bad = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf], device=device)
    squares, count = gradient_statistics([torch.ones(3, device=device), bad], backend=backend).tolist()
    assert math.isnan(squares)
    assert count == 3


@on_cpu
def test_bits_do_not_depend_on_threads():
    sizes = [(300_000,), (3,), (70_001,), (64, 1024)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = run_adamw("cpu", sizes=sizes)
            found["norm"] = gradient_norm_squared(list(found.values()), backend="cpu")
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())
