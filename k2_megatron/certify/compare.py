"""Records against a reference: each judged and told as soon as it is there."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from k2_megatron.certify.certificate import Certificate, table
from k2_megatron.certify.record import Record, read_record
from k2_megatron.certify.verdict import judge, require_reference, require_same_steps, rounding_of


def compare(reference: Path, folders: Sequence[Path], say: Callable[[str], None]) -> Certificate:
    """Of records in folders. ValueError where one cannot be read, or is not of the same steps."""
    began, base = time.monotonic(), read_record(reference)
    if not base.perturbed:
        raise ValueError(
            f"{reference} has no perturbed repeats, from which bounds are made: record it with --repeats 3"
        )
    records = [read_record(folder) for folder in folders]
    for record in records:
        require_same_steps(base, record)
    return judged(base, records, began, say)


def judged(reference: Record, records: Iterable[Record], began: float, say: Callable[[str], None]) -> Certificate:
    """Judge the records one by one, as they come; `began` is when the work did, on the monotonic clock."""
    require_reference(reference)
    rounding, done, verdicts = rounding_of(reference), [], []
    for record in records:
        verdict = judge(reference, rounding, record)
        say(f"\n{table(reference, verdict, record)}")
        done.append(record)
        verdicts.append(verdict)
    return Certificate(reference, done, verdicts, time.monotonic() - began)
