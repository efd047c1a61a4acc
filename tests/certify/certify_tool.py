"""tools/certify_layout.py as the tests call it: its own code in this process, its ranks in forked ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

from loaded_tool import loaded_tool
from rank_processes import run_ranks

from k2_megatron.runtime.mistakes import leave, run_program


def run_record(arguments: Sequence[str], fault: Callable[[], None] | None = None) -> None:
    """certify_layout.py record, in this process, and its exit."""
    if fault is not None:
        fault()
    leave(lambda: run_program(loaded_tool("certify_layout").record, arguments))


def record_on_ranks(
    ranks: int, arguments: Sequence[str], folder: Path, fault: Callable[[], None] | None = None
) -> list[int]:
    """The exit codes of the ranks of `record`, whose output goes to `folder`."""
    return [outcome.exit_code for outcome in run_ranks(run_record, ranks, (arguments, fault), folder)]
