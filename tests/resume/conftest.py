"""Runs of eight steps (or of more) with checkpoints at three, six and eight, and copies of them that end at three."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import pretrain, results_of
from small_run import overrides

from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import step_of

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
    """continued(run, ranks, settings, fault=None, after=3) -> a copy of `run` that went on from step `after`."""

    def go_on(
        run: Path, ranks: int, settings: dict[str, object], fault: Callable[[], None] | None = None, after: int = 3
    ) -> Path:
        copy = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run, copy)
        for folder in complete_checkpoints(copy / "checkpoints"):
            if step_of(folder) > after:
                shutil.rmtree(folder)
        (copy / "checkpoints" / "latest").write_text(f"step_{after:08d}\n")
        given = overrides({**SETTINGS, **settings, "run.folder": copy})
        results_of(pretrain(ranks, small_config, given, tmp_path / f"{copy.name}_output", fault))
        return copy

    return go_on
