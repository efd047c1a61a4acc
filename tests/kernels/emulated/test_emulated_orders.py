"""No kernel's result depends on the order of its blocks, warps and lanes: reversed, shuffled, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case

from k2_megatron.kernels import library

ORDERS = ("reverse", *"12345")
BF16 = torch.bfloat16
# Each with more blocks than one in every launch, overwriting in place where the op can.
CASES = [
    Case("rms_norm", (70, 520), BF16, options={"add": True}),
    Case("rms_norm", (5, 16_400)),
    Case("swiglu", (9, 2752), BF16),
    Case("rotary", (37, 2, 8, 128), BF16, options={"layout": "packed"}),
    Case("rotary_packed", (19, 2, 3, 32), options={"queries": 2}),
    Case("cross_entropy", (5, 2, 4004), BF16, options={"label_smoothing": 0.1, "ignored": 0.3, "padding": 3}),
    Case("cross_entropy", (67, 2, 33), offset=1),
    Case("linear_cross_entropy", (13, 16, 37), options={"chunk_tokens": 5}),
    Case("adamw", (33, 70_001), BF16, offset=1),
    Case("clip_gradients", (33, 70_001), BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_do_not_depend_on_the_order(case, emulated_module, monkeypatch):
    monkeypatch.setattr(library, "extension", lambda _device_type: (emulated_module, ""))
    natural = case.run("cpu")
    for order in ORDERS:
        monkeypatch.setenv("K2_EMULATION_ORDER", order)
        for name, value in case.run("cpu").items():
            assert torch.equal(value, natural[name]), f"{case}: {name} differs in order {order}"
