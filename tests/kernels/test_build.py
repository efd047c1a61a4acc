"""setup.py with compilers that only write down what they were asked: which modules and architectures it builds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
echo "${{0##*/}} $*" >>{log}
for last; do :; done
: >"$last"
"""


@pytest.fixture
def build(tmp_path):
    """build(**environment): the exit code, what was printed, and the compilers' command lines."""

    def run(nvcc: bool = True, **environment: str) -> tuple[int, str, str]:
        tools, log = tmp_path / "tools", tmp_path / "log"
        tools.mkdir()
        log.touch()
        for name in ("g++", "nvcc") if nvcc else ("g++",):
            (tools / name).write_text(COMPILER.format(log=log))
            (tools / name).chmod(0o755)
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            tmp_path / "lib",
            "--build-temp",
            tmp_path / "o",
        ]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("K2_", "CUDA_", "CXX"))}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT,
            env=kept | {"PATH": str(tools)} | environment,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, log.read_text()

    return run


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ("", ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90,compute_90]"]),
        ("80, 90", ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90]"]),
    ],
)
def test_architectures(build, asked, codes):
    code, said, commands = build(K2_CUDA_ARCHITECTURES=asked)
    assert code == 0, said
    kernels = [line.split() for line in commands.splitlines() if line.startswith("nvcc") and ".cu " in line]
    assert len(kernels) == len(list((ROOT / "csrc").glob("*.cu")))
    for words in kernels:
        assert [words[i + 1] for i, word in enumerate(words) if word == "-gencode"] == codes


def test_an_architecture_that_there_is_none_of(build):
    code, said, commands = build(K2_CUDA_ARCHITECTURES="90 9.0")
    assert code != 0
    assert "K2_CUDA_ARCHITECTURES names '9.0'; use compute capabilities" in said
    assert not any(line.startswith("nvcc") for line in commands.splitlines())


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_without_nvcc_or_where_it_is_not_wanted_the_cpu_module_alone_is_built(build, choice):
    code, said, commands = build(nvcc=choice == "0", K2_BUILD_CUDA=choice)
    assert code == 0, said
    assert "k2_megatron: building _cpu only" in said
    assert not any(line.startswith("nvcc") for line in commands.splitlines())
    assert "csrc/cpu/adamw.cpp" in commands


def test_insisting_on_cuda_without_nvcc_is_one_line(build):
    code, said, commands = build(nvcc=False, K2_BUILD_CUDA="1")
    assert code != 0
    assert "K2_BUILD_CUDA=1, but there is no nvcc on PATH; install the CUDA toolkit or set CUDA_HOME" in said
    assert commands == ""
