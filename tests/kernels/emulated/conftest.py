"""The emulated module as a fixture: built once a session, or given in K2_EMULATED_MODULE (sanitised runs)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # kernel_cases: the cases that every backend is tested on

import emulated_build  # noqa: E402


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = emulated_build.reason_not_to_build()
    if reason:
        pytest.skip(f"the emulated kernels cannot be compiled: {reason}")
    kept = os.environ.get("K2_EMULATION_BUILD")
    return Path(kept) if kept else tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="session")
def emulated_module(build_folder: Path) -> ModuleType:
    built = os.environ.get("K2_EMULATED_MODULE")
    return emulated_build.load_module(Path(built) if built else emulated_build.build_module(build_folder))


@pytest.fixture(params=[0, 7], ids=["natural order", "shuffled order"])
def kernels(
    emulated_module: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The kernels, with blocks, warps and lanes in their natural order and in another."""
    monkeypatch.setenv("K2_EMULATION_ORDER", str(request.param))
    return emulated_module
