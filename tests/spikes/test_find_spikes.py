"""tools/find_spikes.py over a journal and over a CSV: the same spikes, and a picture that stands alone."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from rank_processes import REPOSITORY
from test_detector import layer_signals, signals, with_fault


def find(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "find_spikes.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_curves(folder: Path) -> None:
    losses, norms = signals(1500, 4)
    with_fault("poisoned batches", losses, norms, at=400, length=30)
    with_fault("corrupted moment", losses, norms, at=800, length=300)
    with_fault("label noise", losses, norms, at=1480, length=20)
    rows = [(number + 1, float(losses[number]), float(norms[number])) for number in range(1500)]
    with (folder / "curve.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "grad_norm"), *rows])
    with (folder / "journal.jsonl").open("w") as file:
        for step, loss, norm in rows:
            file.write(json.dumps({"event": "step", "step": step, "loss": loss, "grad_norm": norm}) + "\n")


def test_journal_and_csv_tell_of_the_same_spikes(tmp_path):
    write_curves(tmp_path)
    found = find(tmp_path / "journal.jsonl", "--picture", tmp_path / "picture.html")
    assert found.returncode == 0, found.stderr
    assert found.stdout == find(tmp_path / "curve.csv").stdout
    kinds = [line.split()[0] for line in found.stdout.splitlines()[:-1]]
    assert kinds == ["benign", "malignant", "not"]
    assert "from step 401, called at 404" in found.stdout
    picture = (tmp_path / "picture.html").read_text()
    assert "gradient norm" in picture
    assert 'src="https://' not in picture, "it opens without a network"

    assert "activation_rms" not in found.stdout, "this journal tells of no layers"
    unusual = find(tmp_path / "curve.csv", "--benign-steps", 10)
    assert unusual.stdout.split()[0] == "malignant"


def test_layers_of_a_journal_are_watched(tmp_path):
    losses, norms = signals(300, 4)
    with (tmp_path / "journal.jsonl").open("w") as file:
        for number, layers in enumerate(layer_signals(300, 3, 4)):
            layers["activation_rms"][2] *= 3.0 if 200 <= number < 230 else 1.0
            event = {"event": "step", "step": number + 1, "loss": float(losses[number]), "layers": layers}
            file.write(json.dumps({**event, "grad_norm": float(norms[number])}) + "\n")
    found = find(tmp_path / "journal.jsonl")
    assert found.stdout.splitlines()[-1] == "1 spikes in 300 steps"
    assert found.stdout.startswith("benign     from step 201, called at 204, to step ")
    assert "; activation_rms of layer 3 " in found.stdout


def test_what_is_no_curve_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for path, text in (
        ("missing.csv", "does not exist"),
        ("other.csv", "columns are ['a', 'b']; step and loss are needed"),
    ):
        ended = find(tmp_path / path)
        assert ended.returncode == 2
        assert text in ended.stderr
        assert "Traceback" not in ended.stderr
