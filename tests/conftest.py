"""Fixtures of the tests that train: real text as tokens, and the configuration of a small run over it."""

from pathlib import Path

import pytest
from small_run import write_small_config, write_text

WAIT_LONGEST = ("toy", "slurm")  # folders whose files take minutes: begun last, one would end the suite alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in WAIT_LONGEST)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the token files `train` and `held_out`."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """The small run's TOML file."""
    return write_small_config(tmp_path_factory.mktemp("config"), text_folder)
