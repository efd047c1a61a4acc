"""How the tests hand tensors to a kernel, and how they judge what comes back.

A result is judged by the reference's own rounding: its error against float64 may be at most twice that of torch's
computation in the same dtype, plus one unit in the last place of the output's dtype (torch may happen to round every
element of a small case the right way).
"""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CANARY = 0x5A


class Guarded:
    """A tensor in the middle of a larger allocation whose other bytes must not change.

    `offset_elements` shifts it away from 16-byte alignment, one element at a time.
    """

    def __init__(self, value: torch.Tensor, offset_elements: int = 0) -> None:
        margin = 64 + offset_elements * value.element_size()
        self.bytes = torch.full((margin + value.numel() * value.element_size() + 64,), CANARY, dtype=torch.uint8)
        start = (-self.bytes.data_ptr()) % 16 + offset_elements * value.element_size()
        self.used = slice(start, start + value.numel() * value.element_size())
        self.tensor = self.bytes[self.used].view(value.dtype).view(value.shape)
        self.tensor.copy_(value)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, name: str) -> None:
        """Fails if anything around the tensor was written."""
        outside = torch.cat([self.bytes[: self.used.start], self.bytes[self.used.stop :]])
        assert bool((outside == CANARY).all()), f"{name}: bytes outside of the tensor were written"


def empty(shape: tuple[int, ...], dtype: torch.dtype, offset_elements: int = 0) -> Guarded:
    """An output, filled with NaN: what a kernel forgets to write does not compare equal to anything."""
    return Guarded(torch.full(shape, float("nan"), dtype=dtype), offset_elements)


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of `dtype` at each |value|."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


def assert_as_exact_as(name: str, actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """`actual` errs against `exact` (float64) at most twice as much as `reference` does, plus one ulp."""
    assert actual.shape == exact.shape == reference.shape, (
        f"{name}: shapes {actual.shape}, {reference.shape}, {exact.shape}"
    )
    assert exact.dtype == torch.float64, f"{name}: the exact value must be float64"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    allowed = 2 * (reference.double() - exact).abs().max() + ulp(exact, actual.dtype)
    wrong = ~(error <= allowed)
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off; the first at {where}: "
            f"{float(actual[where])}, exact {float(exact[where])}, "
            f"torch {float(reference[where])}, allowed error {float(allowed[where]):.3g}"
        )
