"""SIGKILL at random instants: the resumed run is the uninterrupted one, to the bit (the long form is `make drill`)."""

from drill import LAYOUTS, drill, table


def test_five_kills_lose_nothing(small_config, tmp_path):
    rows = list(drill(small_config, tmp_path, kills=5, seed=11, layout=LAYOUTS[2]).values())
    print(table(rows))
    assert sum(row.tried for row in rows) == 5
    for row in rows:
        assert row.survived == row.tried, row.text()
        assert not row.lost, row.text()
