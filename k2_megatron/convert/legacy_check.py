"""Whether the rank files of an old iteration belong together: what is looked at before anything is made of them."""

from dataclasses import dataclass
from typing import Any

from k2_megatron.convert.legacy_k2 import LegacyK2Source
from k2_megatron.convert.names import places
from k2_megatron.convert.work import Unit
from k2_megatron.convert.workers import resident_bytes


@dataclass(frozen=True)
class LegacyCheck:
    """Requires that replicated weights agree between ranks, and that Adam's numbers mean the names given to them."""

    source: LegacyK2Source

    def units(self) -> list[Unit]:
        ranks = [(tensor, stage) for tensor in range(self.source.tensor_parallel)
                 for stage in range(self.source.pipeline_parallel)]  # fmt: skip
        size = self.source.read_bytes_total(tuple(self.source.dtypes)) // len(ranks)
        return [Unit(f"mp_rank_{tensor:02d}_{stage:03d}", (tensor, stage), size) for tensor, stage in ranks]

    def run(self, unit: Unit) -> dict[str, Any]:
        if "main" in self.source.dtypes:
            self.source.check_optimizer(*unit.content)
        if unit.content == (0, 0):
            for place in places(self.source.shape):
                if place.entry.cut == "whole":
                    self.source.check_replicas(place)
        return {"resident_bytes": resident_bytes()}
