"""Too many rejected documents: when a run that makes tokens stops before its end, and the list it leaves then.

In: `Progress` of the pieces, in whatever order workers make them. Out: an end to the run where `--max-bad-fraction`
cannot be met any more, wherever the bad lines lie, and the first rejects in the order of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from k2_megatron.data.merge import write_list
from k2_megatron.data.preprocess_job import Job, Progress
from k2_megatron.data.readers import pieces

REJECTS_TO_STOP_EARLY = 1000  # fewer are judged when everything is read; so many are listed
SHORTEST_LINE_BYTES = 8  # of a document: {"k":""}
WHOLE = 1 << 62  # bytes of a shard: the file is one

Report = Callable[[Progress], None]


class TooManyRejected(Exception):
    """So many that what is left cannot bring them within the fraction."""


@dataclass
class Counter:
    """Totals of a run, and the early stop."""

    job: Job
    max_bad_fraction: float
    report: Report
    announce: Callable[[str], None]
    documents: int = 0
    rejected: int = 0
    bytes: int = 0
    has_warned: bool = False

    def __call__(self, progress: Progress) -> None:
        self.documents += progress.documents
        self.rejected += progress.rejected
        self.bytes += progress.bytes
        self.report(progress)
        if self.rejected < REJECTS_TO_STOP_EARLY:
            return
        most = self._most_documents()
        if most is not None and self.rejected > self.max_bad_fraction * most:
            raise TooManyRejected(f"{self.rejected} of the first {self.documents} documents rejected")
        if not self.has_warned and self.rejected > self.max_bad_fraction * self.documents:
            self.has_warned = True
            self.announce(
                f"{self.rejected} of the first {self.documents} documents rejected; is --json-keys right? What is left "
                f"may still bring them within --max-bad-fraction {self.max_bad_fraction}"
            )

    def _most_documents(self) -> int | None:
        """No more than these are there in all; None where what is left is compressed, and may hold any number."""
        if any(source.compression or source.kind == "parquet" for source in self.job.sources):
            return None
        left = sum(source.size for source in self.job.sources) - self.bytes
        return self.documents + max(0, left) // SHORTEST_LINE_BYTES + len(self.job.sources)


def stop_with_list(job: Job, max_bad_fraction: float, found: TooManyRejected) -> ValueError:
    """Write the first rejects as the list; what to tell. The texts are read again for it, which takes less than it took
    to come so far: a worker knows its lines by their number in its shard alone."""
    rejects = list(islice(_rejects(job), REJECTS_TO_STOP_EARLY))
    write_list(job, rejects)
    return ValueError(
        f"{found}, more than --max-bad-fraction {max_bad_fraction} can allow whatever follows; is --json-keys right? "
        f"The first {len(rejects)} are in {job.prefix}.rejects.jsonl; a larger fraction lists them all"
    )


def _rejects(job: Job) -> Iterator[dict[str, Any]]:
    for source in job.sources:
        line = 1
        for piece in pieces(source, job.keys, WHOLE, 0, None):
            for number, reason in piece.rejected:
                yield {"file": source.name, "line": line + number, "reason": reason}
            line += piece.lines
