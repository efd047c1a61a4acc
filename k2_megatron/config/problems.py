"""What is wrong with a configuration: gathered as values, raised once."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from k2_megatron.config.toml_text import toml_value


class Problem(NamedTuple):
    """One mistake: the key, the value found there (None: nothing), and what would be right."""

    key: str
    found: Any
    remedy: str

    def __str__(self) -> str:
        found = "" if self.found is None else f" = {toml_value(self.found)}"
        return f"{self.key}{found}: {self.remedy}"


def raise_problems(source: str, problems: Iterable[Problem]) -> None:
    """Raise one ValueError that lists every problem of `source`; return when there is none."""
    lines = [f"  {problem}" for problem in problems]
    if lines:
        count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
        raise ValueError("\n".join([f"{source}: {count}", *lines]))
