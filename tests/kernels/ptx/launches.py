"""The module `_cuda` with its kernels run from PTX: the project's host code decides on every launch.

The emulation's build of the module (g++, real bindings, real launch functions) shows each launch to an observer in
place of running it: kernel, grid, block, shared memory and the bytes of the arguments. The observer takes the kernel of
the same name from what nvcc made of the same source, and runs it over the same memory.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arithmetic import Approximation
from extents import REGIONS
from machine import LANES, Counters, Launch, Machine
from memory import GlobalMemory
from parse import Module, PtxError

OBSERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t,
)  # fmt: skip


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def kernels_of(files: list[Path]) -> dict[str, tuple[Module, str]]:
    """Where each kernel is, by its readable name with its parameters, which host and device compilers agree on."""
    found = {}
    for path in files:
        module = Module(path.read_text())
        for readable, name in zip(demangled(list(module)), module, strict=True):
            assert readable not in found, f"two kernels are called {readable}"
            found[readable] = (module, name)
    return found


def addresses_of(library: Path) -> dict[int, str]:
    """The functions of a shared object, by their address in it."""
    done = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    symbols = [(int(address, 16), name) for address, _, name in lines]
    readable = demangled([name for _, name in symbols])
    return {address: name for (address, _), name in zip(symbols, readable, strict=True)}


class PtxModule:
    """Has the functions of `_cuda`. order(blocks): the order of a launch's blocks; lanes: how many run at once."""

    def __init__(self, emulated: Any, library: Path, files: list[Path]) -> None:
        self.emulated = emulated
        self.kernels = kernels_of(files)
        self.names = addresses_of(library)
        self.observer = ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), "k2_launch_observer")
        at = next(address for address, name in self.names.items() if name == "k2_launch_observer")
        self.base = ctypes.addressof(self.observer) - at
        self.restore()

    def restore(self) -> None:
        """What tests change, as it is at first."""
        self.approximation = Approximation()
        self.order: Callable[[int], Any] = lambda _blocks: None
        self.lanes = LANES
        self.counters: Callable[[str, Launch], Counters | None] = lambda _name, _launch: None
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.emulated, name)
        regions = REGIONS.get(name)
        if regions is None:  # a size that is asked for, or an attribute
            return function
        return lambda *arguments: self._call(function, GlobalMemory(regions(*arguments)), arguments)

    def _call(self, function: Callable, memory: GlobalMemory, arguments: tuple) -> None:
        errors: list[BaseException] = []

        def observe(*launch: Any) -> None:
            if errors:
                return
            try:
                self._run(memory, *launch)
            except BaseException as error:
                errors.append(error)

        callback = OBSERVER(observe)
        self.observer.value = ctypes.cast(callback, ctypes.c_void_p).value
        try:
            function(*arguments)
        finally:
            self.observer.value = None
        if errors:
            raise errors[0]
        memory.require_complete()
        memory.write_back()

    def _run(self, memory: GlobalMemory, address: int, shape: Any, shared: int, given: Any, sizes: Any, n: int) -> None:
        name = self.names[address - self.base]
        if name not in self.kernels:
            raise PtxError(f"no PTX for the kernel {name}")
        module, mangled = self.kernels[name]
        kernel = module[mangled]
        values = tuple(ctypes.string_at(given[i], sizes[i]) for i in range(n))
        grid, block = tuple(shape[:3]), tuple(shape[3:6])
        launch = Launch(grid, block, shared, values, self.order(grid[0] * grid[1] * grid[2]))
        counters = self.counters(name, launch)
        self.launched.append(name)
        Machine(kernel, launch, memory, self.approximation, counters, self.lanes).run()
