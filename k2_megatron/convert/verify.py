"""verify: is a checkpoint what was saved? Hashes of all files, manifest against tables, fingerprint of the weights.

In: a folder of any of the three kinds. Out: problems, each naming the file; none means sound. Nothing is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.estimate import FINGERPRINT, HASH, Phase, announce
from k2_megatron.convert.export_model import MANIFEST as EXPORT_MANIFEST
from k2_megatron.convert.fingerprint import as_text, fingerprint_rows
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import TABLE, Place, places
from k2_megatron.convert.numbers import BITS
from k2_megatron.convert.to_torch_dist import blocks
from k2_megatron.convert.torch_dist import MANIFEST, TorchDistSource, read_manifest
from k2_megatron.convert.work import Unit, run_checks
from k2_megatron.convert.workers import Workers, resident_bytes
from k2_megatron.train.checkpoints.file_hash import problem_of_file
from k2_megatron.train.checkpoints.pickles import pickle_problems


@dataclass(frozen=True)
class HashCheck:
    """Compares files with the sizes and hashes a manifest gives them."""

    folder: Path
    expected: dict[str, dict]

    def units(self) -> list[Unit]:
        return [Unit(name, (), facts["bytes"]) for name, facts in sorted(self.expected.items())]

    def run(self, unit: Unit) -> dict[str, Any]:
        return {"problem": self._problem(unit.file), "resident_bytes": resident_bytes()}

    def _problem(self, name: str) -> str | None:
        try:
            return problem_of_file(self.folder / name, self.expected[name])
        except OSError as error:
            return f"{self.folder / name} cannot be read ({error.strerror})"


@dataclass(frozen=True)
class FingerprintCheck:
    """Takes the fingerprint of the weights, a tensor a unit."""

    source: TorchDistSource

    def units(self) -> list[Unit]:
        found = []
        itemsize = BITS[self.source.dtypes["weights"]].itemsize
        for place in places(self.source.shape):
            rows, columns = place.entry.size(self.source.shape)
            name = f"{place.entry.ours} {place.layer}"
            found.append(Unit(name, (TABLE.index(place.entry), place.layer), rows * columns * itemsize))
        return found

    def run(self, unit: Unit) -> dict[str, Any]:
        entry, layer = unit.content
        place, total = Place(TABLE[entry], layer), 0
        itemsize = BITS[self.source.dtypes["weights"]].itemsize
        for block in blocks(place.entry, self.source.shape, 1, itemsize):
            rows = self.source.read("weights", place, block.first_row, block.last_row)
            total += fingerprint_rows(place.entry.key(self.source.implementation), layer, block.first_row, rows)
        return {"fingerprint": total, "resident_bytes": resident_bytes()}


def verify_phases(manifest: dict, workers: int) -> list[Phase]:
    """What `verify_training` will do."""
    shape = ModelFacts.from_config(manifest["config"]["model"]).shape
    stored = sum(facts["bytes"] for facts in manifest["files"].values())
    weights = shape.parameters * BITS[manifest["precision"]].itemsize
    return [
        Phase("hash", HASH, stored, workers=workers),
        Phase("fingerprint of the weights", FINGERPRINT, weights, workers=workers),
    ]


def verify_training(folder: Path, workers: int, *, announced: bool = False) -> list[str]:
    """Problems of one of our checkpoints. `announced`: print first what looking for them will take."""
    try:
        manifest = read_manifest(folder)
        if announced:
            announce(verify_phases(manifest, workers), folder)
        with Workers(workers) as processes:
            return training_problems(folder, manifest, processes)
    except ConversionError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read ({error.strerror}); restore access to it"]


def training_problems(folder: Path, manifest: dict, workers: Workers) -> list[str]:
    """Problems of the checkpoint in `folder` that has this manifest. ConversionError when its tables cannot be used."""
    problems = _verify_hashes(folder, manifest["files"], {MANIFEST}, workers)
    if problems:
        return problems
    source = TorchDistSource(folder, manifest)
    problems = pickle_problems(folder)
    if problems:
        return problems
    check = FingerprintCheck(source)
    results, _totals = run_checks(check, check.units(), workers, "take the fingerprint")
    found = as_text(sum(result["fingerprint"] for result in results))
    if found != manifest["weights"]:
        return [
            f"{folder}: the weights have fingerprint {found}, those saved had {manifest['weights']}: files or manifest "
            "belong to another checkpoint"
        ]
    return []


def verify_export(folder: Path, workers: int) -> list[str]:
    """Problems of a Hugging Face folder: of its structure always, of its hashes where our manifest is beside."""
    try:
        problems = []
        path = folder / EXPORT_MANIFEST
        if path.is_file():
            files = json.loads(path.read_text())["files"]
            with Workers(workers) as processes:
                problems = _verify_hashes(folder, files, {path.name}, processes)
        else:
            print(f"{folder} has no {EXPORT_MANIFEST}: its tensors are checked against config.json, hashes cannot be")
        if not problems:
            HuggingFaceSource(folder, ModelFacts.from_hugging_face(folder))
        return problems
    except ConversionError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read ({error.strerror}); restore access to it"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{folder / EXPORT_MANIFEST} is damaged ({error})"]


def _verify_hashes(folder: Path, expected: dict[str, dict], allowed: set[str], workers: Workers) -> list[str]:
    check = HashCheck(folder, expected)
    results, _totals = run_checks(check, check.units(), workers, "hash")
    problems = [result["problem"] for result in results if result["problem"]]
    strange = sorted(path.name for path in folder.iterdir() if path.name not in expected and path.name not in allowed)
    return problems + [f"{folder / name} is not in the manifest" for name in strange]
