"""A step whose loss or gradient norm is far from the usual is computed again before it is applied: a machine's passing
error leaves no trace, what the data does is applied, and what never comes again is not."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_processes import pretrain, results_of
from run_results import events_of, steps_of, stored_state

from k2_megatron.train import attempts as attempts_module
from k2_megatron.train.attempts import Attempts, settle
from k2_megatron.train.replica_gradients import Apart
from k2_megatron.train.spikes.ceiling import FEWEST, Ceiling, ceiling
from k2_megatron.train.spikes.detector import State
from k2_megatron.train.step import StepResult

STEPS = 21
SETTINGS = ["parallel.tensor=2", f"train.steps={STEPS}", "train.evaluate_every_steps=7", "checkpoint.every_steps=9"]
WEIGHT = "decoder.layers.2.self_attention.linear_qkv.weight"


def outcome(loss: float, grad_norm: float = 1.0, apart: Apart | None = None) -> StepResult:
    return StepResult(loss, grad_norm, False, 0.0, (), apart=apart)


def settled(results: list[StepResult], reruns: int, limit: Ceiling, monkeypatch) -> tuple[StepResult, float, int]:
    """What settle returns where attempts come to `results` in turn, in 30, 20 and 5 seconds; their number. Each but the
    first has a limit of its own."""
    clock, made, limits = [0.0], [], []
    monkeypatch.setattr(attempts_module.time, "monotonic", lambda: clock[0])

    def attempt(accept: Callable[[float, float, Apart | None], bool], compare: bool) -> StepResult:
        assert compare == bool(made), "replicas are compared when a step is made again"
        result = results[len(made)]
        clock[0] += (30.0, 20.0, 5.0)[len(made)]
        made.append(result)
        updated = result.finite and accept(result.loss, result.grad_norm, result.apart)
        return replace(result, updated=updated)

    def tell(_result: StepResult) -> None:
        clock[0] += 100.0

    result, seconds = settle(Attempts(limit, reruns), attempt, [], tell, lambda: limits.append(len(made)))
    assert limits == list(range(1, len(made)))
    return result, seconds, len(made)


LIMIT = Ceiling(20.0, 10.0)


@pytest.mark.parametrize(
    ("norms", "computations", "updated"),
    [
        ([1.0], 1, True),
        ([10.0], 1, True),
        ([11.0, 1.0], 2, True),  # the machine, once
        ([11.0, 11.0], 2, True),  # the data
        ([11.0, 11.05], 2, True),  # the data, added up in another order
        ([11.0, 12.0, 1.0], 3, True),
        ([11.0, 12.0, 11.0], 3, True),
        ([11.0, 12.0, 13.0], 3, False),  # never more than three
        ([math.inf, 11.0, 1.0], 3, True),
        ([11.0, math.nan, 1.0], 3, True),
        ([11.0, math.nan, math.nan], 3, False),
        ([math.inf, 11.0, math.nan], 3, False),
        ([math.inf, math.inf], 2, False),  # by the policy of what is not finite
    ],
)
def test_what_is_applied_after_how_many_computations(monkeypatch, norms, computations, updated):
    result, seconds, made = settled([outcome(2.0, norm) for norm in norms], 1, LIMIT, monkeypatch)
    assert (made, result.updated) == (computations, updated)
    assert seconds == (30.0, 20.0, 5.0)[made - 1], "of the attempt that is kept"


@pytest.mark.parametrize(
    ("loss", "norm", "apart", "expected"),
    [
        (2.0, 11.0, Apart({"rank 1": ["weight"]}, 2, 1.0), (3, False)),  # a machine's
        (2.0, 1.0, Apart({"rank 1": ["weight"]}, 2, 1.0), (3, True)),  # gone at the third
        (2.0, 11.0, Apart({"rank 1": ["weight"]}, None), (2, True)),  # rows of data
        (2.0, 11.0, Apart({"rank 1": ["weight"]}, 2, 10.9), (2, True)),  # the norm is high without it
        (21.0, 11.0, Apart({"rank 1": ["weight"]}, 2, 1.0), (2, True)),  # no gradient makes a loss
    ],
)
def test_what_a_machine_does_is_not_applied_because_it_comes_again(monkeypatch, loss, norm, apart, expected):
    results = [outcome(loss, 11.0), outcome(loss, 11.0, apart), outcome(loss, norm, apart)]
    result, _, made = settled(results, 1, LIMIT, monkeypatch)
    assert (made, result.updated) == expected


def test_the_loss_is_doubted_like_the_norm_and_reruns_are_counted(monkeypatch):
    assert settled([outcome(21.0), outcome(2.0)], 0, LIMIT, monkeypatch)[2] == 2
    assert settled([outcome(math.nan)] * 3, 0, LIMIT, monkeypatch)[2] == 1
    assert settled([outcome(math.nan)] * 3, 2, LIMIT, monkeypatch)[2] == 3


def test_ceiling_is_the_detectors_medians_and_none_without_them():
    losses, log_norms = (2.0,) * FEWEST, (math.log(0.5),) * (FEWEST - 1) + (math.log(1e9),)
    found = ceiling(State(losses=losses, log_norms=log_norms), 10.0)
    assert (found.loss, found.grad_norm) == (20.0, pytest.approx(5.0))
    assert ceiling(State(losses=losses[1:], log_norms=log_norms[1:]), 10.0) == Ceiling(), "too few values"
    spike = State(losses=losses, log_norms=log_norms, onset=30, trip=34)
    assert ceiling(spike, 10.0) == Ceiling(), "a spike that was called is known to be far off"


def _flip(rank: str, calls_spoiled: tuple[int, ...], leave_after: int | None = None) -> None:
    """The highest bit of an exponent flips in a gradient of the rank, in these computations, each time in another
    element; with it generators are drawn from, as a model with dropout would."""
    import k2_megatron.train.step as step
    import pretrain_k2
    from k2_megatron.train.model_chunks import named_parameters

    finalize, calls = step.finalize_model_grads, []

    def spoiled(model, *arguments, **keywords):
        calls.append(torch.rand(1))
        if len(calls) in calls_spoiled and os.environ["RANK"] == rank:
            gradient = dict(named_parameters(model))[WEIGHT].main_grad.view(-1)
            gradient.view(torch.int32)[50 * len(calls)] ^= 1 << 30
        finalize(model, *arguments, **keywords)

    step.finalize_model_grads = spoiled
    train = pretrain_k2.train
    if leave_after:
        pretrain_k2.train = lambda config, environment, device, until, given, ending: train(
            config, environment, device, leave_after, given, ending
        )


def run(small_config: Path, folder: Path, life: str, fault: Callable[[], None], *more: str) -> list:
    return pretrain(2, small_config, [*SETTINGS, f"run.folder={folder}", *more], folder.with_name(life), fault=fault)


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    results_of(run(small_config, folder, "output", partial(_flip, "1", ())))
    return folder


def test_flipped_exponent_leaves_no_trace_and_is_named(small_config, tmp_path, whole):
    """In the first step after a resume: the medians have come with the checkpoint. And in two computations of one."""
    folder = tmp_path / "run"
    results_of(run(small_config, folder, "first", partial(_flip, "1", (), FEWEST + 1)))
    ended = run(small_config, folder, "second", partial(_flip, "1", (1, 3, 4)))
    results_of(ended)
    assert steps_of(folder) == steps_of(whole)
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)
    told = [(event["kind"], event["step"]) for event in events_of(folder, "incident")]
    first, second = FEWEST + 2, FEWEST + 3
    assert told == [
        *[("in doubt", first), ("computed wrongly", first)],
        *[("in doubt", second)] * 2,
        *[("computed wrongly", second)] * 2,
    ]
    wrong = [event for event in events_of(folder, "incident") if event["kind"] == "computed wrongly"]
    place = "rank 1 (tensor 1, pipeline 0, context 0, data 0)"
    assert [event["ranks"] for event in wrong] == [{place: [WEIGHT]}] * 3
    assert min(event["grad_norm"] for event in wrong) > 1e6
    assert (
        f"step {first} was computed wrongly, made again and taken: gradients of {WEIGHT} on {place}" in ended[0].stdout
    )


def test_flips_that_never_come_again_stop_the_run_with_rank_and_layer(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    ended = run(small_config, folder, "output", partial(_flip, "1", (18, 19, 20)))
    assert [rank.exit_code for rank in ended] == [3, 3]
    said = "".join(rank.stderr for rank in ended)
    assert "step 18: 3 computations" in said
    assert f"{WEIGHT} on rank 1 (tensor 1, pipeline 0, context 0, data 0)" in said
    steps = steps_of(whole)
    assert steps_of(folder) == {number: steps[number] for number in range(1, 18)}
    results_of(run(small_config, folder, "again", partial(_flip, "1", ())))
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)


def _large_row(step: int) -> None:
    """The data of a step does it: its gradient is as large in each computation."""
    import k2_megatron.train.step as module

    squares, train_step, steps = module.gradient_squares, module.train_step, []
    import pretrain_k2

    def noted(config, parts, feed, step, **more):
        steps.append(step + 1)
        return train_step(config, parts, feed, step, **more)

    pretrain_k2.train_step = noted
    module.gradient_squares = lambda *arguments: squares(*arguments) * (400.0 if steps[-1] == step else 1.0)


def test_what_comes_again_is_the_datas_and_is_applied(small_config, tmp_path):
    folders = [tmp_path / "asked", tmp_path / "off"]
    for folder, more in zip(folders, ([], ["spikes.suspect_factor=1e30"]), strict=True):
        results_of(run(small_config, folder, f"{folder.name}_output", partial(_large_row, 18), *more))
    assert steps_of(folders[0]) == steps_of(folders[1])
    assert stored_state(folders[0], STEPS) == stored_state(folders[1], STEPS)
    told = [(event["kind"], event["step"]) for event in events_of(folders[0], "incident")]
    assert told == [("in doubt", 18), ("came again", 18)]
    assert events_of(folders[0], "incident")[1]["equal_to_the_bit"] is True
    assert events_of(folders[1], "incident") == []


def _weight_is_lost() -> None:
    """Rank 1 computes step 3, and it again, with a weight that is not a number."""
    import k2_megatron.train.step as step
    from k2_megatron.train.model_chunks import named_parameters

    run_schedule, calls = step._run_schedule, []

    def spoiled(config, parts, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            dict(named_parameters(parts.chunks))[WEIGHT].detach().view(-1)[7] = math.nan
        return run_schedule(config, parts, *arguments, **keywords)

    step._run_schedule = spoiled


def test_weight_that_is_lost_in_one_replica_is_named_when_the_step_is_made_again(small_config, tmp_path):
    folder = tmp_path / "run"
    more = ["parallel.tensor=1", "parallel.data=2", "parallel.distributed_optimizer=true"]
    ended = run(small_config, folder, "output", _weight_is_lost, *more)
    assert [rank.exit_code for rank in ended] == [3, 3]
    assert [(event["kind"], event["step"]) for event in events_of(folder, "incident")] == [
        ("not finite", 3),
        ("replicas differ", 3),
    ]
    replicas = [f"rank {rank} (tensor 0, pipeline 0, context 0, data {rank}) in {WEIGHT}" for rank in range(2)]
    assert "; ".join(replicas) in "".join(rank.stderr for rank in ended)
    assert list(steps_of(folder)) == [1, 2], "nothing of it was applied"
