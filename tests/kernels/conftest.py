"""The emulated module as a fixture of the kernels' tests: built once a session, or given in K2_EMULATED_MODULE."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "emulated")]  # kernel_cases: the cases that every backend is tested on

import emulated_build  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
