"""A second stage from a first one's weights: another RoPE base, another length, data and schedule of its own."""

import shutil
from pathlib import Path

import pytest
import torch
from one_rank_model import llama_with_weights_of, one_rank
from rank_processes import Rank, pretrain, results_of
from small_run import checkpoint_tensors, overrides
from test_resume import events, told, unequal_tensors

from k2_megatron.train.checkpoints.load import load_weights
from k2_megatron.train.checkpoints.manifest import read_manifest
from k2_megatron.train.run_data import open_run_data

STAGE_1 = {"model.init_std": 0.2}  # weights so large that attention heeds positions after a few steps already
STAGE_2 = {"model.rope_base": 500000.0, "model.sequence_length": 64, "train.steps": 4, "run.seed": 8}
STAGE_2 |= {"checkpoint.every_steps": 2, "train.evaluate_every_steps": 4, "parallel.pipeline": 2}
TOLERANCE = 1e-6  # float32, another order of summation


def stage_2(config: Path, folder: Path, source: Path, more: dict[str, object]) -> Path:
    given = overrides({**STAGE_2, "run.folder": folder / "run", "checkpoint.start_from": source, **more})
    results_of(pretrain(2, config, given, folder / "output"))
    return folder / "run"


@pytest.fixture(scope="module")
def source(whole_run) -> Path:
    return whole_run(1, STAGE_1) / "checkpoints" / "step_00000008"


@pytest.fixture(scope="module")
def fresh(small_config, source, tmp_path_factory) -> Path:
    """A second stage, started from a run folder, with moments of zero."""
    return stage_2(small_config, tmp_path_factory.mktemp("fresh"), source.parents[1], {})


@pytest.fixture(scope="module")
def kept(small_config, source, tmp_path_factory) -> Path:
    """A second stage, started from one checkpoint, with its moments."""
    return stage_2(small_config, tmp_path_factory.mktemp("kept"), source, {"checkpoint.start_optimizer": "kept"})


def loss_of_llama(config_path: Path, settings: list[str], checkpoint: Path) -> float:
    """The mean loss of the second stage's first batch, by transformers' Llama with the first stage's weights."""
    with one_rank(config_path, settings) as (config, _groups, _kernels, model):
        load_weights(checkpoint, [model], torch.device("cpu"))
        tokens = torch.from_numpy(open_run_data(config).train.tokens(0, 8)).long()
        logits = llama_with_weights_of(model, config)(tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


def test_first_loss_is_that_of_the_first_stages_weights_under_the_new_base(fresh, kept, small_config, source, tmp_path):
    given = overrides({**STAGE_2, "parallel.pipeline": 1, "run.folder": tmp_path / "none"})
    expected = Rank(loss_of_llama, (small_config, given, source), {}, tmp_path / "llama").finish()
    assert expected.exit_code == 0, expected.stderr
    for run in (fresh, kept):
        first = told(run)[0]
        assert first["loss"] == pytest.approx(expected.result, rel=TOLERANCE)
        assert (first["step"], first["samples"]) == (1, [0, 8])
    old_base = overrides({**STAGE_2, "parallel.pipeline": 1, "run.folder": tmp_path / "none", "model.rope_base": 1e4})
    other = Rank(loss_of_llama, (small_config, old_base, source), {}, tmp_path / "other").finish()
    assert other.result != pytest.approx(expected.result, rel=1e-4), "the comparison would see the old base"


def test_moments_are_fresh_or_kept(fresh, kept, source):
    """After two steps Adam has made two updates, or ten; its moments differ from each other."""
    manifests = [read_manifest(run / "checkpoints" / "step_00000002") for run in (fresh, kept)]
    assert [manifest["optimizer_step"] for manifest in manifests] == [2, 10]
    assert [manifest["origin"]["optimizer"] for manifest in manifests] == ["fresh", "kept"]
    assert {manifest["origin"]["weights"] for manifest in manifests} == {read_manifest(source)["weights"]}
    assert told(fresh)[0]["loss"] == told(kept)[0]["loss"]
    assert told(fresh)[1]["loss"] != told(kept)[1]["loss"]
    first, second = (checkpoint_tensors(run / "checkpoints" / "step_00000002") for run in (fresh, kept))
    name = "optimizer.state.exp_avg_sq.output_layer.weight"
    before = checkpoint_tensors(source)[name]
    assert (second[name] >= before * 0.95**2 * (1 - 1e-6)).all(), "what was there decays, and squares are added"
    assert not (first[name] >= before * 0.95**2 * (1 - 1e-6)).all()


def test_fresh_moments_are_those_of_a_run_that_begins(fresh, small_config, source, tmp_path):
    """Zeroed moments and a count of zero make the first update Adam's first: all of one size, the learning rate."""
    given = {**STAGE_2, "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0.0, "train.steps": 1}
    given |= {"checkpoint.every_steps": 1, "train.evaluate_every_steps": 1, "optimizer.schedule": "constant"}
    run = stage_2(small_config, tmp_path, source, {**given, "optimizer.min_learning_rate": ""})
    name = "output_layer.weight"
    after = checkpoint_tensors(run / "checkpoints" / "step_00000001")
    update = (after[name] - checkpoint_tensors(source)[name]).abs()
    moving = after["optimizer.state.exp_avg_sq." + name].sqrt() > 1e-4  # far above epsilon
    assert moving.any()
    assert torch.allclose(update[moving], torch.tensor(3e-3), rtol=1e-2)


@pytest.mark.parametrize("begun", ["fresh", "kept"])
def test_resume_of_a_second_stage_is_bitwise(begun, request, small_config, tmp_path):
    """Without its source, which is read at the beginning alone."""
    whole = request.getfixturevalue(begun)
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    (copy / "checkpoints" / "latest").write_text("step_00000002\n")
    more = {"run.folder": copy, "checkpoint.start_optimizer": begun}
    stage_2(small_config, tmp_path, tmp_path / "gone", more)
    assert [event["step"] for event in events(copy, "resume")] == [2]
    assert len(events(copy, "start_from")) == 1
    assert told(copy) == told(whole)
    last = "checkpoints/step_00000004"
    assert unequal_tensors(whole / last, copy / last) == []
    assert read_manifest(copy / last)["origin"] == read_manifest(whole / last)["origin"]
