"""A pickle that runs code, in every place where a checkpoint holds one: refused by name, and it does not run.

The attack makes a folder, by three ways that pickles have to call something. Files are whole: zips, sizes and, where
the manifest has hashes, hashes are in order, as they would be from somebody who means harm.
"""

import functools
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversions import export_model, import_model, model_config, write_llama
from legacy_checkpoint import change, legacy_folder, options
from megatron.core.dist_checkpointing.mapping import ShardedObject
from rank_processes import Rank
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from k2_megatron.convert.describe import describe
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.torch_blob import object_blob
from k2_megatron.convert.torch_dist import checkpoint_folder
from k2_megatron.convert.torch_metadata import read_metadata, write_metadata
from k2_megatron.convert.transformers_model import TransformersModel
from k2_megatron.convert.verify import verify_training
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.train.checkpoints.file_hash import hash_file
from k2_megatron.train.checkpoints.folders import first_cause
from k2_megatron.train.checkpoints.load import _problems_of, _read
from k2_megatron.train.checkpoints.manifest import CheckpointError, manifest_text
from k2_megatron.train.checkpoints.pickles import pickle_problems
from k2_megatron.train.checkpoints.restricted_loading import RestrictedLoading


class Attack:
    """Unpickling it calls `call(*arguments)`."""

    def __init__(self, call: Callable, *arguments) -> None:
        self.calls = call, arguments

    def __reduce__(self):
        return self.calls


