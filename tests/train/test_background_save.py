"""A save in the background holds the weights of the moment it was asked for, whatever training does meanwhile."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_processes import Rank, run_ranks
from small_run import checkpoint_tensors
from training_rank import TORCH_KERNELS, training_rank

from k2_megatron.train.checkpoints.file_hash import hash_file
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.load import load_weights
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest, verify_files
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import model_state, optimizer_state, weight_fingerprint

SETTINGS = ["parallel.tensor=2", "model.layers=2"]
SHARED = ["parallel.distributed_optimizer=true", "model.layers=2"]


def _change_at_once(config_path: Path, checkpoints: Path, copies: bool) -> tuple[str, str, str, float, float]:
    """Save, overwrite every weight while the save is in flight, and load what was saved."""
    with training_rank(config_path, SETTINGS, TORCH_KERNELS) as (config, _, _, parts):
        asked = weight_fingerprint(parts.chunks, parts.device)
        saver = CheckpointWriter(checkpoints, parts.groups, asynchronous=True)
        if not copies:
            _share_the_tensors(saver)
        saver.save(2, config, parts, {})
        with torch.no_grad():
            for parameter in parts.chunks[0].parameters():
                parameter.fill_(3.0)
        saved = saver.wait()
        try:
            load_weights(saved.folder, parts.chunks, parts.device)
            loaded = weight_fingerprint(parts.chunks, parts.device)
        except CheckpointError as error:
            loaded = str(error)
        return asked, saved.weights, loaded, saved.stall_seconds, saved.seconds


def _share_the_tensors(saver: CheckpointWriter) -> None:
    """The fault this test is for: the background thread reads the tensors that training changes."""
    import k2_megatron.train.checkpoints.save as checkpoint_save

    class Shared(checkpoint_save._Plan):
        def __init__(self, replicas, *, copies, agreement) -> None:
            super().__init__(replicas, copies=None, agreement=agreement)

        def write(self, folder, group):
            import time

            time.sleep(1.0)  # training changes the weights meanwhile
            return super().write(folder, group)

    checkpoint_save._Plan = Shared


@pytest.fixture(scope="module")
def changed_at_once(small_config: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("background")
    outcomes = run_ranks(_change_at_once, 2, (small_config, folder / "checkpoints", True), folder / "ranks")
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return folder / "checkpoints", [outcome.result for outcome in outcomes]


def test_weights_changed_during_the_save_are_not_in_it(changed_at_once):
    _, results = changed_at_once
    for asked, saved, loaded, stall_seconds, seconds in results:
        assert asked == saved == loaded
        assert stall_seconds < seconds


def test_a_background_save_is_as_complete_as_any(changed_at_once):
    checkpoints, _ = changed_at_once
    (folder,) = complete_checkpoints(checkpoints)
    manifest = read_manifest(folder)
    assert (checkpoints / "latest").read_text() == folder.name + "\n"
    assert sorted(manifest["files"]) == sorted(path.name for path in folder.iterdir() if path.name != "k2.json")
    assert verify_files(folder, manifest) == []


def test_without_the_copy_the_fingerprint_tells(small_config: Path, tmp_path: Path):
    outcomes = run_ranks(_change_at_once, 2, (small_config, tmp_path / "checkpoints", False), tmp_path / "ranks")
    assert "fingerprint" in outcomes[0].result[2], outcomes[0].stderr


SNAPSHOTS = 100
# As small as a model gets
TINY = [
    *("model.layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.heads=2", "model.kv_heads=2"),
    "train.precision=bfloat16",
]


def _save_and_change_everything(config_path: Path, folder: Path) -> list[tuple[int, str]]:
    """(turn, file) of every file of a save in the background that is not what a save in the foreground wrote of the
    same state, though weights, main parameters, moments and generators change as soon as it is asked for."""
    different = []
    os.fsync = lambda _descriptor: None  # no power cut is tried here
    with training_rank(config_path, TINY, TORCH_KERNELS) as (config, _, _, parts):
        optimizer_state(parts.optimizer, model_state(parts.chunks), loading=True)  # makes the moments
        savers = [CheckpointWriter(folder / f"{mode}", parts.groups, asynchronous=mode) for mode in (False, True)]
        for turn in range(SNAPSHOTS):
            hashes = []
            for saver in savers:
                saver.save(turn, config, parts, {})
                if saver is savers[1]:
                    _change_everything(parts)
                    if turn == 0:
                        with pytest.raises(AssertionError, match="a save is in flight"):
                            saver.save(turn, config, parts, {})
                saved = saver.wait().folder
                hashes.append({path.name: hash_file(path) for path in saved.glob("*.distcp")})
                shutil.rmtree(saved)
            different += [(turn, name) for name in hashes[0] if hashes[0][name] != hashes[1].get(name)]
    return different


def _change_everything(parts) -> None:
    with torch.no_grad():
        for parameter in parts.chunks[0].parameters():
            parameter.normal_()  # draws from the generator, which is saved as well
        for part in parts.optimizer.chained_optimizers:
            for main, state in part.optimizer.state.items():
                for tensor in (main, *state.values()):
                    tensor.normal_()


def test_a_hundred_snapshots_are_of_the_moment_they_were_asked_for(small_config: Path, tmp_path: Path):
    outcome = Rank(_save_and_change_everything, (small_config, tmp_path / "saves"), {}, tmp_path / "rank").finish()
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result == []


def _held_by_a_save(config_path: Path, checkpoints: Path) -> tuple[int, int]:
    """(bytes of the storages that a save in the background keeps, bytes of the tensors in them), of this rank, after
    two saves, whose storages are the same."""
    import k2_megatron.train.checkpoints.save as checkpoint_save

    held = []

    class Watched(checkpoint_save._Plan):
        def write(self, folder, group):
            shards = [shard for value in self.tensors.values() for shard in getattr(value, "_local_shards", [value])]
            parts = [shard._sh_ten.data for shard in shards if hasattr(shard, "_sh_ten")]
            parts += [shard.tensor for shard in shards if hasattr(shard, "tensor")]
            storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
            held.append((storages, sum(part.nbytes for part in parts)))
            return super().write(folder, group)

    checkpoint_save._Plan = Watched
    with training_rank(config_path, SHARED, TORCH_KERNELS) as (config, _, _, parts):
        optimizer_state(parts.optimizer, model_state(parts.chunks), loading=True)  # makes the moments
        saver = CheckpointWriter(checkpoints, parts.groups, asynchronous=True)
        for step in (1, 2):
            saver.save(step, config, parts, {})
            saver.wait()
    assert held[0] == held[1]
    storages, tensors = held[1]
    return sum(storages.values()), tensors


def test_a_background_save_keeps_its_rank_s_part_alone(small_config: Path, tmp_path: Path):
    """Of two replicas each holds half of the state once, and no view of anything larger."""
    outcomes = run_ranks(_held_by_a_save, 2, (small_config, tmp_path / "checkpoints"), tmp_path / "ranks")
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    parts = [outcome.result for outcome in outcomes]
    assert all(storages == tensors > 0 for storages, tensors in parts), parts
    stored = sum(tensor.nbytes for tensor in checkpoint_tensors(tmp_path / "checkpoints" / "step_00000002").values())
    assert sum(tensors for _, tensors in parts) == stored
    assert max(tensors for _, tensors in parts) < 0.55 * stored


def test_the_thread_that_writes_computes_on_the_device_of_its_rank(tmp_path: Path, monkeypatch) -> None:
    """CUDA's current device is each thread's own, and is 0 in a new one; a GPU's part is played here."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "index", index))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_how: None)
    torch.cuda.set_device(3)
    groups: Any = SimpleNamespace(rank=0, timeout=None)
    saver = CheckpointWriter(tmp_path, groups, asynchronous=False)
    assert saver._thread.submit(torch.cuda.current_device).result() == 3
