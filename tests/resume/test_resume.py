"""A run that was stopped goes on as if it had not been: to the bit in its own layout, within rounding in another; with
gradient leaves to the bit under any data-parallel size that they go with."""

import pytest
import resume_faults
import torch
from rank_processes import pretrain
from small_run import checkpoint_tensors, overrides

from k2_megatron.config import load_run_config
from k2_megatron.data.ledger import Ledger
from k2_megatron.plan.text import checkpoint_bytes
from k2_megatron.runtime.journal import read_events, read_steps
from k2_megatron.train.checkpoints.manifest import read_manifest

LAYOUTS = {
    "one": (1, {}),
    "tp2-pp2-sp": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}),
    "dp2-sharded": (2, {"parallel.data": 2, "parallel.distributed_optimizer": True}),
    "pp2-vp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "cp2-sharded": (2, {"parallel.context": 2, "parallel.distributed_optimizer": True}),
}
BFLOAT16 = {"train.precision": "bfloat16"}
LOSSES, GRADIENT_NORMS = 1e-5, 1e-4  # relative, between layouts: as in tests/layouts
MEASURED = {"event", "time", "ledger", "step_seconds", "data_seconds", "tokens_per_second", "model_flops_utilization"}


def told(run, first_step: int = 1) -> list[dict]:
    """The journal's steps from `first_step` on, without what a clock measured."""
    return [
        {key: value for key, value in event.items() if key not in MEASURED}
        for step, event in read_steps(run / "journal.jsonl").items()
        if step >= first_step
    ]


def events(run, kind: str) -> list[dict]:
    return [event for event in read_events(run / "journal.jsonl") if event["event"] == kind]


def chains(run) -> list[tuple[int, str]]:
    """(step, chain over all samples consumed) of every position in the ledger."""
    return [(entry["step"], entry["chain"]) for entry in Ledger(run).positions]


def unequal_tensors(expected_folder, found_folder) -> list[str]:
    """Names of the tensors that differ in a single bit, or that one of the two lacks."""
    expected, found = checkpoint_tensors(expected_folder), checkpoint_tensors(found_folder)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in expected)
    shared = expected.keys() & found.keys()
    return sorted(expected.keys() ^ found.keys()) + sorted(
        name for name in shared if not torch.equal(expected[name], found[name])
    )


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("tp2-pp2-sp", {}),
        ("pp2-vp2", {"checkpoint.asynchronous": True}),
        ("dp2-sharded", {}),
        ("dp2-sharded", BFLOAT16),
        ("one", BFLOAT16),
    ],
    ids=["tp2-pp2-sp", "pp2-vp2-asynchronous", "dp2-sharded", "dp2-sharded-bfloat16", "one-bfloat16"],
)
def test_resume_is_bitwise(whole_run, continued, layout, more):
    ranks, settings = LAYOUTS[layout][0], {**LAYOUTS[layout][1], **more}
    whole = whole_run(ranks, settings)
    assert all(0 <= event["data_seconds"] <= event["step_seconds"] for event in events(whole, "step")), "waits for rows"
    resumed = continued(whole, ranks, settings)
    (resume,) = events(resumed, "resume")
    assert (resume["step"], resume["doubts"], resume["next_sample"]) == (3, [], 24)
    assert len(told(resumed)) == 8
    assert told(resumed, 4) == told(whole, 4)
    assert events(resumed, "evaluation")[-1]["held_out_loss"] == events(whole, "evaluation")[-1]["held_out_loss"]
    last = "checkpoints/step_00000008"
    assert read_manifest(resumed / last)["weights"] == read_manifest(whole / last)["weights"]
    assert unequal_tensors(whole / last, resumed / last) == []


@pytest.mark.parametrize(("layout", "more"), [("tp2-pp2-sp", {}), ("one", BFLOAT16)], ids=["float32", "bfloat16"])
def test_a_checkpoint_holds_as_many_bytes_of_tensors_as_are_planned(whole_run, layout, more):
    whole = whole_run(LAYOUTS[layout][0], {**LAYOUTS[layout][1], **more})
    stored = checkpoint_tensors(whole / "checkpoints" / "step_00000008")
    assert sum(tensor.nbytes for tensor in stored.values()) == checkpoint_bytes(load_run_config(whole / "config.toml"))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2-pp2-sp", "one"),
        ("tp2-pp2-sp", "dp2-sharded"),
        ("tp2-pp2-sp", "pp2-vp2"),
        ("one", "tp2-pp2-sp"),
        ("dp2-sharded", "tp2-pp2-sp"),
        ("pp2-vp2", "cp2-sharded"),
        ("cp2-sharded", "tp2-pp2-sp"),
    ],
)
def test_five_steps_in_another_layout_stay_within_rounding(whole_run, continued, saved, loaded):
    whole = whole_run(*LAYOUTS[saved])
    resumed = continued(whole, *LAYOUTS[loaded])
    for expected, found in zip(told(whole, 4), told(resumed, 4), strict=True):
        rounded = {"loss": LOSSES, "highest_sample_loss": LOSSES, "grad_norm": GRADIENT_NORMS}
        for key, rounding in rounded.items():
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=rounding), key
        assert found == expected


