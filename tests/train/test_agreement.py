"""Ranks that have read different things are told apart before they train."""

import os
from functools import partial
from pathlib import Path

import pytest
from rank_processes import pretrain
from run_results import steps_of
from small_run import overrides

from k2_megatron.runtime.mistakes import MISTAKE


def _differs_on_rank_1(what: str) -> None:
    import pretrain_k2
    from k2_megatron.train import agreement

    if os.environ["RANK"] != "1":
        return
    if what == "code":
        agreement._PACKAGE = agreement._PACKAGE / "data"
    elif what == "data":
        opened = agreement.open_run_data

        def other(config, *, writer=False):
            data = opened(config, writer=writer)
            data.fingerprint = "0123abcd"
            return data

        agreement.open_run_data = other
    else:
        read = pretrain_k2.load_config
        pretrain_k2.load_config = lambda path, given, **how: read(path, [*given, what], **how)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("code", "code of k2_megatron is "),
        ("data", "data.train is "),
        ("optimizer.learning_rate=0.5", "configuration is "),
        ("log.every_steps=3", "configuration is "),
        ("parallel.tensor=2", "configuration is "),  # of which the groups of ranks are built
    ],
)
def test_one_node_with_other_files_is_refused(small_config, tmp_path, what, told):
    folder = tmp_path / "run"
    given = overrides({"run.folder": folder, "train.steps": 4, "parallel.data": 2})
    outcomes = pretrain(2, small_config, given, tmp_path / "output", partial(_differs_on_rank_1, what))
    assert [outcome.exit_code for outcome in outcomes] == [MISTAKE, MISTAKE]
    said = "".join(outcome.stderr for outcome in outcomes)
    assert said.count("the ranks would not train the same run: " + told) == 1, said
    assert "on 1 of 2 (1)" in said
    assert not (folder / "config.toml").exists()
    assert steps_of(folder) == {} if (folder / "journal.jsonl").exists() else what != "data"


def _only_rank_0_looks(folder: Path) -> None:
    """What rank 0 alone tells is not found out by the others: git and the whole journal, at 480 ranks."""
    import pretrain_k2

    def noted(name: str, function):
        def called(*arguments):
            (folder / f"{name}_{os.environ['RANK']}").touch()
            return function(*arguments)

        return called

    pretrain_k2.start_fields = noted("start", pretrain_k2.start_fields)
    pretrain_k2.summary_text = noted("summary", pretrain_k2.summary_text)


def test_what_one_rank_tells_one_rank_finds_out(small_config, tmp_path):
    given = overrides({"run.folder": tmp_path / "run", "train.steps": 3, "parallel.data": 2})
    outcomes = pretrain(2, small_config, given, tmp_path / "output", partial(_only_rank_0_looks, tmp_path))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert {path.name for path in tmp_path.glob("*_[01]")} == {"start_0", "summary_0"}
