"""Conversions whose result is one of our checkpoints: from Hugging Face, from old K2 shards, from another chunk layout.

source -> units -> files aside -> tables and manifest -> read back and compared -> published as step_XXXXXXXX
"""

import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2_megatron.config import Config
from k2_megatron.convert.compare import CompareCheck
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.estimate import COMPARE, CONVERT, Phase
from k2_megatron.convert.fingerprint import as_text
from k2_megatron.convert.journal import JOURNAL
from k2_megatron.convert.logits import Proof
from k2_megatron.convert.names import Shape
from k2_megatron.convert.numbers import Rounding
from k2_megatron.convert.source import Kind
from k2_megatron.convert.to_torch_dist import TorchDistJob
from k2_megatron.convert.torch_blob import object_blob
from k2_megatron.convert.torch_dist import TorchDistSource
from k2_megatron.convert.torch_metadata import write_metadata
from k2_megatron.convert.work import require_space, run_checks, run_units
from k2_megatron.convert.workers import Workers
from k2_megatron.train.checkpoints.file_hash import file_facts
from k2_megatron.train.checkpoints.folders import publish
from k2_megatron.train.checkpoints.manifest import folder_name


def writing_phases(job: TorchDistJob, workers: int) -> list[Phase]:
    """What `write_checkpoint` and `seal` will do."""
    read, written = job.source.read_bytes_total(tuple(job.source.dtypes)), sum(unit.bytes for unit in job.units())
    return [
        Phase("convert", CONVERT, read, written, workers),
        Phase("read back and compare", COMPARE, read + written, 0, workers),
    ]


@dataclass(frozen=True)
class Product:
    """A written checkpoint that has no name yet: `folder` aside, its manifest, and what was rounded."""

    folder: Path
    manifest: dict[str, Any]
    rounding: Rounding

    @property
    def exact_kind(self) -> Kind:
        """What holds the source's weights as they are: the fp32 parameters, where the weights are rounded."""
        return "main" if self.rounding.values else "weights"

    def record_proof(self, proof: Proof) -> None:
        """Print the outcome, and put it into the manifest."""
        print(proof)
        self.manifest["proof"] = str(proof)

    def publish(self) -> Path:
        (self.folder / JOURNAL).unlink()
        return publish(self.folder, self.manifest)


def write_checkpoint(
    job: TorchDistJob, config: Config, facts: dict[str, Any], plan: dict[str, Any], workers: Workers
) -> Product:
    """Write every file of a checkpoint into job.folder, whose `sole_writer` the caller is until it is published.

    `facts` are the manifest's step, samples, layout and record.

    ConversionError when the disk is too small, the folder was begun for something else, or a weight is not finite.
    """
    units = job.units()
    require_space(job.folder, sum(unit.bytes for unit in units))
    results, totals = run_units(job, units, plan, workers)
    print(totals.text())
    write_metadata(job.folder, job.tables(results))
    _write_common(job.folder)
    rounding = Rounding()
    for result in results:
        rounding.add(Rounding(result.get("rounded", 0), result.get("largest_rounding", 0.0)))
    manifest = {
        **facts,
        "precision": job.precision,
        "weights": as_text(sum(result["fingerprint"] for result in results)),
        "config": config.model_dump(exclude_none=True),
        "files": {result["file"]: file_facts(result) for result in results},
    }
    return Product(job.folder, manifest, rounding)


def _write_common(folder: Path) -> None:
    """The two small files by which megatron-core knows a torch_dist checkpoint."""
    (folder / "common.pt").write_bytes(object_blob(pickle.dumps({}, 2)))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(backends))


def seal(product: Product, job: TorchDistJob, workers: Workers) -> TorchDistSource:
    """Read the result back and compare it with the source, to the bit; the result as a source."""
    written = TorchDistSource(product.folder, product.manifest)
    check = CompareCheck(job, written)
    _results, totals = run_checks(check, check.units(), workers, "read back and compare")
    print(f"read back and equal to the bit: {totals.bytes / 1e9:.2f} GB in {totals.seconds:.1f} s")
    return written


def files_as_they_are(folder: Path, files: Iterable[str]) -> list[list]:
    """[path, bytes, time of change] of a source's files: a conversion goes on only from the same ones."""
    paths = [folder / file for file in sorted(files)]
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def aside_folder(run_folder: Path, step: int) -> Path:
    """Where a checkpoint is put together: not hidden as a save in progress is, which training would remove."""
    return run_folder / "checkpoints" / f"converting_{folder_name(step)}"


def require_new(run_folder: Path, step: int) -> None:
    """ConversionError when the run folder has this step or a later one: `latest` would go backwards."""
    found = sorted((run_folder / "checkpoints").glob("step_*"))
    if found and found[-1].name >= folder_name(step):
        raise ConversionError(f"{found[-1]} exists; remove it or give another --save")
    if run_folder.exists() and not run_folder.is_dir():
        raise ConversionError(f"{run_folder} is no folder; give another --save")


def check_layout(shape: Shape, tensor: int, pipeline: int) -> None:
    """ConversionError unless every one of `tensor` ranks and `pipeline` stages gets an equal share."""
    uneven = [
        f"{name} {size}"
        for name, size in (
            ("vocab_size", shape.vocab_size),
            ("ffn_hidden_size", shape.ffn_hidden_size),
            ("heads", shape.heads),
            ("kv_heads", shape.kv_heads),
        )
        if size % tensor
    ]
    if uneven:
        common = math.gcd(shape.vocab_size, shape.ffn_hidden_size, shape.heads, shape.kv_heads)
        raise ConversionError(f"--tensor {tensor} does not divide {', '.join(uneven)}; {_divisors(common)} would")
    if shape.layers % pipeline:
        raise ConversionError(
            f"--pipeline {pipeline} does not divide {shape.layers} layers; {_divisors(shape.layers)} would"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
