"""The estimate that a conversion prints before any work: all phases, the slower of core and disk."""

import itertools
from pathlib import Path

import pytest
from conversions import import_model, write_llama
from legacy_checkpoint import known_model, write_legacy

from k2_megatron.convert import estimate, work
from k2_megatron.convert.estimate import Phase, Speeds, estimate_text, sample
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.import_model import ImportOptions
from k2_megatron.convert.reshard import reshard

PHASES = [
    Phase("convert", 2.0, read_bytes=2_000_000_000, written_bytes=6_000_000_000, workers=2, start_seconds=1.0),
    Phase("proof", 4.0, read_bytes=4_000_000_000, start_seconds=5.0),
]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 2)


def test_a_phase_takes_what_its_cores_or_its_disk_need() -> None:
    text = estimate_text(PHASES, Speeds(core=2e9))
    assert "convert 6.00 GB 4 s, proof 4.00 GB 13 s: about 17 s with 2 workers (sampled: core 2.00 GB/s;" in text
    slow = estimate_text(PHASES, Speeds(core=2e9, read=4e9, write=0.5e9))
    assert "convert 6.00 GB 13 s, proof 4.00 GB 13 s: about 26 s" in slow
    assert "disk reads 4.00 GB/s, disk writes 0.50 GB/s" in slow
    assert "convert 6.00 GB 7 s, proof 4.00 GB 21 s" in estimate_text(PHASES, Speeds(core=1e9))
    assert "nothing sampled" in estimate_text(PHASES, Speeds())


def test_more_workers_than_cores_are_no_faster() -> None:
    assert "about 4 s with 8" in estimate_text([PHASES[0]._replace(workers=8)], Speeds(core=2e9))


def test_a_sample_leaves_nothing_and_a_folder_that_cannot_be_written_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_CORE_SAMPLE_SECONDS", 1e-3)
    (tmp_path / "file").write_bytes(b"1" * 1000)
    speeds = sample(PHASES, tmp_path, tmp_path / "not" / "yet")
    assert speeds.core and speeds.read and speeds.write
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sample(PHASES, tmp_path / "nothing", Path("/proc/nowhere"))[1:] == (None, None)
    assert sample([PHASES[0]._replace(read_bytes=1, written_bytes=1)], tmp_path, tmp_path) == Speeds()


def test_a_core_under_twice_the_work_is_half_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with each block: sixteen blocks of 4 MiB in the time of the sample, then eight."""
    rates = []
    for blocks in (16, 8):
        now = itertools.count(1.0, 1 / blocks)
        monkeypatch.setattr(estimate.time, "monotonic", now.__next__)
        monkeypatch.setattr(estimate, "_CORE_SAMPLE_SECONDS", 1.0)
        rates.append(estimate._core_rate())
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.2)


def test_it_is_printed_before_any_unit_of_work(tmp_path: Path, monkeypatch, capsys) -> None:
    """Verification of the source and the check of old shards are work, too."""

    class Began(Exception):
        pass

    def begins(*_arguments):
        raise Began

    write_llama(tmp_path / "hf", layers=1)
    import_model(tmp_path / "hf", tmp_path / "run")
    monkeypatch.setattr(work, "_run", begins)
    capsys.readouterr()
    with pytest.raises(Began):
        import_model(tmp_path / "hf", tmp_path / "other", proof=True)
    told = capsys.readouterr().out
    assert told.startswith("estimate: convert") and "read back and compare" in told and "proof" in told
    with pytest.raises(Began):
        reshard(tmp_path / "run", tmp_path / "cut", tensor=2, pipeline=1, workers=1)
    told = capsys.readouterr().out
    assert told.startswith("estimate: hash") and "fingerprint of the weights" in told
    write_legacy(tmp_path / "iter_0000941", *known_model(tmp_path / "known"), 1, 1)
    with pytest.raises(Began):
        import_legacy(ImportOptions(tmp_path / "iter_0000941", tmp_path / "old"), optimizer=True)
    assert capsys.readouterr().out.startswith("estimate: check of Adam's order")
