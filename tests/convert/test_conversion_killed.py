"""SIGKILL at many moments of a conversion: the same command then goes on or begins anew, and the result is the same.

The same means every file of the result, byte for byte as a conversion that nothing disturbed writes it. Until its last
rename a killed conversion has nothing under the name of the result.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from conversions import export_model, import_model, write_llama

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.torch_dist import MANIFEST, checkpoint_folder
from k2_megatron.convert.verify import verify_export, verify_training
from k2_megatron.convert.work import HashedFile

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
Conversion = Callable[[Path, Path], object]
CONVERSIONS: dict[str, Conversion] = {
    "from-hf": lambda hf, save: import_model(hf, save, precision="bfloat16"),
    "to-hf": lambda hf, save: export_model(hf.parent / "run", save, shard_bytes=100_000),
    "reshard": lambda hf, save: reshard(hf.parent / "run", save, tensor=2, pipeline=3, workers=1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and beside it the run that it was imported to."""
    folder = tmp_path_factory.mktemp("killed")
    write_llama(folder / "hf")
    import_model(folder / "hf", folder / "run")
    return folder / "hf"


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a result, by its path there; the result's own path, which k2.json and start.toml name, is left out,
    and so is the hash of k2.json's content, which has the path in it."""

    def content(path: Path) -> bytes:
        if path.name == MANIFEST:
            manifest = json.loads(path.read_bytes())
            return json.dumps({key: value for key, value in manifest.items() if key != "xxh3"}).encode()
        return path.read_bytes()

    own = str(folder).encode()
    return {
        str(path.relative_to(folder)): xxhash.xxh3_128(content(path).replace(own, b"")).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Instants:
    """Counts the moments at which something of a conversion reaches the disk, and kills this process at the n-th."""

    def __init__(self, kill_at: int | None) -> None:
        self.passed, self.kill_at = 0, kill_at

    def install(self) -> None:
        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, self._counting(getattr(os, name)))
        write = HashedFile.write

        def half_then_all(file: HashedFile, data) -> None:
            view = memoryview(data).cast("B")
            write(file, view[: len(view) // 2])
            self._pass()
            write(file, view[len(view) // 2 :])

        HashedFile.write = half_then_all  # type: ignore[method-assign]

    def _counting(self, call):
        def counted(*arguments, **how):
            self._pass()
            return call(*arguments, **how)

        return counted

    def _pass(self) -> None:
        if self.passed == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1


def run_in_fork(convert: Conversion, hf: Path, save: Path, kill_at: int | None) -> tuple[int, int]:
    """(exit code, instants passed) of a conversion in a process of its own."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        instants = Instants(kill_at)
        instants.install()
        convert(hf, save)
        writer.send(instants.passed)

    process = context.Process(target=child)
    process.start()
    process.join()
    return process.exitcode or 0, reader.recv() if process.exitcode == 0 else -1


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_killed_at_any_write_gives_the_same_result_when_repeated(
    model: Path, tmp_path: Path, name: str
) -> None:
    convert = CONVERSIONS[name]
    code, instants = run_in_fork(convert, model, tmp_path / "whole", None)
    assert code == 0
    wanted = hashes(tmp_path / "whole")
    # The first, some of the long middle, every instant of the end (which reshard shares with from-hf)
    commit = range(instants - (4 if name == "reshard" else 12), instants)
    for kill_at in sorted({0, *range(1, instants - 12, max(1, instants // 5)), *commit}):
        save = tmp_path / f"killed{kill_at}"
        code, _passed = run_in_fork(convert, model, save, kill_at)
        assert code == -signal.SIGKILL, kill_at
        if published(name, save):  # the kill came after the last rename
            assert finished(name, save, wanted), (
                f"at instant {kill_at} of {instants} something unfinished was published"
            )
            continue
        code, _passed = run_in_fork(convert, model, save, None)
        assert code == 0, f"could not go on after a kill at instant {kill_at} of {instants}"
        assert hashes(save) == wanted, f"another result after a kill at instant {kill_at} of {instants}"


def test_workers_die_with_the_command_and_the_command_repeated_finishes(model: Path, tmp_path: Path) -> None:
    """Several processes: the one that was started is killed, as a batch system's time limit would."""
    import_model(model, tmp_path / "whole", precision="bfloat16")
    command = [sys.executable, str(TOOL), "from-hf", "--load", str(model), "--save", str(tmp_path / "run"), "--workers",
               "2", "--precision", "bfloat16", "--no-proof"]  # fmt: skip
    journal = tmp_path / "run" / "checkpoints" / "converting_step_00000000" / "finished.jsonl"
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and started.poll() is None:
        time.sleep(0.001)
    workers = children_of(started.pid)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and not is_zombie(pid)]:
        assert time.monotonic() < deadline, f"{left} outlived the conversion"
        time.sleep(0.01)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kept from an earlier start" in again.stdout
    own = {"start.toml", "checkpoints/step_00000000/k2.json"}  # name the run folder
    found, wanted = hashes(tmp_path / "run"), hashes(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert {path for path in wanted if found[path] != wanted[path]} <= own


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# What comes after the last shard is written, and takes minutes on a large model: tables are there, the name is not
LAST_STEP = {
    "from-hf": ("k2_megatron.convert.import_model.prove", {"proof": True}),
    "to-hf": ("k2_megatron.convert.export_model.prove", {"proof": True}),
    "reshard": ("k2_megatron.convert.reshard.seal", {}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_second_start_is_refused_until_the_result_is_published(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, (step, options), starts = tmp_path / "save", LAST_STEP[name], [1]

    def convert() -> object:
        if name == "reshard":
            return CONVERSIONS[name](model, save)
        way, source = (import_model, model) if name == "from-hf" else (export_model, model.parent / "run")
        return way(source, save, **options)

    def start_again(*_arguments) -> str:
        if starts == [1]:
            starts.append(2)
            with pytest.raises(ConversionError, match="another process is writing"):
                convert()
        return "agreed"

    monkeypatch.setattr(step, start_again)
    convert()
    assert starts == [1, 2]
    folder = save if name == "to-hf" else checkpoint_folder(save)
    assert (verify_export if name == "to-hf" else verify_training)(folder, 1) == []
    assert not list(tmp_path.rglob("*.lock"))


def test_nothing_of_an_earlier_attempt_is_published(model: Path, tmp_path: Path) -> None:
    """Killed at its last instant, between the journal's end and the result's name; then repeated with other options."""
    import_model(model, tmp_path / "whole", pipeline=3)
    import_model(model, tmp_path / "run")
    made = tmp_path / "run" / "checkpoints"
    (made / "step_00000000").rename(made / "converting_step_00000000")
    saved = import_model(model, tmp_path / "run", pipeline=3)
    assert {path.name for path in saved.iterdir()} == {
        path.name for path in checkpoint_folder(tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("kept_bytes", [0, 10, -7], ids=["nothing", "half-the-first-line", "half-the-last-line"])
def test_a_journal_that_a_kill_cut_is_gone_on_with(model: Path, tmp_path: Path, kept_bytes: int) -> None:
    code, _passed = run_in_fork(CONVERSIONS["from-hf"], model, tmp_path / "run", 100)
    assert code == -signal.SIGKILL
    journal = tmp_path / "run" / "checkpoints" / "converting_step_00000000" / "finished.jsonl"
    lines = journal.read_bytes().count(b"\n")
    assert lines > 3
    os.truncate(journal, kept_bytes % journal.stat().st_size)
    code, _passed = run_in_fork(CONVERSIONS["from-hf"], model, tmp_path / "run", 40)  # what is added then must be read
    assert code == -signal.SIGKILL
    added = journal.read_bytes().count(b"\n")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        import_model(model, tmp_path / "run", precision="bfloat16")
    # One line is the plan; the cut line's file was made again, and others after it
    assert added >= (lines if kept_bytes < 0 else 2)
    assert f"{added - 1} files kept" in output.getvalue()
    import_model(model, tmp_path / "whole", precision="bfloat16")
    own = {"start.toml", "checkpoints/step_00000000/k2.json"}  # name the run folder
    found, wanted = hashes(tmp_path / "run"), hashes(tmp_path / "whole")
    assert {path for path in wanted if found.get(path) != wanted[path]} <= own


def published(name: str, save: Path) -> bool:
    return save.exists() if name == "to-hf" else any(save.glob("checkpoints/step_*"))


def finished(name: str, save: Path, wanted: dict[str, str]) -> bool:
    """All there, but for a pointer that came not to be written; readers do without it."""
    found = hashes(save)
    missing = {path for path in wanted if found.get(path) != wanted[path]}
    return missing <= {"checkpoints/latest"} and (name == "to-hf" or checkpoint_folder(save).is_dir())
