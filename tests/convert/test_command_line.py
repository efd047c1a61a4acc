"""tools/convert_checkpoint.py with the mistakes that people make: one line that says what to do, and no result."""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
from conversions import export_model, import_model, write_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from convert_checkpoint import main

from k2_megatron.convert.describe import describe
from k2_megatron.convert.to_torch_dist import TorchDistJob


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (hf), the run it was imported to (run), and things that are neither."""
    folder = tmp_path_factory.mktemp("command_line")
    write_llama(folder / "hf")
    import_model(folder / "hf", folder / "run")
    (folder / "file").write_text("text")
    (folder / "file.json").write_text("{}")
    (folder / "empty").mkdir()
    return folder


def told(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what stands on stderr beside the progress bars)."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([*arguments])
        except SystemExit as left:
            code = int(left.code or 0)
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith(("convert  ", "check  "))]
    return code, "\n".join(line for line in lines if "━" not in line)


SAVES = ("to-hf", "from-hf", "from-k2-legacy", "reshard")
NEITHER = "neither a checkpoint|cannot be read|holds no mp_rank|is no folder"


@pytest.mark.parametrize("load", ["nowhere", "file", "empty", "file/below"])
@pytest.mark.parametrize("command", [*SAVES, "inspect", "verify"])
def test_what_is_no_checkpoint_is_called_so(sound: Path, tmp_path: Path, command: str, load: str) -> None:
    save = ["--save", str(tmp_path / "new")] if command in SAVES else []
    code, text = told([command, "--load", str(sound / load), "--workers", "1", *save])
    require_one_line(text, NEITHER)
    assert str(sound / load) in text
    assert code == 2
    assert not (tmp_path / "new").exists()


SAVED = {
    "a-file": ("file", "exists; remove it or give another --save|is no folder; give another --save"),
    "below-a-file": ("file/below", "file is no folder; give another --save"),
    "a-run-with-checkpoints": ("run", "exists; remove it or give another --save"),
}


@pytest.mark.parametrize("place", SAVED)
@pytest.mark.parametrize("command", ["to-hf", "from-hf", "reshard"])
def test_a_place_that_cannot_be_written_is_named(sound: Path, command: str, place: str) -> None:
    save, wanted = SAVED[place]
    load = sound / ("hf" if command == "from-hf" else "run")
    code, text = told([command, "--load", str(load), "--save", str(sound / save), "--workers", "1"])
    require_one_line(text, wanted)
    assert code == 2


OPTIONS = {
    "no-workers": (["to-hf", "--workers", "0"], "argument --workers: 0 is less than 1"),
    "no-ranks": (["from-hf", "--tensor", "0"], "argument --tensor: 0 is less than 1"),
    "negative-stages": (["reshard", "--pipeline", "-2"], "argument --pipeline: -2 is less than 1"),
    "no-vocabulary": (["to-hf", "--vocab-size", "0"], "argument --vocab-size: 0 is less than 1"),
    "no-shards": (["to-hf", "--shard-gb", "0"], "argument --shard-gb: 0 GB is no size"),
    "nan-shards": (["to-hf", "--shard-gb", "nan"], "argument --shard-gb: nan GB is no size"),
    "unknown-dtype": (["to-hf", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "uneven-ranks": (["from-hf", "--tensor", "3"], "--tensor 3 does not divide vocab_size 128.*; 1, 2, 4 would"),
    "uneven-stages": (["reshard", "--pipeline", "2"], "--pipeline 2 does not divide 3 layers; 1, 3 would"),
    "small-vocabulary": (["from-hf", "--vocab-size", "100"], "has 128 entries in use, 100 rows cannot hold them"),
    "large-vocabulary": (["to-hf", "--vocab-size", "129"], "has 129 entries in use, 128 rows cannot hold them"),
    "no-configuration": (["from-hf", "--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
    "no-tokenizer": (["to-hf", "--tokenizer", "nowhere"], "nowhere holds no tokenizer file"),
    "no-such-tokenizer": (["to-hf", "--tokenizer", __file__], "holds no tokenizer file"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be_is_refused_before_anything_is_written(sound: Path, tmp_path: Path, name: str) -> None:
    options, wanted = OPTIONS[name]
    load = sound / ("hf" if options[0] == "from-hf" else "run")
    code, text = told(
        [options[0], "--load", str(load), "--save", str(tmp_path / "new"), "--workers", "1", *options[1:]]
    )
    require_one_line(text.splitlines()[-1], wanted)  # argparse says its usage before
    assert code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["to-hf", "from-hf", "reshard"])
def test_a_disk_that_fills_up_is_told_and_the_same_command_goes_on(sound: Path, tmp_path: Path, command: str) -> None:
    """A limit on the size of files stands for the disk: a write fails as it does there, after others succeeded."""
    load, save = sound / ("hf" if command == "from-hf" else "run"), tmp_path / "new"
    arguments = [command, "--load", str(load), "--save", str(save), "--workers", "1"]
    arguments += [] if command == "reshard" else ["--no-proof"]
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        writer.send(told(arguments))

    process = context.Process(target=child)
    process.start()
    process.join()
    code, text = reader.recv()
    require_one_line(text, r"(distcp|safetensors) cannot be written \(File too large\); make room")
    assert code == 2
    assert not (save if command == "to-hf" else save / "checkpoints" / "latest").exists()
    assert told(arguments) == (0, "")


SYSTEM = {
    errno.EACCES: "Permission denied; restore access to it",
    errno.ENOSPC: "No space left on device; make room",
    errno.ENOTDIR: "Not a directory; look at that path",
}


@pytest.mark.parametrize("number", SYSTEM)
def test_what_the_system_refuses_is_told_with_a_remedy(sound: Path, tmp_path: Path, monkeypatch, number: int) -> None:
    def refused(self, unit):
        raise OSError(number, os.strerror(number), str(sound / "hf" / "shard"))

    monkeypatch.setattr(TorchDistJob, "run", refused)
    code, text = told(["from-hf", "--load", str(sound / "hf"), "--save", str(tmp_path / "new"), "--workers", "1"])
    require_one_line(text, f"hf/shard: {SYSTEM[number]}")
    assert code == 2


OTHER_KINDS = {
    "to-hf": ("hf", "looks like a Hugging Face model, which from-hf reads"),
    "reshard": ("hf", "looks like a Hugging Face model, which from-hf reads"),
    "verify": ("nowhere", "is no folder; give a checkpoint"),
}


@pytest.mark.parametrize("command", OTHER_KINDS)
def test_a_folder_of_another_kind_is_sent_to_its_command(sound: Path, tmp_path: Path, command: str) -> None:
    load, wanted = OTHER_KINDS[command]
    save = ["--save", str(tmp_path / "new")] if command in SAVES else []
    code, text = told([command, "--load", str(sound / load), "--workers", "1", *save])
    require_one_line(text, wanted)
    assert code == 2


def test_inspect_tells_files_that_are_missing_or_cut(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert "NOT SOUND" not in describe(checkpoint)
    (checkpoint / "__0_weights_layer1.distcp").unlink()
    os.truncate(checkpoint / "__0_weights_layer2.distcp", 3000)
    text = describe(checkpoint)
    assert "NOT SOUND    __0_weights_layer1.distcp is missing" in text
    assert "NOT SOUND    __0_weights_layer2.distcp has 3000 bytes" in text


def test_an_interrupt_is_one_line(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self, unit):
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchDistJob, "run", interrupted)
    code, text = told(["from-hf", "--load", str(sound / "hf"), "--save", str(tmp_path / "new"), "--workers", "1"])
    require_one_line(text, "interrupted; the same command goes on")
    assert code == 130


def test_a_single_tokenizer_file_gets_the_name_that_readers_expect(sound: Path, tmp_path: Path) -> None:
    tokenizer = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"
    os.symlink(tokenizer, tmp_path / "my pieces.json")
    export_model(sound / "run", tmp_path / "out", tokenizer=tmp_path / "my pieces.json")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def require_one_line(text: str, pattern: str) -> None:
    assert text.count("\n") == 0, text
    assert re.search(pattern, text), text
    assert "Errno" not in text
