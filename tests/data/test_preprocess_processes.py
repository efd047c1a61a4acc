"""tools/preprocess_data.py as processes: dead workers, killed parents, signals, full disks, tasks of a Slurm array."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from token_corpora import ROOT, make_job, outputs, write_jsonl

from k2_megatron.data.preprocess import preprocess


def tool(arguments, environment, **settings):
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **settings)


@pytest.mark.parametrize("shards_before", [0, 3])
def test_a_dead_worker_ends_the_run_with_its_name(tmp_path, speeches, toy_tokenizer, tool_environment, shards_before):
    """Killed before it took its first work (the pipe breaks on writing), or in the middle (it ends on reading)."""
    write_jsonl(tmp_path / "in.jsonl", speeches * 40)
    arguments = ["--input", tmp_path, "--tokenizer", toy_tokenizer, "--output-prefix", tmp_path / "out" / "x"]
    process = tool([*arguments, "--workers", 2, "--shard-size", "64K"], tool_environment)
    victim = None
    while victim is None and process.poll() is None:
        children = psutil.Process(process.pid).children()
        victim = next((child for child in children if "spawn_main" in " ".join(child.cmdline())), None)
    assert victim is not None, process.communicate()
    while process.poll() is None and len(list(tmp_path.glob("out/x.shards/*.json"))) < shards_before:
        time.sleep(0.002)
    victim.kill()
    killed = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - killed < 5
    assert f"(pid {victim.pid}) died with signal SIGKILL while it read" in error
    assert error.startswith("preprocess_data: worker ")
    assert "Traceback" not in error


def test_sigkill_of_everything_loses_only_open_shards(tmp_path, speeches, toy_tokenizer, tool_environment):
    write_jsonl(tmp_path / "in.jsonl", speeches * 10)
    common = ["--input", tmp_path / "in.jsonl", "--tokenizer", toy_tokenizer, "--shard-size", "64K", "--append-eod"]
    out = tmp_path / "out"
    process = tool([*common, "--workers", 2, "--output-prefix", out / "x"], tool_environment, start_new_session=True)
    while not list(out.glob("x.shards/*.json")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    clean = make_job(
        [tmp_path / "in.jsonl"], toy_tokenizer, tmp_path / "clean" / "x", shard_bytes=64 << 10, one_file=False
    )
    preprocess(clean, workers=1, max_bad_fraction=0.0)
    process = tool([*common, "--workers", 1, "--output-prefix", out / "x"], tool_environment)
    assert "0 rejected" in process.communicate(timeout=60)[0]
    assert outputs(out) == outputs(tmp_path / "clean")


def at_its_first_shard(tmp_path, speeches, toy_tokenizer, tool_environment) -> subprocess.Popen:
    """The tool with two workers and much to do, when a shard is finished."""
    write_jsonl(tmp_path / "in.jsonl", speeches * 40)
    arguments = ["--input", tmp_path, "--tokenizer", toy_tokenizer, "--output-prefix", tmp_path / "out" / "x"]
    arguments += ["--workers", 2, "--shard-size", "64K"]
    # A shell's background jobs ignore SIGINT, and so would this process where the tests are one.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = tool(arguments, tool_environment, preexec_fn=heard)
    while process.poll() is None and not list(tmp_path.glob("out/x.shards/*.json")):
        time.sleep(0.002)
    return process


def test_workers_end_quietly_when_their_parent_is_killed(tmp_path, speeches, toy_tokenizer, tool_environment):
    process = at_its_first_shard(tmp_path, speeches, toy_tokenizer, tool_environment)
    workers = psutil.Process(process.pid).children()
    process.kill()
    _, error = process.communicate(timeout=60)  # returns when the last worker has closed it
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert "Traceback" not in error


def test_ctrl_c_is_one_line(tmp_path, speeches, toy_tokenizer, tool_environment):
    process = at_its_first_shard(tmp_path, speeches, toy_tokenizer, tool_environment)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in error.splitlines() if " MB/s " not in line]  # a slow machine sees lines of progress
    assert said == ["preprocess_data: stopped; the same command goes on from the finished shards"]


def test_a_disk_without_room_is_named(tmp_path, speeches, toy_tokenizer, tool_environment):
    """A limit on the size of files stands for the full disk: the same error on the same call."""
    write_jsonl(tmp_path / "in.jsonl", speeches * 8)
    limit = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable, str(ROOT / "tools/preprocess_data.py")]
    arguments = ["--input", tmp_path, "--tokenizer", toy_tokenizer, "--output-prefix", tmp_path / "out" / "x"]
    command = [*limit, *map(str, [*arguments, "--workers", 1])]
    done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "x_text_document.00000.0000.bin: File too large, make room or choose another folder, then run the same command "
        "again\n"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("out/*.partial"))


def test_the_slurm_array_gives_what_one_run_gives(tmp_path, speeches, toy_tokenizer, tool_environment):
    """Two tasks of an array, one after the other, then the merge, by the script's own lines."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    for folder in ("text/web", "tokenizer"):
        (tmp_path / "data/k2_65b" / folder).mkdir(parents=True)
    for number in range(3):
        write_jsonl(tmp_path / f"data/k2_65b/text/web/{number}.jsonl", speeches[number::3])
    shutil.copy(toy_tokenizer, tmp_path / "data/k2_65b/tokenizer/tokenizer.json")
    script = ["bash", str(ROOT / "examples/k2_65b/preprocess.sbatch"), "web"]
    environment = {**tool_environment, "PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "1"}

    def task(**variables):
        settings = {"cwd": tmp_path, "env": {**environment, **variables}}
        return subprocess.run(script, capture_output=True, text=True, check=True, **settings).stdout

    for number in ("1", "0"):
        printed = task(SLURM_ARRAY_TASK_ID=number, SLURM_ARRAY_TASK_COUNT="2")
        assert f"part {number} of 2 done" in printed
    assert f"{len(speeches)} documents" in task(MERGE="1")
    settings = {"shard_bytes": 1 << 30, "one_file": False}
    job = make_job([tmp_path / "data/k2_65b/text/web"], toy_tokenizer, tmp_path / "one" / "web", **settings)
    preprocess(job, workers=1, max_bad_fraction=0.1)
    assert outputs(tmp_path / "data/k2_65b/tokens") == outputs(tmp_path / "one")


def test_a_file_cut_short_ends_the_run_in_one_line_and_leaves_no_output(
    tmp_path, speeches, toy_tokenizer, tool_environment
):
    """In a worker, while another file is read."""
    write_jsonl(tmp_path / "a.jsonl", speeches)
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in speeches).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-100])
    common = ["--input", tmp_path, "--tokenizer", toy_tokenizer, "--workers", 2]
    process = tool([*common, "--output-prefix", tmp_path / "out" / "x"], tool_environment)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith(f"preprocess_data: {tmp_path}/b.jsonl.gz: cannot be read to its end (EOFError")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*.manifest.json"))
