"""The compiled backends as test parameters, each skipped with its reason where it cannot run."""

from __future__ import annotations

import pytest

from k2_megatron.kernels.dispatch import obstacle

_CPU_OBSTACLE = obstacle("rms_norm", "cpu", "cpu")
_CUDA_OBSTACLE = obstacle("rms_norm", "cuda", "cuda")

on_cpu = pytest.mark.skipif(bool(_CPU_OBSTACLE), reason=_CPU_OBSTACLE or "-")
COMPILED = [
    pytest.param("cpu", marks=on_cpu),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(_CUDA_OBSTACLE), reason=_CUDA_OBSTACLE or "-")]
    ),
]
