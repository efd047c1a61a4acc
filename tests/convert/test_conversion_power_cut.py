"""After a power cut at any system call of a conversion: nothing under the result's name, or all of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from conversions import export_model, import_model, write_llama
from power_cut import Recorder

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "toy" / "tokenizer.json"


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("convert", "load", "result"),
    [(import_model, "hf", "save/checkpoints/step_00000000"), (export_model, "run", "save")],
    ids=["from-hf", "to-hf"],
)
def test_a_power_cut_leaves_no_part_of_a_result_under_its_name(
    tmp_path: Path, convert: Callable, load: str, result: str
) -> None:
    write_llama(tmp_path / "hf", layers=1)
    shutil.copyfile(TOKENIZER, tmp_path / "hf" / "tokenizer.json")
    import_model(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "disk").mkdir()
    recorder = Recorder(tmp_path / "disk")
    with recorder.active():
        convert(tmp_path / load, tmp_path / "disk" / "save")
    wanted, published = hashes(tmp_path / "disk" / result), 0
    assert "finished.jsonl" not in wanted
    # Moments before a rename cannot differ under the result's name: the first half holds only such
    for moment in recorder.moments[len(recorder.moments) // 2 :]:
        for way, make in recorder.states(moment, drawn=1):
            make(tmp_path / "state")
            if (tmp_path / "state" / result).exists():
                assert hashes(tmp_path / "state" / result) == wanted, f"before {moment.call}, {way}"
                published += 1
            shutil.rmtree(tmp_path / "state")
    assert published
