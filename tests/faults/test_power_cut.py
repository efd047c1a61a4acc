"""After a power cut, or a SIGKILL, at any system call of a save: the old checkpoint or the new one, whole, and the
journal and ledger of all its steps."""

import shutil
from pathlib import Path

from power_cut import Recorder
from rank_processes import Rank

from k2_megatron.data import ledger
from k2_megatron.data.ledger import Ledger
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.journal import read_steps
from k2_megatron.runtime.launch import single_rank
from k2_megatron.train.checkpoints.folders import complete_checkpoints, remove_unfinished
from k2_megatron.train.checkpoints.load import find_checkpoint
from k2_megatron.train.checkpoints.manifest import read_manifest, step_of, verify_files

# As small as a model gets: every state of its checkpoints is made and read. Kept two, so that old ones leave.
SETTINGS = [
    *("model.layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.heads=2", "model.kv_heads=2"),
    *("train.steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=2", "watchdog.heartbeat_seconds=3600.0"),
    *("train.evaluate_every_steps=", "train.evaluate_batches=", "data.held_out="),
]
DRAWN = 1  # state a moment in which every file has a fate of its own


def _train_and_cut(config_path: Path, folder: Path, scratch: Path) -> tuple[int, list[str]]:
    """Train under a recorder, then start from every state it saw: (how many, what was wrong with which)."""
    import pretrain_k2
    from k2_megatron.config import load_config

    settings = [f"run.folder={folder}", *SETTINGS]
    folder.mkdir()
    recorder = Recorder(folder)
    with recorder.active():
        assert pretrain_k2.main([str(config_path), *(part for key in settings for part in ("--set", key))]) == 0
    config, device = load_config(config_path, settings), find_device(0)
    tried, wrong, safe = 0, [], 0
    with cpu_stands_in_for_cuda(device.type):
        connect(single_rank(), device, 60.0)
        groups = build_groups(config.parallel)
        for moment in recorder.moments:
            found = []
            for way, make in recorder.states(moment, DRAWN):
                make(scratch)
                step, problem = _start_from(scratch, groups)
                if problem is None and step < safe:
                    problem = f"step {step} was found, and step {safe} was safe before"
                wrong += [f"before {moment.call}, {way}: {problem}"] if problem else []
                found.append(step)
                tried += 1
                shutil.rmtree(scratch)
            safe = max(safe, min(found))
        disconnect()
    if safe < config.train.steps:
        wrong.append(f"at the end step {safe} is safe")
    return tried, wrong


def _start_from(folder: Path, groups) -> tuple[int, str | None]:
    """(the step that a start in the folder goes on from, what it meets that it must not)."""
    remove_unfinished(folder / "checkpoints")
    try:
        newest, _ = find_checkpoint(folder / "checkpoints", groups)
        steps = read_steps(folder / "journal.jsonl") if (folder / "journal.jsonl").exists() else {}
        positions = [entry["step"] for entry in Ledger(folder).positions]
    except ValueError as error:
        return 0, str(error)
    step = 0 if newest is None else step_of(newest)
    for folder_of_step in complete_checkpoints(folder / "checkpoints"):  # also those that are kept for later
        problems = verify_files(folder_of_step, read_manifest(folder_of_step))
        if problems:
            return step, f"{folder_of_step.name} looks complete: {problems}"
    for what, told in (("journal", steps), ("ledger", positions)):
        if not set(range(1, step + 1)) <= set(told):
            return step, f"step {step} was found, and the {what} tells of {sorted(told)}"
    return step, None


def test_a_power_cut_at_any_call_leaves_the_old_checkpoint_or_the_new_one(small_config, tmp_path):
    arguments = (small_config, tmp_path / "run", tmp_path / "scratch")
    outcome = Rank(_train_and_cut, arguments, {}, tmp_path / "output").finish()
    assert outcome.exit_code == 0, outcome.stderr
    tried, wrong = outcome.result
    print(f"{tried} states")
    assert tried > 300
    assert wrong == []


def test_the_name_of_a_new_ledger_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(ledger, "sync", synced.append)
    for number in range(2):
        Ledger(tmp_path).record_position(number, "00")
    assert synced == [tmp_path]
