"""Records of the small run: the reference with its repeats, and a function that records a layout."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from certify_tool import record_on_ranks
from rank_processes import REPOSITORY

from k2_megatron.certify.layouts import layout_named

sys.path.append(str(REPOSITORY / "tests" / "layouts"))  # for the faults, which are the same
STEPS = "2"


@pytest.fixture(scope="session")
def record(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """record(layout name, repeats=0, fault=None, settings=()) -> the folder of the record."""

    def recorded(
        layout: str,
        repeats: int = 0,
        fault: Callable[[], None] | None = None,
        settings: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path_factory.mktemp("record")
        ranks, sets = 1, list(settings)
        if layout:
            parallel = layout_named(layout)
            ranks = parallel.tensor * parallel.pipeline * parallel.context * parallel.data
            sets += [f"parallel.{key}={str(value).lower()}" for key, value in parallel.model_dump().items() if value]
        arguments = [str(small_config), "--steps", STEPS, "--repeats", str(repeats), "--output", str(folder / "record")]
        arguments += [part for setting in sets for part in ("--set", setting)]
        codes = record_on_ranks(ranks, arguments, folder / "ranks", fault)
        assert codes == [0] * ranks, (folder / "ranks" / "rank_0" / "stderr").read_text()
        return folder / "record"

    return recorded


@pytest.fixture(scope="session")
def reference(record: Callable[..., Path]) -> Path:
    """The record of one process, with its repeats."""
    return record("", repeats=3)


@pytest.fixture(scope="session")
def sound(record: Callable[..., Path]) -> Path:
    """The record of a sound layout."""
    return record("tp2-sp")
