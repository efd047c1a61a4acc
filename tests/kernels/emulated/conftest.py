"""The emulated kernels in two orders."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(params=[0, 7], ids=["natural order", "shuffled order"])
def kernels(
    emulated_module: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The kernels, with blocks, warps and lanes in their natural order and in another."""
    monkeypatch.setenv("K2_EMULATION_ORDER", str(request.param))
    return emulated_module
