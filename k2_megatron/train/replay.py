"""Repeat steps of a run from the checkpoint before them, and compare what is computed with the journal, to the bit.

In: the run folder, which is only read. Out: a folder beside it, trained under the settings and in the layout that
computed the steps; what differs, printed. `tools/replay.py` is the command line, and tells what a difference means.
"""

import contextlib
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from k2_megatron.config import Config, load_config
from k2_megatron.config.changes import CHANGEABLE, COMPUTING
from k2_megatron.config.toml_text import toml_value
from k2_megatron.data.ledger import FILE_NAME, Ledger
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.journal import JOURNAL, read_events, read_steps, standing_events
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import is_imported, read_manifest, step_of
from k2_megatron.train.checkpoints.state import layout_name
from k2_megatron.train.run_folder import CONFIG

EQUAL, DIFFERENT = 0, 1
REPLAYED = "replayed.toml"
COMPARED = ("loss", "grad_norm", "learning_rate", "samples")


def replay(run: Path, step: int, launch: list[str], kept: Path | None, *, pretrain: Path) -> int:
    """Repeat and compare, in the folder `kept` or one that is removed; EQUAL or DIFFERENT. `launch` starts the ranks of
    the program `pretrain`. ValueError when the run does not hold what that needs."""
    journal = run / JOURNAL
    if not journal.is_file():
        raise ValueError(f"{journal} does not exist: {run} is no run folder")
    told, weights, starts = read_steps(journal), saved_weights(journal), starts_of(journal)
    last = max(told, default=0)
    if not 1 <= step <= min(last + 1, load_config(run / CONFIG).train.steps):
        raise ValueError(f"step {step} is not in {journal}, which goes to step {last}")
    start = checkpoint_before(run, step, weights)
    first = step_of(start) if start else 0
    end = min((saved for saved in weights if step <= saved <= last), default=step)
    steps = range(first + 1, end + 1)
    config = config_of(run, start, steps)
    layouts, now = {starts[number]["layout"] for number in steps if number in starts}, layout_name(config)
    if layouts - {now}:
        raise ValueError(
            f"steps {steps[0]} to {end} were computed in layout {' and '.join(sorted(layouts))}, and their "
            f"configuration says {now}: another layout rounds otherwise. Choose a step that {now} computed"
        )
    refuse_later_amendments(Ledger(run), [told[number] for number in steps if number in told])
    with folder_for(run, kept) as given:
        folder = Path(given)
        prepare(run, start, folder, config)
        print(f"from {start.name if start else 'the beginning'} to step {end}", flush=True)
        train(launch, pretrain, folder, end, config)
        again = read_steps(folder / JOURNAL)
        compared = range(first + 1, min(end, last) + 1)
        found = compare(told, again, compared, weights, saved_weights(folder / JOURNAL)) if compared else EQUAL
        if found == DIFFERENT:
            any_data_size = config.train.gradient_leaves is not None
            refuse_other_machines(compared, starts, starts_of(folder / JOURNAL), any_data_size)
        if step > last and step in again:
            loss, norm = again[step]["loss"], again[step]["grad_norm"]
            print(f"step {step}, which the run did not finish: loss {loss!r}, gradient norm {norm!r}")
        return found


def refuse_later_amendments(ledger: Ledger, steps: Iterable[dict]) -> None:
    """ValueError where the rows of "step" events were moved after they were computed: the journal has no line yet of
    going back to before them, and they would be repeated on other rows."""
    for event in (event for event in steps if "ledger" in event):  # earlier versions did not write it
        end_token = event["samples"][1] * event["sequence_length"]
        later = [entry for entry in ledger.entries[event["ledger"]["lines"] :] if entry["event"] == "amendment"]
        if any(entry["from_sample"] * entry["sequence_length"] < end_token for entry in later):
            raise ValueError(
                f"no judgement: {ledger.path} was amended after step {event['step']} was computed, and gives it other "
                "rows now: the run was ended while it went back. Start it, and replay steps that it makes from then on"
            )


