"""The end of a tool: its exit code, and one line on stderr."""

import errno
import os
import subprocess
import sys

import pytest

from k2_megatron.runtime.tool import CheckFailed, run_tool

ENDINGS = [
    (ValueError("x is 1; give 2"), 2, "some_tool: x is 1; give 2\n"),
    (CheckFailed("x was altered"), 1, "some_tool: x was altered\n"),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "folder/x"),
        2,
        "some_tool: folder/x: No space left on device; make room, and give the same command again\n",
    ),
    (OSError(errno.ENOSPC, "no room; make some", "folder/x"), 2, "some_tool: folder/x: no room; make some\n"),
    (OSError("no number of the system's"), 2, "some_tool: no number of the system's\n"),
    (KeyboardInterrupt(), 130, "some_tool: stopped; nothing was written\n"),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDINGS, ids=[repr(error) for error, _, _ in ENDINGS])
def test_an_error_is_one_line_and_its_code(error, code, said, capsys):
    def work() -> int:
        raise error

    assert run_tool("some_tool", work, interrupted="stopped; nothing was written") == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the exit", "while it prints"])
def test_a_reader_that_has_enough_is_no_error(lines):
    script = "from k2_megatron.runtime.tool import run_tool\nimport sys\n"
    script += f"def work():\n    sys.stdin.read()\n    print('line\\n' * {lines})\n    return 0\n"
    script += "sys.exit(run_tool('some_tool', work))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_what_is_ours_keeps_its_traceback_and_a_code_is_handed_on():
    with pytest.raises(AssertionError, match="ours"):
        run_tool("some_tool", _ours)
    assert run_tool("some_tool", lambda: 10) == 10


def _ours() -> int:
    raise AssertionError("ours")
