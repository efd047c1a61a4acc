"""`python -m k2_megatron.config`: every key of a run's TOML file with its default and its meaning."""

import argparse
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from k2_megatron.config.schema import SECTIONS
from k2_megatron.config.toml_text import toml_value


def reference() -> str:
    """All keys, section by section, each with its default ("required" where it has none) and its meaning."""
    return "\n\n".join(
        "\n".join([f"[{name}]  # {_one_line(section.__doc__)}", *_keys(section)]) for name, section in SECTIONS.items()
    )


def _keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in table.model_fields.items():
        yield f"{prefix + key:<24} {_default(field.default)}"
        yield f"    {_one_line(field.description)}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and get_origin(part) is None and issubclass(part, BaseModel):
                yield from _keys(part, f"{prefix}{key}.")


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "left out"
    return toml_value(value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value)


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def main() -> None:
    """It takes no arguments: a configuration that is given is not read, which must not look like a check of it."""
    argparse.ArgumentParser(
        prog="python -m k2_megatron.config",
        description="Print every key of a run's TOML file. To check a file: python tools/plan_run.py FILE",
    ).parse_args()
    print(reference())


if __name__ == "__main__":
    main()
