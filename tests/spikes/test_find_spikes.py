"""tools/find_spikes.py over a journal and over a CSV: the same spikes, and a picture that stands alone."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loaded_tool import loaded_tool
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


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """ended(content, *options, name="curve.csv") -> (exit code, stdout, stderr) over a file of that content."""
    tool = loaded_tool("find_spikes")

    def end(content: bytes | None, *options: str, name: str = "curve.csv") -> tuple[int, str, str]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["find_spikes.py", str(tmp_path / name), *options])
        code = tool.main()
        return code, *capsys.readouterr()

    return end


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "missing.csv", "missing.csv does not exist"),
        (None, ".", " is a folder; give a run's journal.jsonl"),
        (b"", "curve.csv", "columns are []; step and loss are needed"),
        (b"a,b\n1,2\n", "curve.csv", "columns are ['a', 'b']; step and loss are needed"),
        (b"step,loss\n", "curve.csv", "has a heading and no step below it"),
        (b"step,loss\n1,2.5\n2\n", "curve.csv", "curve.csv, line 3: loss is None, which is no number"),
        (b"step,loss\n1,x\n", "curve.csv", "curve.csv, line 2: loss is 'x', which is no number"),
        (b"step,loss\ninf,1\n", "curve.csv", "curve.csv, line 2: step is 'inf', which is no number"),
        (b"step,loss,grad_norm\n1,2,\n", "curve.csv", "curve.csv, line 2: grad_norm is '', which is no number"),
        (b"step,loss\n1,\xff\n", "curve.csv", "curve.csv cannot be read as a CSV: "),
        (b"{}\n", "journal.jsonl", "journal.jsonl tells of no step"),
        (b'{"event": "step", "step": 1}\n', "journal.jsonl", "journal.jsonl tells of no loss and grad_norm"),
    ],
)
def test_what_is_no_curve_is_named(ended, content, name, says):
    code, _, error = ended(content, name=name)
    assert code == 2
    assert error.startswith("find_spikes: ") and error.count("\n") == 1
    assert says in error


def test_options_that_do_not_fit_are_named(ended, tmp_path):
    curve = b"step,loss\n1,2\n"
    for options, says in (
        (("--window-steps", "-3"), "--window-steps -3: should be greater than or equal to 16"),
        (("--threshold", "nan"), "--threshold nan: should be a finite number"),
        (("--picture", str(tmp_path / "no" / "x.html")), f"{tmp_path}/no/x.html: No such file or directory; look"),
        (("--picture", str(tmp_path)), f"{tmp_path}: Is a directory; look"),
    ):
        code, _, error = ended(curve, *options)
        assert code == 2
        assert error.startswith(f"find_spikes: {says}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["curve.csv"], "nothing half-written is left"


def test_a_diverged_curve_of_losses_alone(ended):
    """A spreadsheet's file (it begins with a mark), with no gradient norms, whose end is not finite."""
    losses = [3.0 + 0.01 * (number % 7) for number in range(200)]
    losses[150:160] = [9.0] * 10
    rows = "".join(f"{number},{loss}\n" for number, loss in enumerate(losses))
    code, found, _ = ended(f"\ufeffstep,loss\n{rows}200,nan\n201,inf\n".encode())
    assert code == 0
    spike, count = found.splitlines()
    assert spike.startswith("benign     from step 150,")
    assert "gradient norm" not in spike, "none is known"
    assert count == "1 spikes in 200 steps; 2 steps not finite and left out, the first 200"
    _, few, _ = ended(b"step,loss\n1,2\n")
    assert "nothing is judged before 128 steps are known" in few


def test_a_smaller_batch_is_no_spike(tmp_path):
    """As in the run itself: its norms are larger, and the measure begins anew."""
    losses, norms = signals(900, 4)
    with (tmp_path / "journal.jsonl").open("w") as file:
        for number in range(900):
            norm, batch = (norms[number], 512) if number < 600 else (2 * norms[number], 128)
            event = {"event": "step", "step": number + 1, "loss": float(losses[number]), "grad_norm": float(norm)}
            file.write(json.dumps({**event, "samples": [0, batch], "sequence_length": 64}) + "\n")
    assert find(tmp_path / "journal.jsonl").stdout.startswith("0 spikes in 900 steps")
