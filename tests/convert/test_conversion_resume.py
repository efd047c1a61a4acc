"""A conversion that was killed goes on where it was, and gives the same files; several processes give the same too."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conversions import export_model, import_model, require_same_tensors, source_of, write_llama
from legacy_checkpoint import legacy_folder, options
from manifest_of_before import write_manifest_of_before

from k2_megatron.convert import logits
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.files import OpenFiles
from k2_megatron.convert.fingerprint import fingerprint_rows, fingerprint_rows_reference
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.names import places
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.source import KEY_PREFIX
from k2_megatron.convert.to_hugging_face import HuggingFaceJob
from k2_megatron.convert.to_torch_dist import TorchDistJob
from k2_megatron.convert.torch_dist import checkpoint_folder, read_manifest
from k2_megatron.convert.verify import verify_export, verify_training
from k2_megatron.convert.work import require_space


class Killed(BaseException):
    pass


@pytest.fixture
def die_after(monkeypatch: pytest.MonkeyPatch):
    """Make a job die when its n-th unit is half written, or live again; counts the units begun."""

    def set_up(job: type, units: int | None) -> list[str]:
        run, begun = job.run, []

        def dying(self, unit):
            begun.append(unit.file)
            if units is not None and len(begun) > units:
                (self.folder / unit.file).write_bytes(b"half a fi")
                raise Killed
            return run(self, unit)

        monkeypatch.setattr(job, "run", dying)
        return begun

    return set_up


def file_hashes(folder: Path) -> dict:
    return json.loads((folder / "k2.json").read_text())["files"]


def test_from_hf_goes_on_after_a_kill(tmp_path: Path, die_after, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "hf")
    whole = import_model(tmp_path / "hf", tmp_path / "whole", precision="bfloat16")
    with monkeypatch.context():
        die_after(TorchDistJob, 4)
        with pytest.raises(Killed):
            import_model(tmp_path / "hf", tmp_path / "run", precision="bfloat16")
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    monkeypatch.undo()
    begun = die_after(TorchDistJob, None)
    again = import_model(tmp_path / "hf", tmp_path / "run", precision="bfloat16")
    assert len(begun) == len(list(whole.glob("*.distcp"))) - 4
    first, second = file_hashes(whole), file_hashes(again)
    assert {name: first[name] for name in first if name.endswith(".distcp")} == {
        name: second[name] for name in second if name.endswith(".distcp")
    }


def test_to_hf_goes_on_after_a_kill_and_redoes_a_file_that_changed(
    tmp_path: Path, die_after, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    die_after(HuggingFaceJob, 2)
    with pytest.raises(Killed):
        export_model(tmp_path / "run", tmp_path / "out", shard_bytes=100_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    shard = sorted((tmp_path / ".out.converting").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    begun = die_after(HuggingFaceJob, None)
    export_model(tmp_path / "run", tmp_path / "out", shard_bytes=100_000)
    assert shard.name in begun
    assert len(begun) == len(list((tmp_path / "out").glob("*.safetensors"))) - 1
    require_same_tensors(tmp_path / "hf", tmp_path / "out")


def test_an_unfinished_conversion_of_something_else_is_not_continued(tmp_path: Path, die_after, monkeypatch) -> None:
    write_llama(tmp_path / "hf")
    die_after(TorchDistJob, 2)
    with pytest.raises(Killed):
        import_model(tmp_path / "hf", tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ConversionError, match="was begun by a conversion of other files or options"):
        import_model(tmp_path / "hf", tmp_path / "run", tensor=2)


def test_two_processes_make_the_same_files(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", kv_heads=2)
    one = import_model(tmp_path / "hf", tmp_path / "one", tensor=2)
    two = import_model(tmp_path / "hf", tmp_path / "two", tensor=2, workers=2)
    first, second = file_hashes(one), file_hashes(two)
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name.endswith(".distcp"))
    export_model(tmp_path / "two", tmp_path / "out", shard_bytes=100_000, workers=2)
    require_same_tensors(tmp_path / "hf", tmp_path / "out")


def test_reshard_keeps_every_bit_and_cuts_chunks_for_the_layout(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run", precision="bfloat16")
    write_manifest_of_before(checkpoint_folder(tmp_path / "run"))
    assert verify_training(checkpoint_folder(tmp_path / "run"), workers=1) == []
    reshard(tmp_path / "run", tmp_path / "other", tensor=4, pipeline=3, workers=1)
    before, after = source_of(tmp_path / "run"), source_of(tmp_path / "other")
    for kind in KEY_PREFIX:
        for place in places(before.shape):
            rows = place.entry.size(before.shape)[0]
            assert (before.read(kind, place, 0, rows) == after.read(kind, place, 0, rows)).all(), (kind, place)
    cuts = {"rows": 4, "columns": 4, "whole": 1}
    for place in places(after.shape):
        halves = 2 if place.entry.rows == "gate_up" else 1
        chunks = [
            chunk
            for chunk in after.stored.tensors[place.entry.ours].chunks
            if place.layer is None or chunk.offsets[0] == place.layer
        ]
        assert len(chunks) == cuts[place.entry.cut] * halves
        stage = {chunk.file.split("_")[2] for chunk in chunks}
        assert stage == {str(place.layer) if place.layer is not None else "0" if "emb" in place.entry.ours else "2"}
    old, new = (read_manifest(checkpoint_folder(tmp_path / name)) for name in ("run", "other"))
    assert old["weights"] == new["weights"]


def test_fingerprint_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    """And it does on the place, the name and the layer; that it is training's own is shown where training starts."""
    import numpy

    rows = numpy.random.default_rng(1).integers(0, 2**16, (301, 70), dtype=numpy.uint16)
    whole = fingerprint_rows("a", 3, 0, rows)
    assert whole == fingerprint_rows_reference("a", 3, 0, rows)
    counted = numpy.arange(301 * 70, dtype=numpy.uint16).reshape(301, 70) * numpy.uint16(40503)
    assert fingerprint_rows("a", 3, 0, counted) == 0x89966EE2EC9ECCB, "stored checkpoints carry fingerprints"
    parts = [fingerprint_rows("a", 3, first, rows[first : first + 43]) for first in range(0, 301, 43)]
    assert sum(parts) % 2**64 == whole
    for view in (rows[40:, 5:], rows[::3], rows.T, rows.view(numpy.uint32), rows[:1], rows[:0]):
        assert fingerprint_rows("a", None, 7, view) == fingerprint_rows_reference("a", None, 7, view)
    swapped = rows.copy()
    swapped[[5, 6]] = swapped[[6, 5]]
    others = [
        fingerprint_rows("b", 3, 0, rows),
        fingerprint_rows("a", 2, 0, rows),
        fingerprint_rows("a", 3, 0, swapped),
    ]
    assert len({whole, *others}) == 4
    for compute in (fingerprint_rows, fingerprint_rows_reference):  # the extension would read beyond its elements
        with pytest.raises(ValueError, match="b: the fingerprint takes elements of 2, 4 or 8 bytes, not uint8"):
            compute("b", 3, 0, rows.astype(numpy.uint8))


