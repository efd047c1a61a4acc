"""The CUDA kernels on a real GPU under compute-sanitizer: no access outside of a tensor, no race in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k2_megatron.kernels.dispatch import obstacle

OBSTACLE = obstacle("rms_norm", "cuda", "cuda")
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
# Small cases: the tools slow a kernel many times over. Not the one whose products are cuBLAS's.
RUN_SMALL_CASES = """
import math, torch
from kernel_cases import CASES
small = [case for case in CASES if case.dtype == torch.bfloat16 and math.prod(case.shape) <= 50_000
         and case.op != "linear_cross_entropy"]
for case in small:
    case.run("cuda", device="cuda")
torch.cuda.synchronize()
print(len(small), "cases ran")
"""


@pytest.mark.gpu
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "-")
@pytest.mark.skipif(TOOL is None, reason="no compute-sanitizer on PATH or under /usr/local/cuda/bin")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_small_cases_of_every_op(check):
    ours = ("--kernel-name", "kns=2k24cuda")  # k2::cuda, mangled: torch's kernels run unwatched, at their own speed
    # torch asks the driver for entry points that it may lack; a failed launch of ours is an exception anyhow.
    quiet = ("--report-api-errors", "no")
    command = [TOOL, "--tool", check, *ours, *quiet, "--error-exitcode", "99", sys.executable, "-c", RUN_SMALL_CASES]
    # Without torch's cache each tensor is an allocation of its own, and an access past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent, timeout=60
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(r"^[1-9]\d* cases ran", done.stdout, re.MULTILINE), done.stdout[-2000:]
