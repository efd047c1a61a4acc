"""A disk that is full, over its quota, read-only or broken, at each call of a save: nothing that was saved is harmed,
no rank waits for another, and what was left is cleared away."""

import errno
import itertools
import shutil
from pathlib import Path

import torch.distributed as distributed
from failing_disk import ERRORS, FailingDisk
from rank_processes import results_of, run_ranks

from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoints.folders import complete_checkpoints, remove_unfinished
from k2_megatron.train.checkpoints.load import find_checkpoint
from k2_megatron.train.checkpoints.manifest import CheckpointError, step_of
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import model_state, optimizer_state
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts

SETTINGS = [
    *("model.layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.heads=2", "model.kv_heads=2"),
    "parallel.distributed_optimizer=true",
]
KERNELS = dict.fromkeys(OPS, "torch")


def _save_on_failing_disks(config_path: Path, checkpoints: Path) -> tuple[int, list[str]]:
    """Save step 1 well, then step 2 with each call of each rank failing: (how often, what was wrong)."""
    environment = read_environment()
    config = load_config(config_path, SETTINGS, world_size=environment.world_size)
    device = find_device(environment.local_rank)
    wrong: list[str] = []
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 20.0)
        groups = build_groups(config.parallel, 20.0)
        seed_everything(config.run.seed, groups)
        chunks = wrap_model(config, build_model(config, KERNELS, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, KERNELS, groups.collection)
        parts = Parts(groups, chunks, optimizer, device.torch)
        optimizer_state(optimizer, model_state(chunks), loading=True)  # makes the moments, as a first step would
        savers = [CheckpointWriter(checkpoints, groups, asynchronous=background) for background in (False, True)]

        def save(step: int, saver: CheckpointWriter) -> str:
            try:
                saver.save(step, config, parts, {})
                saver.wait()
                return "saved"
            except CheckpointError as error:
                return str(error)

        assert save(1, savers[0]) == "saved"
        disk = FailingDisk(checkpoints)
        assert save(2, savers[0]) == "saved"
        instants = [
            (rank, number, call)
            for rank, calls in enumerate(_gathered(disk.calls))
            for number, call in enumerate(calls)
            if not _like_its_neighbours(calls, number)
        ]
        # Each fails in one of the ways, in the foreground or in the background: a save takes a tenth of a second.
        ways = itertools.cycle(itertools.product(savers, ERRORS))
        for (victim, number, call), (saver, error) in zip(instants, ways, strict=False):
            if groups.rank == 0:
                shutil.rmtree(checkpoints / "step_00000002", ignore_errors=True)
                (checkpoints / "latest").write_text("step_00000001\n")
            disk.mend()
            if groups.rank == victim:
                disk.fail_at(number, error)
            outcomes = _gathered(save(2, saver))
            disk.mend()
            problem = _problem(outcomes, checkpoints, groups)
            wrong += [f"rank {victim}, {errno.errorcode[error]} from {call}: {problem}"] if problem else []
        disconnect()
    return len(instants), wrong


def _like_its_neighbours(calls: list[str], number: int) -> bool:
    """Whether it is the same call as the one before and the one after: another tensor written into one file."""
    return 0 < number < len(calls) - 1 and calls[number - 1] == calls[number] == calls[number + 1] and number % 10 > 0


def _gathered(value: object) -> list:
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def _problem(outcomes: list[str], checkpoints: Path, groups) -> str | None:
    """What is not as it must be after a save that met a failing disk."""
    if len(set(outcomes)) > 1:
        return f"the ranks differ: {outcomes}"
    if groups.rank == 0:
        remove_unfinished(checkpoints)
    distributed.barrier()
    left = [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]
    steps = [step_of(folder) for folder in complete_checkpoints(checkpoints)]
    newest, doubts = find_checkpoint(checkpoints, groups, set_aside=False)
    if left:
        return f"left behind: {left}"
    if 1 not in steps or doubts:
        return f"steps {steps}, {doubts}"
    if outcomes[0] == "saved":
        return None if newest == checkpoints / "step_00000002" else f"saved, and {newest} is found"
    told = f"step 2 could not be saved under {checkpoints}: " in outcomes[0] and outcomes[0].count("\n") == 0
    return None if told else f"it says {outcomes[0]}"


def test_no_failing_call_of_a_save_harms_what_was_saved(small_config, tmp_path):
    arguments = (small_config, tmp_path / "checkpoints")
    for tried, wrong in results_of(run_ranks(_save_on_failing_disks, 2, arguments, tmp_path / "ranks")):
        print(tried, "saves")
        assert tried > 40
        assert wrong == []
