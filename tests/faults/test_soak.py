"""The soak in short (the long form is `make soak`): it ends, nothing is lost, and its arithmetic adds up."""

import re

from rank_processes import pretrain, results_of
from soak import RANKS, SETTINGS, compare, soak, where_time_went

STEPS = 20


def test_short_soak_loses_nothing_and_tells_where_the_time_went(small_config, tmp_path):
    found = soak(small_config, tmp_path, STEPS, apart=6.0, step_seconds=0.0, seed=4)
    print(found)
    assert sum(found.faults.values()) >= 2
    assert not found.complaints
    whole = [*SETTINGS, f"train.steps={STEPS}", f"run.folder={tmp_path / 'whole'}"]
    results_of(pretrain(RANKS, small_config, whole, tmp_path / "whole_output"))
    assert compare(tmp_path / "whole", tmp_path / "run", STEPS) == []
    assert list((tmp_path / "scratch").iterdir()) == []
    lines = where_time_went(found, tmp_path / "run")
    print(*lines, sep="\n")
    shares = [float(re.search(r"([\d.]+) %$", line).group(1)) for line in lines[:4]]
    assert abs(sum(shares) - 100) < 0.5
    assert f"{STEPS} kept" in lines[5]
