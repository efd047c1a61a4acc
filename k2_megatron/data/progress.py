"""Progress of a long preprocessing on the console: a bar where there is a terminal, else a line now and then.

In: `Progress` of each piece. Out: MB/s (of files on disk), tokens/s, time left, on standard error.
"""

from __future__ import annotations

import sys
import time

from k2_megatron.data.shards import Progress

LINE_EVERY_SECONDS = 10.0
DRAW_EVERY_SECONDS = 0.2


class ConsoleProgress:
    """Call it with each Progress; use it as a context manager."""

    def __init__(self, total_bytes: int):
        self.total_bytes = max(1, total_bytes)
        self.bytes, self.tokens, self.documents = 0, 0, 0
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self._drawn_at = self.start

    def __call__(self, progress: Progress) -> None:
        self.bytes += progress.bytes
        self.tokens += progress.tokens
        self.documents += progress.documents
        now = time.monotonic()
        if now - self._drawn_at > (DRAW_EVERY_SECONDS if self.terminal else LINE_EVERY_SECONDS):
            self._drawn_at = now
            print(self.line(now), end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        elapsed_seconds = max(1e-9, now - self.start)
        done = min(1.0, self.bytes / self.total_bytes)
        left = f"{elapsed_seconds / done - elapsed_seconds:6.0f} s left" if done else ""
        return (
            f"{done:6.1%}  {self.bytes / 1e6 / elapsed_seconds:7.1f} MB/s  "
            f"{self.tokens / 1e6 / elapsed_seconds:6.2f} M tokens/s  {self.documents} documents  {left}   "
        )

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print(file=sys.stderr)
