"""A certificate on one machine: the reference and each layout, one after another, as local ranks of their own.

In:  the configuration and the layouts. Out: a `Certificate`; ValueError before anything is started when a layout does
not fit the model or the machine, or the data cannot be read.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from k2_megatron.certify.certificate import Certificate
from k2_megatron.certify.compare import judged
from k2_megatron.certify.layouts import ONE_PROCESS, in_layout, name_of
from k2_megatron.certify.record import Record, read_record
from k2_megatron.config import Config
from k2_megatron.config.schema import Parallel
from k2_megatron.kernels.dispatch import choices
from k2_megatron.train.run_data import open_run_data

Launch = Callable[[list[str], int], int]


class RanksFailed(ValueError):
    """The ranks of a layout came to no end; they have said why. `exit_code` is theirs."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def certify(
    config: Config,
    layouts: Sequence[Parallel],
    *,
    steps: int,
    repeats: int,
    folder: Path,
    launch: Launch,
    say: Callable[[str], None],
) -> Certificate:
    """Record and judge. `launch(arguments of "record", ranks)` runs the ranks and returns their exit code."""
    began = time.monotonic()
    layouts = list(dict.fromkeys(layouts))
    if Parallel() in layouts:
        raise ValueError(f"{ONE_PROCESS} is the reference itself; name --layouts of more ranks, or a number of --ranks")
    reference_config = in_layout(config, Parallel())
    configs = [in_layout(config, parallel) for parallel in layouts]
    check_steps(reference_config, steps)
    check_before(reference_config, configs)
    say(f"recording one process and {repeats} repeats of it, moved by rounding alone, then {len(configs)} of layouts")
    reference = _record(reference_config, steps, repeats, folder / "one_process", launch)
    recorded = (_record(layout, steps, 0, folder / name_of(layout.parallel), launch) for layout in configs)
    return judged(reference, recorded, began, say)


def check_steps(config: Config, steps: int) -> None:
    """ValueError where the run has fewer steps."""
    if steps > config.train.steps:
        raise ValueError(f"--steps {steps}: the run has train.steps = {config.train.steps}; ask for no more")


def check_before(reference: Config, configs: Sequence[Config]) -> None:
    """ValueError for what would end the ranks with a mistake."""
    open_run_data(reference)
    choices(reference.model.kernels, "cuda" if torch.cuda.is_available() else "cpu")
    most = max(configs, key=lambda config: config.world_size)
    if torch.cuda.is_available() and most.world_size > torch.cuda.device_count():
        raise ValueError(
            f"layout {name_of(most.parallel)} needs {most.world_size} GPUs, and this machine shows "
            f"{torch.cuda.device_count()}; name smaller --layouts, or record it under a launcher (docs/certificate.md)"
        )


def _record(config: Config, steps: int, repeats: int, folder: Path, launch: Launch) -> Record:
    written = folder.with_suffix(".toml")
    written.write_text(config.to_toml(), encoding="utf-8")
    arguments = [str(written), "--steps", str(steps), "--repeats", str(repeats), "--output", str(folder)]
    code = launch(arguments, config.world_size)
    if code:
        raise RanksFailed(f"{name_of(config.parallel)} was not recorded, for what is said above", code)
    return read_record(folder)
