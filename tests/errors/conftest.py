"""Starting a program that is expected to end early, and a finished run to damage copies of."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from rank_processes import Outcome, Rank, pretrain, results_of, run_pretrain
from small_run import overrides


@pytest.fixture
def attempt(small_config: Path, tmp_path: Path) -> Callable[..., list[Outcome]]:
    """attempt(settings, ranks=1, environment={}, fault=None) -> outcomes of one pretrain_k2.py in tmp_path / "run"."""

    def start(
        settings: Mapping[str, object],
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        fault: Callable[[], None] | None = None,
    ) -> list[Outcome]:
        given = overrides({"run.folder": tmp_path / "run", **settings})
        if environment is None:
            return pretrain(ranks, small_config, given, tmp_path / "output", fault)
        arguments = [str(small_config), *(part for setting in given for part in ("--set", setting))]
        return [Rank(run_pretrain, (arguments, fault), environment, tmp_path / "output").finish()]

    return start


@pytest.fixture(scope="session")
def finished_run(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps with checkpoints at two, four and six. Copy it, change nothing in it."""
    folder = tmp_path_factory.mktemp("finished")
    given = overrides({"run.folder": folder / "run", "train.steps": 6, "checkpoint.every_steps": 2})
    results_of(pretrain(1, small_config, given, folder / "output"))
    return folder / "run"
