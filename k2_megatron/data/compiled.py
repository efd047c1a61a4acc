"""The compiled part of preprocessing: three functions of k2_megatron._cpu (csrc/ops.h), or None: then numpy, orjson and
arrow."""

from __future__ import annotations

from types import ModuleType

from k2_megatron.runtime.compiled import cpu_module

FUNCTIONS = ("json_texts", "narrow_ids", "unpack_block")


def compiled() -> ModuleType | None:
    """k2_megatron._cpu where it is built, and not before it had these functions."""
    return cpu_module(*FUNCTIONS)
