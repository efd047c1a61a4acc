"""A gradient that is not finite on one rank changes nothing on any."""

import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from rank_processes import pretrain, results_of, run_ranks
from run_results import differences, events_of, steps_of
from small_run import checkpoint_tensors, overrides

import k2_megatron.train.step as step_module
from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoints.state import weight_fingerprint
from k2_megatron.train.not_finite import in_vain
from k2_megatron.train.optimizer import build_optimizer, set_learning_rate, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.step import StepResult, finalize_model_grads, train_step


def steps_around_a_bad_gradient(
    config_path: Path, settings: list[str], after_the_sum: float | None
) -> tuple[list[StepResult], list[str]]:
    """Results of a good, a bad and a good step; fingerprints of the weights before and after each. The bad gradient of
    rank 0 is NaN before the data-parallel sum, or `after_the_sum` in one place after it."""
    environment = read_environment()
    config = load_config(config_path, settings, world_size=environment.world_size)
    device = find_device(environment.local_rank).torch
    with cpu_stands_in_for_cuda("cpu"):
        connect(environment, find_device(0), 60.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        data = open_run_data(config)
        kernels = dict.fromkeys(OPS, "torch")
        chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        parts = Parts(groups, chunks, optimizer, device)
        weights, results = [weight_fingerprint(chunks, device)], []
        for step in range(3):
            set_learning_rate(optimizer, 1e-3, 0.1)
            spoiling, step_module.finalize_model_grads = None, finalize_model_grads
            bad = step == 1 and groups.rank == 0  # of the first stage: the loss stays finite, on the last one
            if bad and after_the_sum is None:
                parameter = next(chunks[0].parameters())
                spoiling = parameter.register_hook(lambda gradient: gradient.clone().fill_(float("nan")))
            if bad and after_the_sum is not None:

                def finalize(model, *arguments, **keywords):
                    finalize_model_grads(model, *arguments, **keywords)
                    next(model[0].parameters()).main_grad.view(-1)[3] = after_the_sum

                step_module.finalize_model_grads = finalize
            results.append(train_step(config, parts, data.train, min(step, 1)))
            if spoiling is not None:
                spoiling.remove()
            weights.append(weight_fingerprint(chunks, device))
        disconnect()
    return results, weights


def test_bad_gradient_on_one_rank_changes_nothing_on_any(small_config, tmp_path):
    arguments = (small_config, overrides({"parallel.pipeline": 2}), None)
    first, second = results_of(run_ranks(steps_around_a_bad_gradient, 2, arguments, tmp_path))
    results, weights = first
    assert [result.updated for result in results] == [True, False, True]
    assert [result.updated for result in second[0]] == [True, False, True]
    assert results[1].grad_norm == second[0][1].grad_norm == math.inf
    assert weights[1] == weights[2]
    assert len({*weights}) == 3
    assert (results[2].loss, second[0][2].loss) == (results[1].loss, results[1].loss), (
        "the same batch, the same weights"
    )


@pytest.mark.parametrize("value", [math.nan, 1e10])
def test_gradient_that_goes_bad_in_one_replica_alone_is_judged_alike_by_all(small_config, tmp_path, value):
    """After the data-parallel sum a replica is alone with it; ranks that judge for themselves would wait for ever."""
    arguments = (small_config, overrides({"parallel.data": 2}), value)
    (first, _), (second, _) = results_of(run_ranks(steps_around_a_bad_gradient, 2, arguments, tmp_path))
    assert [result.updated for result in first] == [result.updated for result in second]
    assert [result.grad_norm for result in first] == [result.grad_norm for result in second]
    assert first[1].updated == math.isfinite(value)
    assert first[1].grad_norm > 1e9


def _spoil(calls_spoiled: tuple[int, ...], rank: str = "3") -> None:
    """A gradient of the rank is infinite in these steps, before any sum over ranks."""
    finalize, calls = step_module.finalize_model_grads, []

    def spoiled(model, *arguments, **keywords):
        calls.append(1)
        if len(calls) in calls_spoiled and os.environ["RANK"] == rank:
            next(model[0].parameters()).main_grad.view(-1)[3] = math.inf
        finalize(model, *arguments, **keywords)

    step_module.finalize_model_grads = spoiled


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (["parallel.tensor=2", "parallel.pipeline=2"], "rank 3 (tensor 1, pipeline 1, context 0, data 0)"),
        (
            ["parallel.tensor=2", "parallel.data=2", "parallel.distributed_optimizer=true"],
            "rank 3 (tensor 1, pipeline 0, context 0, data 1)",
        ),
    ],
    ids=["tp2-pp2", "tp2-dp2-sharded"],
)
def test_policy_of_skipping_one_and_then_stopping_on_four_ranks(small_config, tmp_path, layout, named):
    """Step 2 is passed over; of steps 4 and 5 the second is one too many."""
    folder = tmp_path / "run"
    policy = ["spikes.not_finite_steps=1", "spikes.not_finite_reruns=0", "train.steps=6", "checkpoint.every_steps=3"]
    settings = [*layout, *policy, "train.evaluate_every_steps=6", f"run.folder={folder}"]
    outcomes = pretrain(4, small_config, settings, tmp_path / "output", partial(_spoil, (2, 4, 5)))
    assert [outcome.exit_code for outcome in outcomes] == [5] * 4, outcomes[3].stderr
    incidents = events_of(folder, "incident")
    assert [incident["step"] for incident in incidents] == [2, 4, 5]
    assert [incident["samples"] for incident in incidents] == [[8, 16], [24, 32], [32, 40]]
    for incident in incidents:
        assert named in incident["ranks"], incident["ranks"]
        assert all(rank.startswith(("rank 1 ", "rank 3 ")) for rank in incident["ranks"]), incident["ranks"]
        if "pipeline 1" in named:
            first = incident["ranks"][named][0]
            assert first.startswith("decoder.layers.2."), "layers are counted over the whole model"
    assert list(steps_of(folder)) == [1, 3]
    assert "; the last save was step 3" in "".join(outcome.stderr for outcome in outcomes)


