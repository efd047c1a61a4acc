"""verify, and conversions of wounded checkpoints: each wound is named, and nothing is converted silently."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import export_model, import_model, write_llama

from k2_megatron.convert.describe import describe
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.export_model import ExportOptions, exported_facts
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.torch_dist import TorchDistSource, checkpoint_folder, read_manifest
from k2_megatron.convert.verify import HashCheck, verify_export, verify_training
from k2_megatron.train.checkpoints.file_hash import hash_file
from k2_megatron.train.checkpoints.folders import latest_checkpoint
from k2_megatron.train.checkpoints.imported_record import find_record
from k2_megatron.train.checkpoints.manifest import CheckpointError, manifest_text


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_llama(folder / "hf", kv_heads=2)
    import_model(folder / "hf", folder / "run", tensor=2, precision="bfloat16")
    return folder / "run"


@pytest.fixture
def run(sound_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound_run, tmp_path / "run")
    return tmp_path / "run"


def weights_file(checkpoint: Path) -> Path:
    return checkpoint / "__0_weights_layer1.distcp"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def replace_text(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_manifest(checkpoint: Path, **changes) -> None:
    manifest = json.loads((checkpoint / "k2.json").read_text())
    (checkpoint / "k2.json").write_text(manifest_text({**manifest, **changes}))


def mix_steps(checkpoint: Path) -> None:
    """The manifest of another step in this folder."""
    edit_manifest(checkpoint, step=941)


def mix_tensors(checkpoint: Path) -> None:
    """A layer's file from elsewhere, and a manifest that agrees with it: hashes are right, the weights are not."""
    shutil.copyfile(checkpoint / "__0_weights_layer2.distcp", weights_file(checkpoint))
    manifest = json.loads((checkpoint / "k2.json").read_text())
    manifest["files"][weights_file(checkpoint).name] = hash_file(weights_file(checkpoint))
    edit_manifest(checkpoint, files=manifest["files"])


WOUNDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sound": (lambda c: None, ""),
    "truncated": (lambda c: os.truncate(weights_file(c), 5000), "layer1.distcp has 5000 bytes"),
    "flipped": (lambda c: flip(weights_file(c), weights_file(c).stat().st_size // 2), "layer1.distcp was altered"),
    "flipped-moment": (lambda c: flip(c / "__0_main_first.distcp", 9000), "main_first.distcp was altered"),
    "missing": (lambda c: weights_file(c).unlink(), "layer1.distcp is missing"),
    "no-tables": (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
    "extra": (lambda c: (c / "__9_0.distcp").write_bytes(b"?"), "__9_0.distcp is not in the manifest"),
    "mixed-steps": (mix_steps, "belongs to step 941"),
    "mixed-tensors": (mix_tensors, "belong to another checkpoint"),
    "version": (lambda c: edit_manifest(c, format=3), "format 3"),
    "altered-manifest": (
        lambda c: replace_text(c / "k2.json", '"consumed_samples": 0', '"consumed_samples": 8'),
        "k2.json is damaged (its content was altered",
    ),
    "no-manifest": (lambda c: (c / "k2.json").unlink(), "no k2.json"),
    "cut-manifest": (lambda c: os.truncate(c / "k2.json", 200), "k2.json is damaged"),
    "dangling-link": (
        lambda c: (weights_file(c).unlink(), weights_file(c).symlink_to("/nowhere")),
        "layer1.distcp is missing",
    ),
}


@pytest.mark.parametrize("wound", WOUNDS)
def test_verify_names_the_wound(run: Path, wound: str) -> None:
    inflict, text = WOUNDS[wound]
    checkpoint = checkpoint_folder(run)
    inflict(checkpoint)
    problems = verify_training(checkpoint, workers=1)
    assert bool(problems) == bool(text)
    assert text in "; ".join(problems)


def set_at(manifest: dict, keys: tuple[str, ...], value: object) -> dict:
    first, *rest = keys
    return {**manifest, first: set_at(manifest[first], tuple(rest), value) if rest else value}


def test_a_manifest_of_another_form_is_one_line(run: Path) -> None:
    """Whatever JSON stands in its place, or in that of one of its values: an error in words, or no use of it at all."""
    checkpoint = checkpoint_folder(run)
    manifest = json.loads((checkpoint / "k2.json").read_text())
    file = weights_file(checkpoint).name
    places = [(key,) for key in manifest]
    places += [("config", key) for key in manifest["config"]]
    places += [("config", "model", key) for key in manifest["config"]["model"]]
    places += [("files", file), ("files", file, "bytes"), ("files", file, "aes_lanes")]
    wounds: list[object] = [None, {}, [], "x", 7, -1.5]
    edited = [*wounds, *(set_at(manifest, place, value) for place in places for value in wounds)]
    told = []
    for content in edited:
        (checkpoint / "k2.json").write_text(json.dumps(content))
        for use in (describe, facts_for_export, files_to_hash):
            try:
                use(checkpoint)
            except (ConversionError, CheckpointError, OSError) as error:
                told.append(str(error))
    assert len(told) > len(edited)
    assert not [text for text in told if "\n" in text]


def facts_for_export(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    TorchDistSource(checkpoint, manifest)
    exported_facts(ExportOptions(checkpoint, checkpoint), manifest, find_record(checkpoint, manifest), tied=False)


def files_to_hash(checkpoint: Path) -> None:
    HashCheck(checkpoint, read_manifest(checkpoint)["files"]).units()


@pytest.mark.parametrize("content", [None, {"config": {}}], ids=["null", "empty-configuration"])
def test_verify_and_reshard_name_a_manifest_of_another_form(run: Path, tmp_path: Path, content: dict | None) -> None:
    checkpoint = checkpoint_folder(run)
    manifest = json.loads((checkpoint / "k2.json").read_text())
    (checkpoint / "k2.json").write_text(manifest_text({**manifest, **content}) if content else "null")
    assert "k2.json is damaged" in "; ".join(verify_training(checkpoint, workers=1))
    with pytest.raises(ConversionError, match=r"k2\.json is damaged"):
        reshard(run, tmp_path / "other", tensor=1, pipeline=1, workers=1)


@pytest.mark.parametrize("wound", ["truncated", "flipped", "missing", "mixed-steps", "mixed-tensors", "version"])
def test_a_wounded_checkpoint_is_not_converted(run: Path, tmp_path: Path, wound: str) -> None:
    """to-hf reads no hashes (it would read seven times as much): the fingerprint of what it reads must agree."""
    WOUNDS[wound][0](checkpoint_folder(run))
    with pytest.raises((ConversionError, OSError)):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError):
        reshard(run, tmp_path / "other", tensor=1, pipeline=1, workers=1)
    assert not list((tmp_path / "other").glob("checkpoints/step_*"))


@pytest.mark.parametrize("pointer", ["", "step_000", "step_00000007\n", None], ids=["empty", "cut", "stale", "missing"])
@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_where_latest_names_nothing_the_checkpoint_is_taken_that_a_run_would_take(
    run: Path, pointer: str | None, inner: str, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000002").mkdir()  # of a copy that was interrupted
    assert (checkpoint_folder(run / inner).name, capsys.readouterr().out) == ("step_00000000", "")
    (checkpoints / "latest").unlink()
    if pointer is not None:
        (checkpoints / "latest").write_text(pointer)
    assert checkpoint_folder(run / inner) == latest_checkpoint(checkpoints)[0] == checkpoints / "step_00000000"
    told = capsys.readouterr().out
    assert told.startswith(f"{checkpoints / 'latest'} {'is missing' if pointer is None else 'says'}"), told
    assert told.endswith(": step_00000000 is taken, the newest whole one\n")


def test_a_pointer_to_nothing_where_nothing_is_left(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000000")
    with pytest.raises(ConversionError, match=r"which is no complete checkpoint, and .* holds no other"):
        checkpoint_folder(run)


@pytest.mark.parametrize("wound", ["sound", "flipped", "missing", "config"])
def test_verify_of_an_exported_model(run: Path, tmp_path: Path, wound: str) -> None:
    export_model(run, tmp_path / "hf", shard_bytes=100_000)
    shard = tmp_path / "hf" / "model-00002-of-00004.safetensors"
    if wound == "flipped":
        flip(shard, shard.stat().st_size - 3)
    elif wound == "missing":
        shard.unlink()
    elif wound == "config":
        (tmp_path / "hf" / "config.json").write_text("{}")
    found = "; ".join(verify_export(tmp_path / "hf", workers=1))
    assert {"sound": "", "flipped": "was altered", "missing": "is missing", "config": "config.json has 2 bytes"}[
        wound
    ] in found
    assert bool(found) == (wound != "sound")


def test_a_full_disk_is_told_before_anything_is_written(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConversionError, match="make room"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / ".out.converting").exists()


def test_inspect_tells_step_layout_and_sizes(run: Path) -> None:
    text = describe(run)
    for part in ("step 0", "converted-tp2-pp1", "bfloat16", "128x64", "exp_avg_sq", "6 chunks"):
        assert part in text, f"{part} is not in\n{text}"


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="exists"):
        export_model(run, tmp_path / "out")
    with pytest.raises(ConversionError, match="exists"):
        reshard(run, run, tensor=1, pipeline=1, workers=1)
