"""Progress of a long preprocessing on the console: a bar where there is a terminal, else a line now and then.

In: `Progress` of each piece. Out: MB/s (of files on disk), tokens/s, time left, on standard error. Shards of an earlier
run count as done, not as this run's speed.
"""

from __future__ import annotations

import sys
import time

from k2_megatron.data.preprocess_job import Progress

LINE_EVERY_SECONDS = 10.0
DRAW_EVERY_SECONDS = 0.2


class ConsoleProgress:
    """Call it with each Progress; use it as a context manager."""

    def __init__(self, total_bytes: int):
        self.total_bytes = max(1, total_bytes)
        self.bytes, self.earlier_bytes, self.tokens, self.documents = 0, 0, 0, 0
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self._drawn_at = self.start

    def __call__(self, progress: Progress) -> None:
        self.bytes += progress.bytes
        self.earlier_bytes += progress.bytes if progress.earlier else 0
        self.tokens += progress.tokens
        self.documents += progress.documents
        now = time.monotonic()
        if now - self._drawn_at > (DRAW_EVERY_SECONDS if self.terminal else LINE_EVERY_SECONDS):
            self._drawn_at = now
            print(self.line(now), end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        elapsed_seconds = max(1e-9, now - self.start)
        done = min(1.0, self.bytes / self.total_bytes)
        speed = (self.bytes - self.earlier_bytes) / elapsed_seconds
        left = f"{max(0, self.total_bytes - self.bytes) / speed:6.0f} s left" if speed else ""
        return (
            f"{done:6.1%}  {speed / 1e6:7.1f} MB/s  "
            f"{self.tokens / 1e6 / elapsed_seconds:6.2f} M tokens/s  {self.documents} documents  {left}   "
        )

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print(file=sys.stderr)
