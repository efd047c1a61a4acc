"""What a conversion starts: its processes once, and none of torch, whose import costs more than a small conversion."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conversions import import_model, write_llama

from k2_megatron.convert import workers
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.reshard import reshard

MODULES = "import_model, export_model, reshard, verify, describe, legacy_check, compare, to_torch_dist, to_hugging_face"


def test_commands_and_their_workers_import_no_torch() -> None:
    """import_legacy alone may: it holds the old code's forward pass. Its workers import legacy_check."""
    code = f"from k2_megatron.convert import {MODULES}; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_process_that_dies_between_two_phases_is_told(tmp_path: Path) -> None:
    with workers.Workers(2) as processes:
        assert dict(processes.each(abs, [-1, -2])) == {-1: 1, -2: 2}
        for process in processes._pool._processes.values():
            process.kill()
            process.join()
        with pytest.raises(ConversionError, match="a worker process died"):
            list(processes.each(abs, [-1, -2]))


def test_one_pool_serves_all_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "hf", layers=1)
    import_model(tmp_path / "hf", tmp_path / "run")
    pools = []

    def pool(count: int) -> ThreadPoolExecutor:  # in place of processes, which take seconds to start
        pools.append(ThreadPoolExecutor(count))
        return pools[-1]

    monkeypatch.setattr(workers, "process_pool", pool)
    reshard(tmp_path / "run", tmp_path / "cut", tensor=2, pipeline=1, workers=2)  # hash, fingerprint, write, compare
    assert len(pools) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        pools[0].submit(print)
