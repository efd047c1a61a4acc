"""README's commands of training: each is accepted as it stands there."""

import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LINES = [line.strip() for line in (REPOSITORY / "README.md").read_text().splitlines()]
COMMANDS = sorted({line.partition("#")[0].strip() for line in LINES if line.startswith("python pretrain_k2.py ")})
assert len(COMMANDS) >= 4, "README has its commands in another form"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_have_a_plan(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    import pretrain_k2

    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")  # and no run folder of this machine
    monkeypatch.chdir(tmp_path)
    arguments = [part for part in shlex.split(command)[2:] if part != "--dry-run"]
    assert pretrain_k2.main([*arguments, "--plan"]) == 0
    assert "parameters (" in capsys.readouterr().out