def folder_for(run: Path, kept: Path | None) -> contextlib.AbstractContextManager:
    """The folder of the replay: `kept`, or one beside the run, where every node sees it, that is removed afterwards."""
    if kept is not None:
        if kept.exists() and not (kept.is_dir() and not any(kept.iterdir())):
            found = "is not empty" if kept.is_dir() else "is no folder"
            raise ValueError(f"--folder {kept} {found}: name an empty folder, or one that does not exist")
        return contextlib.nullcontext(kept)
    beside = run.resolve()
    try:
        return tempfile.TemporaryDirectory(prefix=f".replay_of_{beside.name}_", dir=beside.parent)
    except OSError as error:
        raise ValueError(f"{beside.parent} cannot hold the replay ({error.strerror}): name a --folder") from None


def checkpoint_before(run: Path, step: int, weights: dict[int, str]) -> Path | None:
    """The newest checkpoint from before `step`; None where none had been saved by then, and the run began anew."""
    before = [folder for folder in complete_checkpoints(run / "checkpoints") if step_of(folder) < step]
    saved = [number for number in weights if number < step]
    if not before and saved:
        raise ValueError(
            f"no checkpoint from before step {step} is kept in {run / 'checkpoints'}; the last was of step {max(saved)}"
        )
    return before[0] if before else None


def config_of(run: Path, start: Path | None, steps: range) -> Config:
    """The run's configuration, but with what decides the bits of a step as it was when `steps` were computed.

    A checkpoint stores the configuration that it was saved under, and a resume tells what was changed from that one.
    """
    tables = load_config(run / CONFIG).model_dump(exclude_none=True)
    resumes = resumes_of(run / JOURNAL)
    then: dict[str, object] = {}
    if start is None:
        for changes in reversed(resumes.values()):
            then |= {change["key"]: change["was"] for change in changes}
    elif not is_imported(manifest := read_manifest(start)):
        then = {key: manifest["config"].get(section, {}).get(name) for key, section, name in split(COMPUTING)}
    for step, changes in resumes.items():
        changed = {change["key"]: change["now"] for change in changes if change["key"] in COMPUTING}
        if steps[0] <= step < steps[-1] and changed:
            raise ValueError(
                f"{', '.join(changed)} changed after step {step}, and of the checkpoints around it none is kept that "
                f"would part steps {steps[0]} to {steps[-1]} there; choose a step outside of them"
            )
        if step == steps[0] - 1:
            then |= changed
    for key, section, name in split(COMPUTING):
        if key in then:
            tables[section].pop(name, None)
            tables[section] |= {} if then[key] is None else {name: then[key]}
    return Config(**tables)


