"""scripts/gpu_check.sh with stand-ins for nvidia-smi, nvcc and Python: what it counts and what it refuses, not what it
runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# One test each part of pytest: passed, or skipped where the part's name or its -k is among SKIPPED.
PYTHON = """#!/bin/sh
case " $* " in *" -m pytest "*) ;; *) exit 0 ;; esac
for name in $SKIPPED; do
  case " $* " in *" -k $name "*) echo "test_x.py::test_x SKIPPED"; echo "== 1 skipped in 0.1s =="; exit 0 ;; esac
done
echo "test_x.py::test_x PASSED"; echo "== 1 passed in 0.1s =="
"""


@pytest.fixture
def check(tmp_path):
    """Runs a copy of the script elsewhere, so that a mistake of its paths writes nothing here."""
    for name, text in {
        "nvidia-smi": "#!/bin/sh\necho 'A GPU'\n",
        "nvcc": "#!/bin/sh\necho 'release 13'\n",
        "python3": PYTHON,
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "repository/scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts/gpu_check.sh", tmp_path / "repository/scripts")

    def run(*arguments, **environment):
        script = tmp_path / "repository/scripts/gpu_check.sh"
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        clean = {name: value for name, value in os.environ.items() if name not in ("OUT", "PYTHON", "CUDA_HOME")}
        return subprocess.run(
            ["bash", str(script), *arguments], cwd=tmp_path, env=clean | {"PATH": path, "SKIPPED": ""} | environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("skipped", "parts"), [("", []), ("memcheck racecheck", ["memcheck", "racecheck"]), ("rms_norm", ["tests_norm"])]
)
def test_a_part_whose_tests_were_all_skipped_counts_as_failed(check, tmp_path, skipped, parts):
    """pytest ends with 0: compute-sanitizer was missing, and the check said that all had passed."""
    result = check(OUT=str(tmp_path / "out"), SKIPPED=skipped)
    assert result.returncode == len(parts), result.stdout
    summary = (tmp_path / "out/summary.txt").read_text()
    said = sorted(line for line in summary.splitlines() if "none passed" in line)  # they run beside each other
    assert said == [f"{part}: none passed" for part in parts]
    assert f"{len(parts)} parts failed" in result.stdout
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert archive.extractfile("out/summary.txt").read().decode() == summary


def test_the_archive_lies_beside_the_folder_whatever_its_name_ends_in(check, tmp_path):
    assert check(OUT=f"{tmp_path}/out/").returncode == 0
    assert (tmp_path / "out.tar.gz").exists()
    assert not (tmp_path / "out/.tar.gz").exists()


def test_wheels_are_found_from_where_the_script_is_called(check, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/pytest.whl").touch()
    result = check("packages", OUT=str(tmp_path / "out"))
    assert "== wheels" in result.stdout
    assert result.returncode == 0


def test_wheels_that_are_not_there_are_refused(check, tmp_path):
    """They were passed over, and minutes later a package was missing."""
    result = check("pakages", OUT=str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr == f"gpu_check: the folder of wheels {tmp_path}/pakages is not there\n"
    assert not (tmp_path / "out").exists()
