"""The module `_cuda` whose kernels run from PTX, as a fixture: compiled once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "emulated")]

import emulated_build  # noqa: E402
import ptx_build  # noqa: E402
from launches import PtxModule  # noqa: E402


@pytest.fixture(scope="session")
def ptx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = ptx_build.reason_not_to_compile() or emulated_build.reason_not_to_build()
    if reason:
        pytest.skip(f"the kernels cannot be compiled to PTX: {reason}")
    kept = os.environ.get("K2_EMULATION_BUILD")
    return Path(kept) if kept else tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="session")
def loaded_module(ptx_folder: Path) -> PtxModule:
    library = emulated_build.build_module(ptx_folder)
    files = ptx_build.compile_ptx(sorted(ptx_build.CSRC.glob("*.cu")), ptx_folder)
    return PtxModule(emulated_build.load_module(library), library, files)


@pytest.fixture
def ptx_module(loaded_module: PtxModule) -> PtxModule:
    """With the blocks in their natural order, and approximate instructions that err by what their arguments pick."""
    loaded_module.restore()
    return loaded_module
