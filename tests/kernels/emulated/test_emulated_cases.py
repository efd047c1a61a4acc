"""The cases that every backend is tested on, through the Python ops, with the emulated CUDA kernels behind them.

`_cpu` and `_cuda` have the same functions; the last argument, a thread count or a stream, means nothing to the
emulation. So the CPU backend runs the CUDA kernels when its module is exchanged.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, assert_as_good_as_reference

from k2_megatron.kernels import library


@pytest.fixture
def cuda_kernels_on_cpu_tensors(emulated_module, monkeypatch):
    monkeypatch.setattr(library, "extension", lambda _device_type: (emulated_module, ""))


@pytest.mark.usefixtures("cuda_kernels_on_cpu_tensors")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_the_references(case):
    exact, reference = case.run("torch", exact=True), case.run("torch")
    assert_as_good_as_reference(case.run("cpu"), reference, exact, case)


@pytest.mark.usefixtures("cuda_kernels_on_cpu_tensors")
def test_the_fixture_reaches_the_emulated_module(emulated_module):
    assert library.module_for("rms_norm", torch.device("cpu")) is emulated_module
    assert emulated_module.architectures == "emulation"