WARM, THEN = 50, 20  # steps: until Adam's moments are those of many batches, and in another layout
LONGER = {
    **{"train.steps": WARM + THEN, "checkpoint.every_steps": WARM, "train.evaluate_every_steps": WARM + THEN},
    **{"model.hidden_size": 32, "model.ffn_hidden_size": 64},
}
# Losses of 3 to 5 are sums in float32, whose last bit is 2e-7 to 5e-7; the most that was seen in these layouts is
# 3e-7, and 1.4e-6 of the gradient norm
SUMMED_IN_ANOTHER_ORDER = 1e-6


@pytest.mark.parametrize(
    ("ranks", "settings", "rounding"),
    [
        (2, {"parallel.data": 2}, SUMMED_IN_ANOTHER_ORDER),
        (4, {"parallel.data": 4}, SUMMED_IN_ANOTHER_ORDER),
        (2, {"parallel.tensor": 2, "parallel.sequence": True}, SUMMED_IN_ANOTHER_ORDER),
        (4, {"parallel.tensor": 4}, SUMMED_IN_ANOTHER_ORDER),
        (2, {"parallel.pipeline": 2}, 0.0),  # adds up nothing in another order: the same to the bit
    ],
    ids=["dp2", "dp4", "tp2-sp", "tp4", "pp2"],
)
def test_twenty_steps_in_another_layout(whole_run, continued, ranks, settings, rounding):
    whole = whole_run(1, LONGER)
    resumed = continued(whole, ranks, {**LONGER, **settings}, after=WARM)
    for expected, found in zip(told(whole, WARM + 1), told(resumed, WARM + 1), strict=True):
        for key in ("loss", "highest_sample_loss"):
            assert abs(found[key] - expected[key]) <= rounding, (key, found["step"])
        assert abs(found["grad_norm"] / expected["grad_norm"] - 1) <= 10 * rounding, found["step"]
        assert found["samples"] == expected["samples"]
    assert len(told(resumed, WARM + 1)) == THEN
    assert chains(resumed)[-1] == chains(whole)[-1], "the same samples, in the same order"


# Of two micro-batches each
LEAVES = {"train.gradient_leaves": 4, "train.micro_batch": 1}


def test_other_data_sizes_are_bitwise_with_gradient_leaves(whole_run, continued):
    """DP 4 with a sharded optimizer, from step 4 on DP 2, from step 7 on one rank. Other layouts: tests/layouts."""
    whole = whole_run(1, LEAVES)
    run = whole_run(4, {"parallel.data": 4, "parallel.distributed_optimizer": True, **LEAVES})
    guard = resume_faults.sums_in_the_order_of_ranks_refused
    for ranks, after in ((2, 3), (1, 6)):
        run = continued(run, ranks, {"parallel.data": ranks, **LEAVES}, guard, after)
    layouts = [f"tp1-pp1-vp1-cp1-dp{data}" for data in (4, 2, 1)]
    assert [event["layout"] for event in events(run, "start")] == layouts
    assert told(run) == told(whole)
    held_out = [{event["held_out_loss"] for event in events(of, "evaluation")} for of in (whole, run)]
    assert held_out[1] == held_out[0]
    last = "checkpoints/step_00000008"
    assert read_manifest(run / last)["weights"] == read_manifest(whole / last)["weights"]
    assert unequal_tensors(whole / last, run / last) == []
    reasons = {change["key"]: change["reason"] for change in events(run, "resume")[0]["changes"]}
    assert "the same to the bit" in reasons["parallel.data"]


def test_other_data_sizes_are_not_bitwise_without(whole_run):
    one, two = (whole_run(*LAYOUTS[layout]) for layout in ("one", "dp2-sharded"))
    assert told(one) != told(two)
    assert unequal_tensors(one / "checkpoints/step_00000008", two / "checkpoints/step_00000008")


def test_finished_run_says_so_and_trains_no_further(whole_run, small_config, tmp_path):
    ranks, settings = LAYOUTS["one"]
    run = whole_run(ranks, settings)
    before = told(run)
    given = overrides({"train.steps": 8, "train.evaluate_every_steps": 4, **settings, "run.folder": run})
    (outcome,) = pretrain(ranks, small_config, given, tmp_path)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"finished: {run}" in outcome.stdout
    assert told(run) == before
    assert [event["event"] for event in read_events(run / "journal.jsonl")][-3:] == ["start", "resume", "stop"]
    kept = ["latest", "step_00000003", "step_00000006", "step_00000008"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize(
    "fault",
    [
        resume_faults.optimizer_not_restored,
        resume_faults.second_moment_not_restored,
        resume_faults.optimizer_step_not_restored,
        resume_faults.next_sample_is_the_first,
    ],
    ids=lambda fault: fault.__name__,
)
def test_comparison_sees_a_fault(whole_run, continued, fault):
    whole = whole_run(*LAYOUTS["one"])
    assert told(continued(whole, *LAYOUTS["one"], fault), 4) != told(whole, 4)
