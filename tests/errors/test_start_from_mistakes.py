"""A run that cannot begin from the checkpoint it names says so before it begins."""

import json
import os
import shutil
from pathlib import Path

import pytest
from endings import MISTAKE, says_one_line
from rank_processes import Rank, run_pretrain
from small_run import overrides

KEY = "checkpoint.start_from"


def test_no_such_folder(attempt, tmp_path):
    outcomes = attempt({KEY: tmp_path / "none"})
    says_one_line(outcomes, MISTAKE, f"{KEY} = '{tmp_path}/none': there is no such folder; name a step_* folder")
    assert not (tmp_path / "run").exists()


def test_folder_without_a_checkpoint(attempt, tmp_path):
    (tmp_path / "empty").mkdir()
    says_one_line(attempt({KEY: tmp_path / "empty"}), MISTAKE, f"'{tmp_path}/empty' holds no checkpoint; name a step_*")


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_another_shape_or_precision(attempt, finished_run, ranks):
    settings = {"model.vocab_size": 260, "model.kv_heads": 2, "train.precision": "bfloat16"}
    outcomes = attempt({KEY: finished_run, **settings, **({"parallel.tensor": 2} if ranks == 2 else {})}, ranks=ranks)
    says_one_line(
        outcomes,
        MISTAKE,
        f"{finished_run}/checkpoints/step_00000006 does not fit this configuration: ",
        "model.vocab_size is 256 there and 260 here",
        "model.kv_heads is 4 there and 2 here",
        "train.precision is 'float32' there and 'bfloat16' here",
    )


def test_weights_under_other_names(attempt, finished_run):
    outcomes = attempt({KEY: finished_run, "model.implementation": "transformer_engine"})
    says_one_line(outcomes, MISTAKE, "model.implementation is 'k2' there and 'transformer_engine' here")


def test_damaged_source_is_named_and_left_where_it_is(attempt, finished_run, tmp_path):
    source = Path(shutil.copytree(finished_run / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    with (source / "__0_0.distcp").open("r+b") as stream:
        stream.truncate(1000)
    says_one_line(
        attempt({KEY: source}), MISTAKE, f"{source} is damaged (", "has 1000 bytes", "name another checkpoint"
    )
    assert source.is_dir(), "another run's checkpoint is not ours to set aside"


def rank_1_sees_an_older_checkpoint():
    import k2_megatron.train.checkpoints.start_from as start_from

    newest = start_from.latest_checkpoint
    if os.environ["RANK"] == "1":
        start_from.latest_checkpoint = lambda folder: (newest(folder)[0].with_name("step_00000002"), None)


def test_ranks_start_from_the_checkpoint_that_rank_0_sees(attempt, finished_run):
    """A shared folder whose newest entry one node does not show yet."""
    settings = {KEY: finished_run, "parallel.tensor": 2, "train.steps": 3}
    outcomes = attempt(settings, ranks=2, fault=rank_1_sees_an_older_checkpoint)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[1].stderr
    assert "step_00000006 (step 6)" in outcomes[0].stdout


def test_plan_says_where_the_run_starts(small_config, finished_run, tmp_path):
    def plan(source: Path) -> str:
        other = {"model.rope_base": 5e5, "model.norm_epsilon": 1e-6}
        given = overrides({KEY: source, "checkpoint.start_optimizer": "kept", **other})
        arguments = [str(small_config), "--plan", *(part for setting in given for part in ("--set", setting))]
        outcome = Rank(run_pretrain, (arguments,), {}, tmp_path / f"output of {source.name}").finish()
        assert outcome.exit_code == 0, outcome.stderr
        return outcome.stdout

    weights = json.loads((finished_run / "checkpoints" / "step_00000006" / "k2.json").read_text())["weights"]
    there = plan(finished_run)
    assert f"step_00000006: step 6, weights {weights}, Adam's moments kept" in there
    assert "model.rope_base was 10000.0 there and is 500000.0 here" in there
    assert "model.norm_epsilon was 1e-05 there and is 1e-06 here" in there
    assert "(not there now: the run could not start), Adam's moments kept" in plan(tmp_path / "later")