def test_each_conversion_leaves_its_record_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it came from, by what versions, with what outcome; and the result is sound by its own hashes."""
    monkeypatch.setattr(
        logits, "process_pool", lambda count, **_how: ThreadPoolExecutor(count)
    )  # a process of its own takes seconds to start
    folder = legacy_folder(tmp_path)
    import_legacy(options(tmp_path, proof=True), optimizer=True)
    export_model(tmp_path / "run", tmp_path / "out", proof=True)
    import_model(tmp_path / "out", tmp_path / "again", proof=True)
    reshard(tmp_path / "run", tmp_path / "cut", tensor=2, pipeline=1, workers=1)
    manifests = {name: read_manifest(checkpoint_folder(tmp_path / name)) for name in ("run", "again", "cut")}
    exported = json.loads((tmp_path / "out" / "k2_conversion.json").read_text())
    records = {
        str(folder): (manifests["run"]["legacy"], manifests["run"]["proof"]),
        str(checkpoint_folder(tmp_path / "run")): (exported, exported["proof"]),
        str(tmp_path / "out"): (manifests["again"]["conversion"], manifests["again"]["proof"]),
    }
    for source, (record, proof) in records.items():
        assert record["source"] == source
        assert record["versions"]["torch"]
        assert re.search(r"largest difference \S+ \(bound .* KL divergence \S+ \(bound", proof), proof
    assert manifests["cut"]["resharded"]["source"] == str(checkpoint_folder(tmp_path / "run"))
    assert {manifest["weights"] for manifest in manifests.values()} == {exported["weights"]}
    assert verify_export(tmp_path / "out", workers=1) == []
    assert {tuple(facts) for facts in exported["files"].values()} == {("bytes", "xxh3")}, "which others can check"
    for manifest in manifests.values():
        assert {tuple(facts) for facts in manifest["files"].values()} == {("bytes", "aes_lanes")}
    for name in manifests:
        assert verify_training(checkpoint_folder(tmp_path / name), workers=1) == []


def test_old_shards_that_changed_are_not_gone_on_with(tmp_path: Path, die_after, monkeypatch) -> None:
    folder = legacy_folder(tmp_path)
    die_after(TorchDistJob, 2)
    with pytest.raises(Killed):
        import_legacy(options(tmp_path), optimizer=True)
    monkeypatch.undo()
    os.utime(next(folder.rglob("*.pt")))
    with pytest.raises(ConversionError, match="was begun by a conversion of other files or options"):
        import_legacy(options(tmp_path), optimizer=True)


def test_a_checkpoint_of_many_files_is_read_with_few_of_them_open(tmp_path: Path) -> None:
    files = OpenFiles(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(100), *range(100)]:
        (tmp_path / str(number)).write_bytes(bytes([number]))
        assert os.pread(files.descriptor(str(number)), 1, 0) == bytes([number])
        assert len(os.listdir("/proc/self/fd")) <= before + 64
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_restart_asks_for_the_space_of_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "__0_weights_layer0.distcp").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=2_000_000))
    require_space(tmp_path / "begun", 4_900_000)
    with pytest.raises(ConversionError, match=r"needs 0\.01 GB, 0\.00 GB of an earlier start being there, and"):
        require_space(tmp_path / "begun", 5_100_000 + 4096)
    with pytest.raises(ConversionError, match=r"needs 0\.00 GB and its disk"):
        require_space(tmp_path / "new", 4_900_000)
