"""The compiled part of preprocessing: three functions of k2_megatron._cpu (csrc/ops.h), or None: then numpy, orjson and
arrow."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

FUNCTIONS = ("json_texts", "narrow_ids", "unpack_block")


@cache
def compiled() -> ModuleType | None:
    """k2_megatron._cpu where it is built, and not before it had these functions. (kernels.dispatch would bring torch,
    which these processes do not need.)"""
    try:
        module = importlib.import_module("k2_megatron._cpu")
    except ImportError:
        return None
    return module if all(hasattr(module, name) for name in FUNCTIONS) else None
