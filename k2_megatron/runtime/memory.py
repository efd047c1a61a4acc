"""What glibc's malloc does with memory that is freed. Each is nothing where the C library has no such call."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses a larger one


def keep_freed_blocks() -> None:
    """Have glibc keep the memory of a large block for the next: it maps blocks above 32 MiB anew, whatever threshold
    is asked for, and fresh pages, which the kernel clears, can cost more than the work. For processes that do one
    thing: it cannot be undone."""
    if sys.platform == "linux":
        _call("mallopt", _M_MMAP_MAX, 0)
        _call("mallopt", _M_TRIM_THRESHOLD, 1 << 30)


def keep_freed_buffers() -> None:
    """Have glibc keep buffers of up to 32 MiB for the next ones, 64 MiB of them in all: by default it maps each anew.
    Larger blocks go back to the system, so that a process stays small. It cannot be undone."""
    _call("mallopt", _M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    _call("mallopt", _M_TRIM_THRESHOLD, 64 << 20)


def release_freed_memory() -> None:
    """Have glibc give all that is free back to the system now."""
    _call("malloc_trim", 0)


def _call(name: str, *values: int) -> None:
    call = getattr(ctypes.CDLL(None), name, None)  # other C libraries have none
    if call is not None:
        call(*values)
