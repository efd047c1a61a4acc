"""The old K2 training code's checkpoints as a source: iter_*/mp_rank_TT_PPP/model_optim_rng.pt, weights and Adam state.

That code is Megatron-LM of August 2023: one file a (tensor, pipeline) rank with its part of every tensor of its stage;
with interleaved stages a file holds several model chunks, of which chunk v of stage p has the layers after those of
chunk v of stage p - 1. QKV rows are already grouped by head as ours are; a rank's first MLP matrix is its gate rows
over its up rows. Adam's state has numbers for names: megatron's two parameter groups (matrices, then norms) in the
model's order. The order is proved, not assumed: the fp32 parameters must round to the model's weights, bit by bit.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.files import OpenFiles
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Entry, Place, Shape, places
from k2_megatron.convert.numbers import BITS, change_dtype
from k2_megatron.convert.safetensors_file import StoredTensor, read_exactly
from k2_megatron.convert.source import OPTIMIZER_KINDS, Kind

if TYPE_CHECKING:
    from k2_megatron.convert.legacy_file import RankFile

_ROPE_BASE = 10000.0  # a constant in that code
_FEATURES = {"swiglu": True, "untie_embeddings_and_output_weights": True, "add_bias_linear": False}
_BLOCK_BYTES = 32 << 20


class Home(NamedTuple):
    """Where a tensor lives in the old code: pipeline stage, model chunk of that stage, and its name there."""

    stage: int
    chunk: int
    name: str


class LegacyK2Source:
    """Reads our rows out of the rank files of one iteration. ConversionError when files are missing or do not fit.

    `optimizer` False leaves Adam's state alone, whatever it looks like.
    """

    def __init__(self, folder: Path, *, optimizer: bool = True) -> None:
        from k2_megatron.convert.legacy_file import rank_files, read_rank_file  # imports torch; reading rows does not

        self.folder = folder
        paths = rank_files(folder)
        self.tensor_parallel, self.pipeline_parallel = (1 + max(numbers) for numbers in zip(*paths, strict=True))
        first = read_rank_file(folder, paths[0, 0], optimizer=optimizer)
        self.arguments: argparse.Namespace = first.arguments
        self.iteration = first.iteration
        self.virtual_pipeline = len(first.weights)
        self.facts = _facts(first.path, first.arguments)
        self.shape: Shape = self.facts.shape
        self.dtypes: dict[Kind, str] = {"weights": first.dtype}
        if first.optimizer is not None:
            self.dtypes.update(dict.fromkeys(OPTIMIZER_KINDS, "float32"))
        self.updates: int | None = None if first.optimizer is None else first.optimizer["updates"]
        self._check_rank(0, 0, first)
        self._require_even(first.path)
        self._files = OpenFiles(folder)
        self._stored: dict[tuple[int, int], dict[tuple[Kind, Home], StoredTensor]] = {}
        for (tensor, stage), path in paths.items():
            file = first if path == first.path else read_rank_file(folder, path, optimizer=optimizer)
            self._check_rank(tensor, stage, file)
            self._stored[tensor, stage] = self._checked_tensors(stage, file)

    @property
    def files(self) -> set[str]:
        return {stored.file for named in self._stored.values() for stored in named.values()}

    def read(self, kind: Kind, place: Place, first_row: int, last_row: int) -> np.ndarray:
        home = self.home(place)
        rows, columns = place.entry.size(self.shape)
        output = np.empty((last_row - first_row, columns), BITS[self.dtypes[kind]])
        for tensor, our_row, local_row, count, column, width in self._pieces(place.entry, rows, columns):
            first, last = max(first_row, our_row), min(last_row, our_row + count)
            if first < last:
                part = output[first - first_row : last - first_row, column : column + width]
                self._read_local(kind, tensor, home, local_row + first - our_row, part)
        return output

    def read_bytes_total(self, kinds: tuple[Kind, ...]) -> int:
        return sum(self.shape.parameters * BITS[self.dtypes[kind]].itemsize for kind in kinds)

    def home(self, place: Place) -> Home:
        """Layers are counted from 0 in every chunk of every stage."""
        if place.layer is None:
            if place.entry.legacy.startswith("embedding."):
                return Home(0, 0, place.entry.legacy)
            return Home(self.pipeline_parallel - 1, self.virtual_pipeline - 1, place.entry.legacy)
        part, layer = divmod(place.layer, self.shape.layers // (self.pipeline_parallel * self.virtual_pipeline))
        chunk, stage = divmod(part, self.pipeline_parallel)
        return Home(stage, chunk, place.entry.legacy.format(layer=layer))

    def check_replicas(self, place: Place) -> None:
        """ConversionError unless every tensor rank has the same copy of a weight that is not cut."""
        home, rows = self.home(place), place.entry.size(self.shape)[0]
        first, other = (np.empty((rows, 1), BITS[self.dtypes["weights"]]) for _ in range(2))
        self._read_local("weights", 0, home, 0, first)
        for tensor in range(1, self.tensor_parallel):
            self._read_local("weights", tensor, home, 0, other)
            if not np.array_equal(first, other):
                raise ConversionError(
                    f"{self.folder}: {home.name} differs between tensor ranks 0 and {tensor} of stage {home.stage}: "
                    "files of several runs or iterations were mixed"
                )

    def check_optimizer(self, tensor: int, stage: int) -> None:
        """ConversionError unless every fp32 parameter of a rank rounds to its weight: the numbers mean these names."""
        for (kind, home), stored in self._stored[tensor, stage].items():
            if kind != "main":
                continue
            columns = stored.shape[1] if len(stored.shape) > 1 else 1
            step = max(1, _BLOCK_BYTES // (4 * columns))
            for first in range(0, stored.shape[0], step):
                rows = min(step, stored.shape[0] - first)
                main, weight = (np.empty((rows, columns), BITS[self.dtypes[k]]) for k in ("main", "weights"))
                self._read_local("main", tensor, home, first, main)
                self._read_local("weights", tensor, home, first, weight)
                if not np.array_equal(change_dtype(main, "float32", self.dtypes["weights"]), weight):
                    raise ConversionError(
                        f"{self.folder / stored.file}: the optimizer's fp32 copy of {home.name} does not round to the "
                        "weight, so its state cannot be told apart; convert without it (--no-optimizer)"
                    )

    def _read_local(self, kind: Kind, tensor: int, home: Home, first_row: int, part: np.ndarray) -> None:
        """Fill `part`, bits [rows, its columns], with rows first_row ... of a rank's own tensor."""
        stored = self._stored[tensor, home.stage][kind, home]
        whole = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
        position = stored.position + first_row * part.shape[1] * part.itemsize
        read_exactly(self._files.descriptor(stored.file), whole, position, self.folder / stored.file)
        if whole is not part:
            part[...] = whole

    def _pieces(self, entry: Entry, rows: int, columns: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(tensor rank, our first row, its first row, rows, our first column, columns) of every part."""
        ranks = self.tensor_parallel
        if entry.cut == "columns":
            for tensor in range(ranks):
                yield tensor, 0, 0, rows, tensor * columns // ranks, columns // ranks
        elif entry.cut == "whole":
            yield 0, 0, 0, rows, 0, columns
        else:
            halves = 2 if entry.rows == "gate_up" else 1
            part = rows // (halves * ranks)
            for half in range(halves):
                for tensor in range(ranks):
                    yield tensor, (half * ranks + tensor) * part, half * part, part, 0, columns

    def _require_even(self, path: Path) -> None:
        parts = self.pipeline_parallel * self.virtual_pipeline
        if self.shape.layers % parts:
            raise ConversionError(f"{path}: {self.shape.layers} layers cannot be shared by {parts} model chunks")

    def _check_rank(self, tensor: int, stage: int, file: "RankFile") -> None:
        """ConversionError unless a file is of this iteration and of the rank that its folder's name says."""
        if file.iteration != self.iteration:
            raise ConversionError(f"{file.path} is of iteration {file.iteration}, others of {self.iteration}")
        known = vars(file.arguments)
        sizes = {
            "tensor_model_parallel_size": self.tensor_parallel,
            "pipeline_model_parallel_size": self.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline,
        }
        for key, found in sizes.items():
            if (known.get(key) or found) != found:
                raise ConversionError(
                    f"{file.path}: its run had {key} {known[key]}, and {found} are here; bring the files of all ranks"
                )
        rank, ranks = known.get("rank"), known.get("world_size")
        if isinstance(rank, int) and isinstance(ranks, int) and ranks >= self.tensor_parallel * self.pipeline_parallel:
            # Ranks count tensor ranks first, then data, then stages; the first data rank writes.
            wrote = rank % self.tensor_parallel, rank // (ranks // self.pipeline_parallel)
            if wrote != (tensor, stage):
                raise ConversionError(
                    f"{file.path} was written by tensor rank {wrote[0]} of stage {wrote[1]} (rank {rank} of {ranks}): "
                    "files were mixed up"
                )

    def _checked_tensors(self, stage: int, file: "RankFile") -> dict[tuple[Kind, Home], StoredTensor]:
        """The tensors of a file by kind and home. ConversionError unless they are those of its stage, shaped so."""
        homes = {home: place for place in places(self.shape) if (home := self.home(place)).stage == stage}
        found = {Home(stage, chunk, name): t for chunk, named in enumerate(file.weights) for name, t in named.items()}
        unused, missing = sorted(set(found) - set(homes)), sorted(set(homes) - set(found))
        if unused or missing:
            chunk = f" in model{(missing or unused)[0].chunk}" if self.virtual_pipeline > 1 else ""
            text = (
                f"lacks {missing[0].name}{chunk}"
                if missing
                else f"holds {unused[0].name}{chunk}, which the name table does not know"
            )
            raise ConversionError(f"{file.path} {text}")
        for home, place in homes.items():
            if found[home].shape != self._local_shape(place.entry):
                raise ConversionError(
                    f"{file.path}: {home.name} is {list(found[home].shape)}, the arguments stored beside say "
                    f"{list(self._local_shape(place.entry))}"
                )
        if file.dtype != self.dtypes["weights"]:
            raise ConversionError(f"{file.path} holds {file.dtype} weights, other ranks {self.dtypes['weights']}")
        if ("main" in self.dtypes) != (file.optimizer is not None):
            raise ConversionError(f"{self.folder}: some files hold Adam's state, others not (--no-optimizer leaves it)")
        stored: dict[tuple[Kind, Home], StoredTensor] = {("weights", home): found[home] for home in homes}
        if file.optimizer is not None:
            if file.optimizer["updates"] != self.updates:
                raise ConversionError(
                    f"{file.path}: Adam made {file.optimizer['updates']} updates, that of other ranks {self.updates}: "
                    "files of several runs were mixed"
                )
            stored.update(_adam_tensors(file, {home: found[home] for home in homes}))
        return stored

    def _local_shape(self, entry: Entry) -> tuple[int, ...]:
        rows, columns = entry.size(self.shape)
        if entry.cut == "whole":
            return (rows,)
        return (
            (rows // self.tensor_parallel, columns) if entry.cut == "rows" else (rows, columns // self.tensor_parallel)
        )


def _facts(path: Path, arguments: argparse.Namespace) -> ModelFacts:
    """The model, from the arguments that training stored. ConversionError for one that K2 is not."""
    known = vars(arguments)
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size", "seq_length")
    lacking = [key for key in needed if not isinstance(known.get(key), int)]
    wrong = [f"{key} is {known[key]}" for key, value in _FEATURES.items() if known.get(key, value) != value]
    if known.get("rotary_percent", 1.0) != 1.0:
        wrong.append(f"rotary_percent is {known['rotary_percent']}")
    if lacking or wrong:
        raise ConversionError(f"{path}: its stored arguments lack {lacking} or are not K2's: {'; '.join(wrong) or '-'}")
    heads = known["num_attention_heads"]
    grouped = known.get("group_query_attention", False)
    shape = Shape(
        known["num_layers"],
        known["hidden_size"],
        known["ffn_hidden_size"],
        heads,
        known.get("num_query_groups") or heads if grouped else heads,
        known["padded_vocab_size"],
        known["padded_vocab_size"],
    )
    epsilon = known.get("norm_epsilon", known.get("layernorm_epsilon", 1e-5))
    return ModelFacts(shape, known["seq_length"], _ROPE_BASE, epsilon)


def _adam_tensors(file: "RankFile", weights: dict[Home, StoredTensor]) -> dict[tuple[Kind, Home], StoredTensor]:
    """Adam's tensors under the names that their order gives them. ConversionError when numbers or shapes disagree."""
    adam: dict[str, Any] = file.optimizer or {}
    found: dict[tuple[Kind, Home], StoredTensor] = {}
    if len(adam["groups"]) != len(adam["main"]):
        raise ConversionError(
            f"{file.path}: {len(adam['groups'])} parameter groups, {len(adam['main'])} of fp32 copies"
        )
    for group, (numbers, mains) in enumerate(zip(adam["groups"], adam["main"], strict=True)):
        dimensions = {len(main.shape) for main in mains}
        mine = [home for home, weight in weights.items() if {len(weight.shape)} == dimensions]
        if not len(mine) == len(mains) == len(numbers):
            raise ConversionError(
                f"{file.path}: parameter group {group} has {len(mains)} tensors, the model {len(mine)}"
            )
        for home, main, number in zip(mine, mains, numbers, strict=True):
            tensors: dict[Kind, StoredTensor] = {"main": main, **adam["state"].get(number, {})}
            shapes = {(tensor.shape, tensor.dtype) for tensor in tensors.values()}
            if len(tensors) != 3 or shapes != {(weights[home].shape, "float32")}:
                raise ConversionError(
                    f"{file.path}: Adam's state {number} should be that of {home.name}, and its shape differs"
                )
            found.update({(kind, home): tensor for kind, tensor in tensors.items()})
    if len(found) != 3 * len(weights):
        raise ConversionError(f"{file.path}: Adam's groups cover {len(found) // 3} of {len(weights)} tensors")
    return found
