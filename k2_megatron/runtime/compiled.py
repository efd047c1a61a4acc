"""The compiled module of the CPU, where it is built; kernels/dispatch.py, which also tells why not, needs torch.

Without torch and on one thread, the module starts no OpenMP threads that torch's would meet later.
"""

import importlib
from functools import cache
from types import ModuleType


@cache
def cpu_module(*functions: str) -> ModuleType | None:
    """k2_megatron._cpu; None where it is not built, or was before it had all of `functions`."""
    try:
        module = importlib.import_module("k2_megatron._cpu")
    except ImportError:
        return None
    return module if all(hasattr(module, name) for name in functions) else None
