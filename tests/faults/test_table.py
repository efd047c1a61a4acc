"""docs/faults.md names tests that there are."""

import re

from rank_processes import REPOSITORY


def test_every_test_of_the_table_exists():
    page = (REPOSITORY / "docs" / "faults.md").read_text().split("\n## ")[0]  # after it: what watching costs
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert named or row.startswith("| fault"), f"no test: {row}"
        for path, name in named:
            assert f"\ndef {name}(" in (REPOSITORY / path).read_text(), f"{path} has no {name}"
