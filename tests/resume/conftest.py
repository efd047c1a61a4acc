"""Runs of eight steps with checkpoints at three, six and eight, and copies of them that end at three."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import pretrain, results_of
from small_run import overrides

SETTINGS = {
    "train.steps": 8,
    "train.evaluate_every_steps": 4,
    "checkpoint.every_steps": 3,
}


@pytest.fixture(scope="session")
def whole_run(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole_run(ranks, settings) -> the run folder of eight steps without a stop; each once a session."""
    known: dict[tuple, Path] = {}

    def once(ranks: int, settings: dict[str, object]) -> Path:
        key = (ranks, tuple(sorted(settings.items())))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            given = overrides({**SETTINGS, **settings, "run.folder": folder / "run"})
            results_of(pretrain(ranks, small_config, given, folder / "output"))
            known[key] = folder / "run"
        return known[key]

    return once


@pytest.fixture
def continued(small_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """continued(run, ranks, settings, fault=None) -> a copy of `run` that went on from step three."""

    def go_on(run: Path, ranks: int, settings: dict[str, object], fault: Callable[[], None] | None = None) -> Path:
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        for later in (6, 8):
            shutil.rmtree(copy / "checkpoints" / f"step_{later:08d}")
        (copy / "checkpoints" / "latest").write_text("step_00000003\n")
        given = overrides({**SETTINGS, **settings, "run.folder": copy})
        results_of(pretrain(ranks, small_config, given, tmp_path / "output", fault))
        return copy

    return go_on