def test_step_in_vain_is_counted_over_starts_however_long_the_journal_is(tmp_path):
    """As K2-65B's: 480 ranks are named, and 900 steps repeated since the save."""
    ranks = {f"rank {rank} (tensor 0, pipeline 0)": [f"decoder.layers.{n}.mlp.weight" for n in range(8)]
             for rank in range(480)}  # fmt: skip
    journal = Journal(tmp_path, writer=True)

    def life(first: int, last: int, *bad: int, save: int = 0) -> tuple[int, int]:
        journal.write("start")
        for step in range(first, last + 1):
            journal.write("step", step=step, layers={"gradient_norm": [0.123456] * 80})
        for step in bad:
            journal.write("incident", kind="not finite", step=step, loss=math.nan, ranks=ranks)
        if save:
            journal.write("checkpoint", step=save)
        return in_vain(journal.path)

    assert life(1, 100, save=100) == (0, 0)
    assert life(101, 999, 1000) == (1000, 1)
    assert life(101, 600, save=600) == (1000, 1), "a start that was ended before it does not forget"
    assert life(601, 999, 1000) == (1000, 2)
    assert life(601, 1000) == (0, 0), "it passed"
    assert life(1001, 1001, 1002, 1002) == (1002, 2)
    assert life(1001, 1001, 1003) == (1003, 1)
    journal.close()


@pytest.mark.parametrize(
    "layout", [["parallel.distributed_optimizer=true"], ["train.precision=bfloat16"]], ids=["sharded", "replicated"]
)
def test_save_before_any_update_holds_moments_of_zeros_and_is_resumed(small_config, tmp_path, layout):
    """The first two steps are passed over, and saved; what is trained from there is what the run that went on did."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    policy = ["spikes.not_finite_steps=2", "spikes.not_finite_reruns=0", "train.steps=4", "checkpoint.every_steps=2"]
    settings = ["parallel.data=2", *layout, *policy, "train.compare_replicas_every_steps=1"]
    fault = partial(_spoil, (1, 2), "1")
    results_of(pretrain(2, small_config, [*settings, f"run.folder={whole}"], tmp_path / "first", fault))
    assert sorted(steps_of(whole)) == [3, 4]
    saved = checkpoint_tensors(whole / "checkpoints" / "step_00000002")
    moments = [tensor for name, tensor in saved.items() if name.startswith("optimizer.state.exp_avg")]
    assert len(moments) == 2 * sum(name.startswith("optimizer.state.param.") for name in saved) > 0
    assert not any(moment.any() for moment in moments)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    results_of(pretrain(2, small_config, [*settings, f"run.folder={resumed}"], tmp_path / "second"))
    assert events_of(resumed, "resume")[0]["step"] == 2
    assert differences(whole, resumed, 4) == []
