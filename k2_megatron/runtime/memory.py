"""What glibc's malloc does with memory that is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_blocks() -> None:
    """Have glibc keep the memory of a large block for the next: it maps blocks above 32 MiB anew, whatever threshold
    is asked for, and fresh pages, which the kernel clears, can cost more than the work. For processes that do one
    thing: it cannot be undone."""
    if sys.platform == "linux" and hasattr(system := ctypes.CDLL(None), "mallopt"):
        system.mallopt(_M_MMAP_MAX, 0)
        system.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
