"""The progress of preprocessing: megabytes and tokens a second, time left."""

from __future__ import annotations

from k2_megatron.data.preprocess_job import Progress
from k2_megatron.data.progress import ConsoleProgress


def test_the_line_tells_speed_and_time_left(capsys):
    progress = ConsoleProgress(total_bytes=40_000_000)
    progress(Progress(bytes=10_000_000, documents=7, rejected=1, tokens=3_000_000))
    line = progress.line(now=progress.start + 2.0)
    assert line.split() == "25.0% 5.0 MB/s 1.50 M tokens/s 7 documents 6 s left".split()
    assert capsys.readouterr().err == "", "a line within the first seconds"


def test_shards_of_an_earlier_run_are_done_but_no_speed():
    progress = ConsoleProgress(total_bytes=40_000_000)
    progress(Progress(bytes=20_000_000, documents=14, rejected=1, tokens=0, earlier=True))
    assert "left" not in progress.line(now=progress.start + 1.0), "no speed is known yet"
    progress(Progress(bytes=10_000_000, documents=7, rejected=1, tokens=3_000_000))
    line = progress.line(now=progress.start + 2.0)
    assert line.split() == "75.0% 5.0 MB/s 1.50 M tokens/s 21 documents 2 s left".split()


def test_a_line_now_and_then_where_there_is_no_terminal(capsys):
    progress = ConsoleProgress(total_bytes=100)
    progress._drawn_at -= 60.0  # a minute ago
    with progress:
        progress(Progress(bytes=50, documents=1, rejected=0, tokens=10))
        progress(Progress(bytes=50, documents=1, rejected=0, tokens=10))
    assert capsys.readouterr().err.count("% ") == 1
