"""tools/continue_text.py asked for what no model can do: one line before the model is loaded, and exit code 2."""

import contextlib
from types import SimpleNamespace

import pytest
from endings import MISTAKE
from loaded_tool import loaded_tool
from rank_processes import REPOSITORY

from k2_megatron.runtime.mistakes import run_program


@pytest.fixture
def tool():
    return loaded_tool("continue_text")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--temperature", "-1"), "--temperature -1.0: give a number from 0"),
        (("--temperature", "nan"), "--temperature nan: give a number from 0"),
        (("--top-k", "0"), "--top-k 0: give 1 or more"),
        (("--new-tokens", "-5"), "--new-tokens -5: give 1 or more"),
        (("--seed", str(1 << 63)), f"--seed {1 << 63}: give a number of 64 bits"),
        (("--prompt", "\udcff"), r"--prompt '\udcff': give text in the terminal's encoding, UTF-8"),
    ],
)
def test_option_without_a_meaning(tool, capsys, arguments, says):
    """The line comes from the tool's own file, and is a user's mistake all the same."""
    assert run_program(tool.main, ["nowhere", "--prompt", "x", *arguments]) == MISTAKE
    assert capsys.readouterr().err == f"error: {says}\n"


def test_tokenizer_with_more_pieces_than_the_model(tool, capsys, monkeypatch):
    """Its ids would be other words to the model, or none."""
    path = REPOSITORY / "examples" / "toy" / "tokenizer.json"
    config = SimpleNamespace(model=SimpleNamespace(vocab_size=1000), data=SimpleNamespace(tokenizer=str(path)))
    monkeypatch.setattr(tool, "loaded_model", lambda run: contextlib.nullcontext((config, 7, None)))
    assert run_program(tool.main, ["run", "--prompt", "x"]) == MISTAKE
    assert f"{path} has 4096 pieces, the model 1000" in capsys.readouterr().err
