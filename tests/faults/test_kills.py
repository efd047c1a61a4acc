"""SIGKILL at random instants: the resumed run is the uninterrupted one, to the bit (the long form is `make drill`)."""

from drill import LAYOUTS, drill, table
from drill_faults import KILLS


def test_five_kills_lose_nothing(small_config, tmp_path):
    faults = [*KILLS, KILLS[0]]
    rows = list(drill(small_config, tmp_path, faults, seed=11, layout=LAYOUTS[2]).values())
    print(table(rows))
    assert sum(row.tried for row in rows) == len(faults) == 5
    for row in rows:
        assert row.survived == row.tried, row.text()
        assert not row.lost, row.text()
