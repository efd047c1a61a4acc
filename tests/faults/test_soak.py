"""The soak in short (the long form is `make soak`): it ends, nothing is lost, and its arithmetic adds up."""

import re
import time

from drill import hashed_small_run
from rank_processes import pretrain, results_of
from soak import RANKS, SETTINGS, compare, soak
from soak_report import seconds_without_faults, where_time_went

STEPS = 20


def test_short_soak_loses_nothing_and_tells_where_the_time_went(tmp_path):
    small_config = hashed_small_run(tmp_path)
    found = soak(small_config, tmp_path, STEPS, apart=6.0, step_seconds=0.0, seed=4)
    print(found)
    assert sum(found.faults.values()) >= 2
    assert not found.complaints
    whole = [*SETTINGS, f"train.steps={STEPS}", f"run.folder={tmp_path / 'whole'}"]
    began = time.time()
    results_of(pretrain(RANKS, small_config, whole, tmp_path / "whole_output"))
    took, without_faults = time.time() - began, seconds_without_faults(tmp_path / "whole", began, STEPS, STEPS - 1)
    assert 0 < without_faults < 1.5 * took, "saves and evaluations included"
    assert compare(tmp_path / "whole", tmp_path / "run", STEPS) == []
    assert list((tmp_path / "scratch").iterdir()) == []
    lines = where_time_went(found.wall_seconds, tmp_path / "run", without_faults)
    print(*lines, sep="\n")
    shares = [float(re.search(r"([\d.]+) %$", line).group(1)) for line in lines[:4]]
    assert abs(sum(shares) - 100) < 0.5
    assert f"{STEPS} kept" in lines[5]
    repeated = float(re.search(r"([\d.]+) s", lines[1]).group(1))
    goodput = 100 * without_faults / (found.wall_seconds - repeated)
    rounding = 0.05 + goodput * 0.05 / (found.wall_seconds - repeated - 0.05)  # of both printed figures
    assert abs(float(re.search(r"goodput ([\d.]+) %", lines[-1]).group(1)) - goodput) < 1.01 * rounding
