"""The layout built with fake tensors, in processes of its own: sizes of K2-65B's ranks, and what it costs to know."""

import json
import os
import subprocess
import sys

import pytest

from k2_megatron.config import load_config
from k2_megatron.plan.memory import rank_memory
from k2_megatron.plan.parameters import rank_parameters

TOY, STAGE1 = "examples/toy/toy.toml", "examples/k2_65b/stage1.toml"
PROGRAM = """
import dataclasses, json, resource, sys
from k2_megatron.runtime.quiet import silence_dependencies
silence_dependencies()
from k2_megatron.config import load_config
from k2_megatron.plan.dry_run import dry_run
path, *layouts = json.loads(sys.argv[1])
groups = [[dataclasses.asdict(group) for group in dry_run(load_config(path, layout))] for layout in layouts]
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"groups": groups, "kilobytes": kilobytes, "cpu_seconds": sum(resource.getrusage(0)[:2])}))
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": "."}  # the tool runs from a checkout that is not installed as well


def run_dry(path, *layouts):
    command = [sys.executable, "-c", PROGRAM, json.dumps([path, *layouts])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_k2_65b_at_480_ranks():
    result = run_dry(STAGE1, [])
    embedding, middle, output = result["groups"][0]
    assert [group["first_rank"] for group in (embedding, middle, output)] == [0, 120, 360]
    assert [group["ranks"] for group in (embedding, middle, output)] == [120, 240, 120]
    assert [group["stages"] for group in (embedding, middle, output)] == [[0], [1, 2], [3]]
    parameters = [group["parameters"] for group in (embedding, middle, output)]
    assert parameters == [2_056_880_128, 2_024_079_360, 2_056_888_320]
    for group in (embedding, middle, output):
        sizes = [group[kind] / group["parameters"] for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes")]
        assert sizes == [2, 4, 12]
    assert result["kilobytes"] < 4e6  # the bound of --dry-run: 4 GB, and a minute
    assert result["cpu_seconds"] < 60


LAYOUTS = [
    [],
    ["parallel.tensor=1", "parallel.sequence=false", "parallel.virtual_pipeline=2"],
    ["parallel.pipeline=4", "model.kv_heads=2", "train.precision=bfloat16"],
    ["parallel.data=2", "parallel.distributed_optimizer=true", "train.precision=bfloat16"],
    ["parallel.data=2", "parallel.distributed_optimizer=true", "parallel.pipeline=1"],
    ["train.gradient_leaves=4"],  # of one data rank, which keeps two buffers more
]


@pytest.fixture(scope="module")
def toy_groups():
    return run_dry(TOY, *LAYOUTS)["groups"]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[",".join(layout) or "toy" for layout in LAYOUTS])
def test_formulas_agree_with_what_megatron_core_builds(toy_groups, index):
    config = load_config(TOY, LAYOUTS[index])
    groups = toy_groups[index]
    assert sum(group["ranks"] for group in groups) == config.world_size
    for group in groups:
        for stage in group["stages"]:
            assert group["parameters"] == rank_parameters(config, stage).total
            memory = rank_memory(config, stage)
            assert group["weight_bytes"] == memory.weights
            # the distributed optimizer pads its buffers so that they divide; a bucket's padding is below 1,000 elements
            padding = 4 * 1000 if config.parallel.distributed_optimizer else 0
            assert 0 <= group["gradient_bytes"] - memory.gradients <= padding
            assert 0 <= group["optimizer_bytes"] - memory.optimizer <= 3 * padding


def test_dry_run_command_prints_both():
    command = [sys.executable, "tools/plan_run.py", TOY, "--ranks", "8", "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert "tensor 2 x pipeline 2 x context 1 x data 2 = 8 ranks" in ended.stdout
    assert "built 8 ranks, 2 different" in ended.stdout


def test_mistakes_are_one_message_and_exit_code_2():
    command = [sys.executable, "tools/plan_run.py", TOY, "--set", "model.layers=3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert ended.returncode == 2
    assert ended.stdout == ""
    first, second = ended.stderr.splitlines()
    assert first == f"plan_run: {TOY}: 1 problem"
    assert "model.layers = 3: must be a multiple of" in second
