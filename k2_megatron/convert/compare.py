"""Reading back what a conversion wrote: every row of every kind equal, to the bit, to what the source gives."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from k2_megatron.convert.errors import ProofFailed
from k2_megatron.convert.names import Place, places
from k2_megatron.convert.numbers import BITS, change_dtype
from k2_megatron.convert.source import Kind
from k2_megatron.convert.to_torch_dist import TorchDistJob, blocks
from k2_megatron.convert.torch_dist import TorchDistSource
from k2_megatron.convert.work import Unit
from k2_megatron.convert.workers import resident_bytes


@dataclass(frozen=True)
class CompareCheck:
    """Reads the same rows of a source and of what was made of it, and requires equal bits."""

    job: TorchDistJob
    product: TorchDistSource

    def units(self) -> list[Unit]:
        return [unit for unit in self.job.units() if unit.content != ("shared",)]

    def run(self, unit: Unit) -> dict[str, Any]:
        kind, stage, part = unit.content
        for place in places(self.job.source.shape):
            if self.job.part(place) == (stage, part):
                self._compare(kind, place)
        return {"resident_bytes": resident_bytes()}

    def _compare(self, kind: Kind, place: Place) -> None:
        job = self.job
        origin, dtype = job.source_kind(kind), job.dtype(kind)
        for block in blocks(place.entry, job.source.shape, 1, BITS[dtype].itemsize):
            rows = job.source.read(origin, place, block.first_row, block.last_row)
            wanted = change_dtype(rows, job.source.dtypes[origin], dtype)
            found = self.product.read(kind, place, block.first_row, block.last_row)
            if not np.array_equal(wanted, found):
                raise ProofFailed(
                    f"{self.product.key(kind, place)} (layer {place.layer}) was not written as it was read: "
                    "this is a defect of the disk, of memory or of this tool; the result was not published"
                )
