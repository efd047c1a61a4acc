"""Python values as TOML text, and `tomllib`, which reads such text (tomli before Python 3.11).

Written is only what a configuration holds: tables one level deep, inline tables, plain values.
"""

import json
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["toml_document", "toml_value", "tomllib"]


def toml_value(value: Any) -> str:
    """One value as TOML; text is quoted as a basic string, whose escapes are JSON's."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON leaves DEL as it is, TOML wants it escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def toml_document(tables: dict[str, dict[str, Any]]) -> str:
    """A document of named tables, in the order given."""
    blocks = []
    for name, table in tables.items():
        lines = [f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