def split(keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(key, section, name in it) of dotted keys."""
    for key in keys:
        section, _, name = key.partition(".")
        yield key, section, name


def resumes_of(journal: Path) -> dict[int, list[dict]]:
    """{step: the changes that a resume from there, or a rollback to there, told of}, of the lives that made the steps
    which stand."""
    standing = standing_events(journal, "resume", "rollback")
    # A rollback by hand tells of none: the resume after it does.
    return {event["step"]: event["changes"] for event in standing if "changes" in event}


def train(launch: list[str], pretrain: Path, folder: Path, end: int, config: Config) -> None:
    """Repeat the steps; ValueError when that does not come to its end."""
    # A replay looks on; it must not go back by itself, nor stand beside the run where people look at it.
    sets = [f"run.folder={folder}", "spikes.policy=watch", "spikes.scope=", "spikes.max_rollbacks="]
    sets += ["log.wandb=", "log.tensorboard=false"]
    values = config.flat()  # what may differ from the checkpoint's when it is named
    sets += [f"{key}={'' if values[key] is None else toml_value(values[key])}" for key in CHANGEABLE]
    command = [*launch, sys.executable, str(pretrain), str(folder / REPLAYED), "--until", str(end)]
    try:
        code = subprocess.run([*command, *(part for key in sets for part in ("--set", key))]).returncode
    except OSError as error:
        raise ValueError(f"--launch {shlex.join(launch)}: {error.strerror}") from None
    if code:
        raise ValueError(f"the replay itself ended with exit code {code}; what it said stands above")


def starts_of(journal: Path) -> dict[int, dict]:
    """{step: the "start" event of the processes that computed it last}."""
    starts, start = {}, None
    for event in read_events(journal):
        if event["event"] == "start":
            start = event
        elif event["event"] == "step" and start is not None:
            starts[event["step"]] = start
    return starts


def refuse_other_machines(
    steps: range, starts: dict[int, dict], again: dict[int, dict], any_data_size: bool = False
) -> None:
    """ValueError where other devices, kernels or ranks repeated the steps: they may differ, and nothing is wrong. With
    `any_data_size` (gradient leaves) another number of data-parallel ranks is no excuse."""
    for step in (step for step in steps if step in starts and step in again):
        was, now = (computed_by(of[step], any_data_size) for of in (starts, again))
        if was != now:
            raise ValueError(f"no judgement: step {step} was computed by {was}, and repeated by {now}; use the former")


def computed_by(start: dict, any_data_size: bool) -> str:
    """Device, kernels and layout of a "start" event, without the reasons for choosing kernels."""
    kernels = ", ".join(f"{op} {choice.split(':')[0]}" for op, choice in sorted(start["kernels"].items()))
    layout = start["layout"].rpartition("-dp")[0] if any_data_size else start["layout"]
    return f"{start['device']} ({kernels}) in layout {layout}"


def saved_weights(journal: Path) -> dict[int, str]:
    """{step: the last fingerprint told of a checkpoint of it}, of the branch that stands: one that a rollback left was
    trained on other rows, and the steps after a resume are made, and saved, anew."""
    return {event["step"]: event["weights"] for event in standing_events(journal, "checkpoint")}


def prepare(run: Path, start: Path | None, folder: Path, config: Config) -> None:
    """A run folder that resumes from `start`: its checkpoint by a link, the ledger by a copy."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_file(folder / REPLAYED, config.to_toml())
    ledger = (run / FILE_NAME).read_bytes().splitlines(keepends=True) if (run / FILE_NAME).exists() else []
    if start is not None:
        (checkpoints / start.name).symlink_to(start.resolve(), target_is_directory=True)
        write_file(checkpoints / "latest", start.name + "\n")
    else:  # where the ledger has a position, a run does not begin anew
        ledger = list(itertools.takewhile(lambda line: json.loads(line)["event"] != "position", ledger))
    if ledger:
        (folder / FILE_NAME).write_bytes(b"".join(ledger))


def compare(told: dict, again: dict, steps: range, weights: dict[int, str], weights_again: dict[int, str]) -> int:
    """Print what differs, first the first; the exit code."""
    differences, saved = 0, []
    for step in steps:
        if (step in told) != (step in again):
            differences += 1
            print(f"step {step}: finite in {'the run' if step in told else 'the replay'} alone")
            continue
        for key in COMPARED if step in told else ():
            if told[step][key] != again[step][key]:
                differences += 1
                print(f"step {step}: {key} was {told[step][key]!r}, is {again[step][key]!r}")
        if step in weights and (step in weights_again or step == steps[-1]):
            saved.append(step)
            if weights[step] != weights_again.get(step):
                differences += 1
                print(f"step {step}: the weights had fingerprint {weights[step]}, have {weights_again.get(step)}")
    if differences:
        print(f"different: {differences} values in steps {steps[0]} to {steps[-1]}, the first listed first")
        return DIFFERENT
    of = ", ".join(f"step {step} ({weights[step]})" for step in saved)
    print(
        f"equal to the bit: steps {steps[0]} to {steps[-1]}"
        + (f", and the weights of {of}" if of else "; weights were not saved there")
    )
    return EQUAL
