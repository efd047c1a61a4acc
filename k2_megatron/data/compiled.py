"""The compiled half of preprocessing: two functions of k2_megatron._cpu (csrc/ops.h), or None: then numpy, orjson."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def compiled() -> ModuleType | None:
    """k2_megatron._cpu where it is built, and not before it had these functions. (kernels.dispatch would bring torch,
    which these processes do not need.)"""
    try:
        module = importlib.import_module("k2_megatron._cpu")
    except ImportError:
        return None
    return module if hasattr(module, "json_texts") and hasattr(module, "narrow_ids") else None
