"""The module `_cuda` whose kernels run from PTX, as a fixture: compiled once a session.

For sm_80; K2_PTX_ARCHITECTURE names another (sm_90 differs in how one bf16 number becomes fp32).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ptx_build
from launches import PtxModule


@pytest.fixture(scope="session")
def ptx_folder(build_folder: Path) -> Path:
    reason = ptx_build.reason_not_to_compile()
    if reason:
        pytest.skip(f"the kernels cannot be compiled to PTX: {reason}")
    return build_folder


@pytest.fixture(scope="session")
def loaded_module(ptx_folder: Path, emulated_module: ModuleType) -> PtxModule:
    architecture = os.environ.get("K2_PTX_ARCHITECTURE", "sm_80")
    files = ptx_build.compile_ptx(sorted(ptx_build.CSRC.glob("*.cu")), ptx_folder, architecture)
    return PtxModule(emulated_module, Path(emulated_module.__file__), files)


@pytest.fixture
def ptx_module(loaded_module: PtxModule) -> PtxModule:
    """With the blocks in their natural order, and approximate instructions that err by what their arguments pick."""
    loaded_module.restore()
    return loaded_module
