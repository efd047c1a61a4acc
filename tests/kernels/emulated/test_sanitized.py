"""All emulated kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own.

The process runs this folder's other tests on a sanitised build (the natural order is enough: memory errors do not
depend on it). Any report ends it. Not the tests of orders, and not those of tensors of 2^32 elements: AddressSanitizer
keeps a byte of its own for every eight of theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated_build
import pytest

FOLDER = Path(__file__).resolve().parent


@pytest.mark.skipif("K2_EMULATED_MODULE" in os.environ, reason="this is the sanitised process itself")
def test_every_case_under_the_sanitizers(build_folder):
    runtime = emulated_build.sanitizer_runtime()
    if runtime is None:
        pytest.skip("g++ has no AddressSanitizer runtime here")
    module = emulated_build.build_module(build_folder, sanitize=True)
    files = sorted(
        str(path) for path in FOLDER.glob("test_emulated_*.py") if not path.stem.endswith(("_orders", "_extents"))
    )
    environment = emulated_build.sanitizer_environment(runtime) | {
        "K2_EMULATED_MODULE": str(module),
        "OMP_NUM_THREADS": "1",
    }
    which = ("-k", "not shuffled and not are_refused")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *which, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parents[2])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
