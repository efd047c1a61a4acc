"""How a program must end when it ends early."""

from rank_processes import Outcome

MISTAKE, STOPPED, NOT_FINITE, INTERRUPTED = 2, 3, 5, 130  # exit codes: the user's mistake; a stop for a reason


def says_one_line(outcomes: list[Outcome], exit_code: int, *parts: str) -> None:
    """Every rank ends with `exit_code`; together they print one line on stderr, with all `parts` in it."""
    printed = "".join(outcome.stderr for outcome in outcomes)
    assert [outcome.exit_code for outcome in outcomes] == [exit_code] * len(outcomes), printed
    assert printed.endswith("\n") and printed.count("\n") == 1, printed
    for part in parts:
        assert part in printed