ATTACKS: dict[str, Callable[[Path], Attack]] = {
    "mkdir": lambda evil: Attack(os.mkdir, str(evil)),
    "exec": lambda evil: Attack(exec, f"import os; os.mkdir({str(evil)!r})"),
    "partial": lambda evil: Attack(functools.reduce, functools.partial(os.mkdir), [str(evil), 0o700]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_work_on_an_unrestricted_loader(tmp_path: Path, attack: str) -> None:
    pickle.loads(pickle.dumps(ATTACKS[attack](tmp_path / "evil")))
    assert (tmp_path / "evil").is_dir()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("attack", ATTACKS)
def test_tables_of_a_checkpoint(run: Path, tmp_path: Path, attack: str) -> None:
    write(checkpoint_folder(run), ".metadata", pickle.dumps(ATTACKS[attack](tmp_path / "evil")))
    for read in (lambda: describe(run), lambda: export_model(run, tmp_path / "out")):
        with pytest.raises(ConversionError, match="which no checkpoint of ours holds"):
            read()
    assert "which no checkpoint of ours holds" in "".join(verify_training(checkpoint_folder(run), workers=1))
    require_refused_by_training(checkpoint_folder(run))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_chunk_of_a_checkpoint(run: Path, tmp_path: Path, attack: str) -> None:
    checkpoint = checkpoint_folder(run)
    chunk = read_metadata(checkpoint).tensors["embedding.word_embeddings.weight"].chunks[0]
    content = bytearray((checkpoint / chunk.file).read_bytes())
    blob = object_blob(pickle.dumps(ATTACKS[attack](tmp_path / "evil"), 2))
    content[chunk.position : chunk.position + chunk.length] = (
        bytes(chunk.length - len(blob)) + blob
    )  # zips end at the end
    write(checkpoint, chunk.file, bytes(content))
    with pytest.raises(ConversionError, match="is not what a stored tensor holds"):
        export_model(run, tmp_path / "out")
    assert "is not what a stored tensor holds" in "".join(verify_training(checkpoint, workers=1))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_byte_object_of_a_checkpoint(run: Path, tmp_path: Path, attack: str) -> None:
    """Generator states and extra state: torch's reader unpickles them without restriction when training loads them."""
    checkpoint = checkpoint_folder(run)
    assert pickle_problems(checkpoint) == []
    objects = read_metadata(checkpoint).objects
    stored = objects["decoder.layers.mlp.linear_fc1._extra_state/shard_1_3"]
    blob = object_blob(pickle.dumps(ATTACKS[attack](tmp_path / "evil"), 2))
    content = (checkpoint / stored.file).read_bytes()
    tables = read_metadata(checkpoint)
    tables.objects.update(dict.fromkeys(objects, stored._replace(position=len(content), length=len(blob))))
    write(checkpoint, stored.file, content + blob)
    write_metadata(checkpoint, tables)
    write(checkpoint, ".metadata", (checkpoint / ".metadata").read_bytes())
    require_refused_by_training(checkpoint)
    with pytest.raises(ConversionError, match="which no checkpoint of ours holds"):
        reshard(run, tmp_path / "other", tensor=1, pipeline=1, workers=1)
    assert not (tmp_path / "evil").exists()


def replace_object(checkpoint: Path, blob: bytes) -> None:
    """Let every byte object of the checkpoint be `blob`."""
    tables = read_metadata(checkpoint)
    stored = next(iter(tables.objects.values()))
    content = (checkpoint / stored.file).read_bytes()
    tables.objects.update(dict.fromkeys(tables.objects, stored._replace(position=len(content), length=len(blob))))
    write(checkpoint, stored.file, content + blob)
    write_metadata(checkpoint, tables)
    write(checkpoint, ".metadata", (checkpoint / ".metadata").read_bytes())


def change_tables(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change the tables as torch's own classes have them."""
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(whole)
    write(checkpoint, ".metadata", pickle.dumps(whole))


class FilledAtOnce(OrderedDict):
    """Pickled as OrderedDict([...]): its entries are arguments."""

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)


def a_bare_pickle_before_an_innocent_zip(checkpoint: Path, evil: Path) -> None:
    """zipfile looks at the end of a file, torch.load at its beginning."""
    old = io.BytesIO()
    torch.save(Attack(os.mkdir, str(evil)), old, _use_new_zipfile_serialization=False)
    replace_object(checkpoint, old.getvalue() + object_blob(pickle.dumps({}, 2)))


def an_object_that_looks_like_a_tensor(checkpoint: Path, evil: Path) -> None:
    replace_object(checkpoint, object_blob(pickle.dumps(Attack(os.mkdir, str(evil)), 2)))

    def disguise(whole: Any) -> None:
        for entry in whole.state_dict_metadata.values():
            if isinstance(entry, BytesStorageMetadata):
                vars(entry)["chunks"] = []

    change_tables(checkpoint, disguise)


def places_that_come_as_arguments(checkpoint: Path, evil: Path) -> None:
    replace_object(checkpoint, object_blob(pickle.dumps(Attack(os.mkdir, str(evil)), 2)))
    change_tables(checkpoint, lambda whole: vars(whole).update(storage_data=FilledAtOnce(whole.storage_data)))


def places_in_another_folder(checkpoint: Path, evil: Path) -> None:
    blob = object_blob(pickle.dumps(Attack(os.mkdir, str(evil)), 2))
    (checkpoint.parent / "elsewhere").write_bytes(blob)

    def lead_away(whole: Any) -> None:
        for index, info in whole.storage_data.items():
            if index.offset is None:
                info.relative_path, info.offset, info.length = "../elsewhere", 0, len(blob)

    change_tables(checkpoint, lead_away)


DISGUISES = {
    a_bare_pickle_before_an_innocent_zip: "does not begin as a zip does",
    an_object_that_looks_like_a_tensor: "which no checkpoint of ours holds",
    places_that_come_as_arguments: "which no checkpoint of ours holds",
    places_in_another_folder: "it points outside its folder",
}


@pytest.mark.parametrize("disguise", DISGUISES, ids=lambda disguise: disguise.__name__)
def test_a_disguised_byte_object_is_seen_and_loading_it_runs_nothing(run: Path, tmp_path: Path, disguise) -> None:
    """Also what the inspection would let pass meets a reader that calls nothing."""
    checkpoint, evil = checkpoint_folder(run), tmp_path / "evil"
    key = next(iter(read_metadata(checkpoint).objects))
    disguise(checkpoint, evil)
    (problem,) = pickle_problems(checkpoint)
    assert DISGUISES[disguise] in problem
    outcome = Rank(load_one_object, (checkpoint, key), {}, tmp_path / "rank").finish()
    assert not evil.exists()
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.result.startswith("refused: "), outcome.result


def load_one_object(checkpoint: Path, key: str) -> str:
    """Load one byte object as training does, uninspected: what was loaded, or why not."""
    connect(single_rank(), find_device(0), 60.0)
    try:
        return str(RestrictedLoading().load({"found": ShardedObject.empty_from_unique_key(key)}, checkpoint))
    except CheckpointException as error:
        return f"refused: {first_cause(error)}"
    finally:
        disconnect()


def extra_state(data: torch.Tensor | None) -> bytes:
    """As megatron-core stores that of one layer."""
    stored = io.BytesIO()
    torch.save([data], stored)
    return stored.getvalue()


def test_extra_state_with_data_is_seen_and_not_handed_to_the_layers(run: Path, tmp_path: Path) -> None:
    """A tensor of bytes is data to every loader; Transformer Engine's layers then unpickle the bytes."""
    checkpoint = checkpoint_folder(run)
    content = pickle.dumps(Attack(os.mkdir, str(tmp_path / "evil")))
    replace_object(checkpoint, extra_state(torch.frombuffer(bytearray(content), dtype=torch.uint8)))
    (problem,) = pickle_problems(checkpoint)
    assert "holds data: Transformer Engine would unpickle it" in problem
    assert "_extra_state holds data" in load_extra_state(checkpoint, tmp_path / "rank")


@pytest.mark.parametrize("empty", [None, torch.empty(0, dtype=torch.uint8)], ids=["none", "no-bytes"])
def test_empty_extra_state_loads(run: Path, tmp_path: Path, empty: torch.Tensor | None) -> None:
    """Transformer Engine's, without fp8, is a tensor of no bytes."""
    checkpoint = checkpoint_folder(run)
    replace_object(checkpoint, extra_state(empty))
    assert pickle_problems(checkpoint) == []
    assert load_extra_state(checkpoint, tmp_path / "rank") == "loaded"


def load_extra_state(checkpoint: Path, folder: Path) -> str:
    outcome = Rank(read_objects, (checkpoint, list(read_metadata(checkpoint).objects)), {}, folder).finish()
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.result


def read_objects(checkpoint: Path, keys: list[str]) -> str:
    """Read the state of layers for a model as training does, uninspected: "loaded", or why not."""
    connect(single_rank(), find_device(0), 60.0)
    try:
        state = {f"{key}._extra_state": ShardedObject.empty_from_unique_key(key) for key in keys}
        _read({"model": state}, checkpoint)
        return "loaded"
    except CheckpointError as error:
        return f"refused: {error}"
    finally:
        disconnect()


def test_an_honest_byte_object_loads(run: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_folder(run)
    key = next(iter(read_metadata(checkpoint).objects))
    outcome = Rank(load_one_object, (checkpoint, key), {}, tmp_path / "rank").finish()
    assert outcome.result == "{'found': None}", outcome.stderr


def require_refused_by_training(checkpoint: Path) -> None:
    alone: Any = SimpleNamespace(rank=0, world_size=1)
    (problem,) = _problems_of(checkpoint, alone)
    assert "which no checkpoint of ours holds" in problem


PLACES: dict[str, Callable[[dict, Attack], object]] = {
    "arguments": lambda state, attack: vars(state["args"]).update(rank=attack),
    "model": lambda state, attack: state["model"]["language_model"].update(pooler=attack),
    "optimizer": lambda state, attack: state["optimizer"]["optimizer"]["state"][0].update(step=attack),
    "schedule": lambda state, attack: state["opt_param_scheduler"].update(max_lr=attack),
    "generators": lambda state, attack: state["rng_state"][0].update(np_rng_state=attack),
    "key": lambda state, attack: state.update({"more": {(1, attack): 2}}),
}


@pytest.mark.parametrize("place", PLACES)
def test_old_shards(tmp_path: Path, place: str) -> None:
    folder = legacy_folder(tmp_path)
    for attack, make in ATTACKS.items():
        file = folder / "mp_rank_01_000" / "model_optim_rng.pt"  # not the first that is read
        change(file, lambda state, make=make: PLACES[place](state, make(tmp_path / "evil")))
        for read in (lambda: describe(folder), lambda: import_legacy(options(tmp_path), optimizer=False)):
            with pytest.raises(ConversionError, match=r"cannot be read safely: it (names|holds more than)") as refused:
                read()
            assert "weights_only" not in str(refused.value), "torch tells its readers to load without restriction"
        assert not (tmp_path / "evil").exists(), attack
        legacy_folder_again(folder)


def legacy_folder_again(folder: Path) -> None:
    """The files as they were: unpickling the wounded ones in this process would run the attack."""
    (folder / "mp_rank_01_000" / "model_optim_rng.pt").write_bytes(
        (folder / "mp_rank_00_000" / "model_optim_rng.pt").read_bytes()
    )


@pytest.mark.parametrize("format_", ["zip", "old"])
def test_an_old_shard_that_is_nothing_but_an_attack(tmp_path: Path, format_: str) -> None:
    folder = legacy_folder(tmp_path)
    file = folder / "mp_rank_00_000" / "model_optim_rng.pt"
    for make in ATTACKS.values():
        torch.save(make(tmp_path / "evil"), file, _use_new_zipfile_serialization=format_ == "zip")
        assert zipfile.is_zipfile(file) == (format_ == "zip")
        with pytest.raises(ConversionError, match="cannot be read safely"):
            import_legacy(options(tmp_path), optimizer=True)
        assert not (tmp_path / "evil").exists()


def test_a_model_folder_of_pickles_is_not_opened(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    torch.save({"w": Attack(os.mkdir, str(tmp_path / "evil"))}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="first saved as safetensors with transformers"):
        import_model(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "evil").exists()


def test_code_that_comes_with_a_model_is_neither_run_nor_passed_on(tmp_path: Path) -> None:
    """transformers imports a folder's own code where auto_map names it, if it is told to trust it."""
    write_llama(tmp_path / "hf")
    config = {**model_config(tmp_path / "hf"), "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'evil')!r})\nclass Config: pass\n")
    TransformersModel(tmp_path / "hf").logits(torch.zeros(1, 4, dtype=torch.int64))
    import_model(tmp_path / "hf", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert "auto_map" not in model_config(tmp_path / "out")


def write(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and its size and hash in the manifest."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "k2.json").read_text())
    manifest["files"][name] = hash_file(checkpoint / name)
    (checkpoint / "k2.json").write_text(manifest_text(manifest))
