"""The old K2 training code's checkpoints as a source: iter_*/mp_rank_TT_PPP/model_optim_rng.pt, weights and Adam state.

That code is Megatron-LM of August 2023: one file a (tensor, pipeline) rank with its part of every tensor of its stage.
QKV rows are already grouped by head as ours are; a rank's first MLP matrix is its gate rows over its up rows. Adam's
state has numbers for names: megatron's two parameter groups (matrices, then norms) in the model's order. The order is
proved, not assumed: the fp32 parameters must round to the model's weights, bit by bit.

Files are pickles. They are read with torch's weights_only loader, mapped, and with the few names below allowed.
"""

import argparse
import collections
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Entry, Place, Shape, places
from k2_megatron.convert.numbers import BITS, Rounding, change_dtype
from k2_megatron.convert.source import OPTIMIZER_KINDS, Kind

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_FILE = "model_optim_rng.pt"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ROPE_BASE = 10000.0  # a constant in that code
_FEATURES = {"swiglu": True, "untie_embeddings_and_output_weights": True, "add_bias_linear": False}


class _EnumValue(int):
    """A member of one of the training code's enumerations, as its number."""


def _allowed() -> list:
    reconstruct = np.array([]).__reduce__()[0]
    uint32 = type(np.dtype(np.uint32))
    enumerations = ("megatron.core.enums.ModelType", "megatron.model.enums.ModelType")
    return [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        uint32,
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        *((_EnumValue, name) for name in enumerations),
    ]


class LegacyK2Source:
    """Reads our rows out of the rank files of one iteration. ConversionError when files are missing or do not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _rank_files(folder)
        self.tensor_parallel = 1 + max(tensor for tensor, _stage in self._files)
        self.pipeline_parallel = 1 + max(stage for _tensor, stage in self._files)
        whole = {(t, p) for t in range(self.tensor_parallel) for p in range(self.pipeline_parallel)}
        if set(self._files) != whole:
            tensor, stage = sorted(whole - set(self._files))[0]
            raise ConversionError(f"{folder} lacks the file of tensor rank {tensor}, pipeline rank {stage}")
        first = self._load(0, 0)
        self.arguments: argparse.Namespace = first.get("args", argparse.Namespace())
        self.iteration: int = first.get("iteration", 0)
        self.facts = _facts(self._files[0, 0], self.arguments)
        self.shape: Shape = self.facts.shape
        self.dtypes: dict[Kind, str] = {"weights": _weight_dtype(first, self._files[0, 0])}
        if "optimizer" in first:
            self.dtypes.update(dict.fromkeys(OPTIMIZER_KINDS, "float32"))
        self._numbers: dict[int, dict[str, tuple[int, int, int]]] = {}
        for (tensor, stage), path in self._files.items():
            self._check(tensor, stage, path)

    def read(self, kind: Kind, place: Place, first_row: int, last_row: int) -> np.ndarray:
        stage, name = self._where(place)
        rows, columns = place.entry.size(self.shape)
        output = np.empty((last_row - first_row, columns), BITS[self.dtypes[kind]])
        for tensor, our_row, local_row, count, column, width in self._pieces(place.entry, rows, columns):
            first, last = max(first_row, our_row), min(last_row, our_row + count)
            if first < last:
                start = local_row + first - our_row
                part = self._tensor(kind, tensor, stage, name)[start : start + last - first]
                piece = output[first - first_row : last - first_row, column : column + width]
                piece[...] = _bits(part).reshape(piece.shape)
        return output

    def read_bytes_total(self, kinds: tuple[Kind, ...]) -> int:
        return sum(self.shape.parameters * BITS[self.dtypes[kind]].itemsize for kind in kinds)

    def check_replicas(self, place: Place) -> None:
        """ConversionError unless every tensor rank has the same copy of a weight that is not cut."""
        stage, name = self._where(place)
        first = self._tensor("weights", 0, stage, name)
        for tensor in range(1, self.tensor_parallel):
            if not torch.equal(first, self._tensor("weights", tensor, stage, name)):
                raise ConversionError(
                    f"{self.folder}: {name} differs between tensor ranks 0 and {tensor} of stage {stage}: files of "
                    "several runs or iterations were mixed"
                )

    def check_optimizer(self, tensor: int, stage: int) -> None:
        """ConversionError unless every fp32 parameter of a rank rounds to its weight: the numbers mean these names."""
        for name in self._stage_names(stage):
            weight = _bits(self._tensor("weights", tensor, stage, name))
            main = _bits(self._tensor("main", tensor, stage, name))
            if not np.array_equal(change_dtype(main, "float32", self.dtypes["weights"], Rounding()), weight):
                raise ConversionError(
                    f"{self._files[tensor, stage]}: the optimizer's fp32 copy of {name} does not round to the weight, "
                    "so its state cannot be told apart; convert without it (--no-optimizer)"
                )

    def _pieces(self, entry: Entry, rows: int, columns: int):
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

    def _where(self, place: Place) -> tuple[int, str]:
        """(pipeline stage, name in its files): layers are counted from 0 in every stage."""
        if place.layer is None:
            return 0 if place.entry.legacy.startswith("embedding.") else self.pipeline_parallel - 1, place.entry.legacy
        stage, layer = divmod(place.layer, self.shape.layers // self.pipeline_parallel)
        return stage, place.entry.legacy.format(layer=layer)

    def _stage_names(self, stage: int) -> list[str]:
        return [name for at, name in map(self._where, places(self.shape)) if at == stage]

    def _load(self, tensor: int, stage: int) -> dict[str, Any]:
        path = self._files[tensor, stage]
        try:
            with torch.serialization.safe_globals(_allowed()):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the loader raises pickle, runtime and key errors alike for a bad file
            raise ConversionError(f"{path} cannot be read safely: {str(error).splitlines()[0]}") from None

    def _tensor(self, kind: Kind, tensor: int, stage: int, name: str) -> torch.Tensor:
        """A mapped tensor; the mapping goes when the tensor does, so that resident memory stays small."""
        state = self._load(tensor, stage)
        if kind == "weights":
            return _model_tensors(state, self._files[tensor, stage])[name]
        number, group, index = self._numbers[stage][name]
        optimizer = state["optimizer"]
        if kind == "main":
            return optimizer["fp32_from_fp16_params"][group][index]
        return optimizer["optimizer"]["state"][number][kind]

    def _check(self, tensor: int, stage: int, path: Path) -> None:
        state = self._load(tensor, stage)
        if state.get("iteration") != self.iteration:
            raise ConversionError(f"{path} is of iteration {state.get('iteration')}, others of {self.iteration}")
        found = _model_tensors(state, path)
        wanted = self._stage_names(stage)
        unused, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
        if unused or missing:
            text = f"lacks {missing[0]}" if missing else f"holds {unused[0]}, which the name table does not know"
            raise ConversionError(f"{path} {text}")
        for place in places(self.shape):
            at, name = self._where(place)
            if at == stage and tuple(found[name].shape) != self._local_shape(place.entry):
                raise ConversionError(
                    f"{path}: {name} is {list(found[name].shape)}, the arguments stored beside say "
                    f"{list(self._local_shape(place.entry))}"
                )
        if "main" in self.dtypes:
            self._numbers[stage] = _adam_numbers(state["optimizer"], found, wanted, path)

    def _local_shape(self, entry: Entry) -> tuple[int, ...]:
        rows, columns = entry.size(self.shape)
        if entry.cut == "whole":
            return (rows,)
        return (
            (rows // self.tensor_parallel, columns) if entry.cut == "rows" else (rows, columns // self.tensor_parallel)
        )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob(f"mp_rank_*/{_FILE}")):
        match = _RANK.fullmatch(path.parent.name)
        if match:
            found[int(match.group(1)), int(match.group(2) or 0)] = path
    if not found:
        raise ConversionError(f"{folder} holds no mp_rank_TT_PPP/{_FILE}; give one iteration, such as iter_0000941")
    return found


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


def _model_tensors(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The nested dictionaries of a file's language model as dotted names."""
    try:
        language_model = state["model"]["language_model"]
    except (KeyError, TypeError):
        raise ConversionError(f"{path} has no model.language_model (interleaved stages are not read)") from None
    found: dict[str, torch.Tensor] = {}

    def walk(prefix: str, node) -> None:
        for key, value in node.items():
            if isinstance(value, dict | collections.OrderedDict):
                walk(f"{prefix}{key}.", value)
            elif isinstance(value, torch.Tensor) and not key.endswith("inv_freq"):
                found[f"{prefix}{key}"] = value

    walk("", language_model)
    return found


def _weight_dtype(state: dict[str, Any], path: Path) -> str:
    dtypes = {tensor.dtype for tensor in _model_tensors(state, path).values()}
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        raise ConversionError(f"{path} holds weights of {sorted(map(str, dtypes))}; one float dtype is read")
    return _DTYPES[dtypes.pop()]


def _adam_numbers(
    optimizer: dict[str, Any], weights: dict[str, torch.Tensor], names: list[str], path: Path
) -> dict[str, tuple[int, int, int]]:
    """{name: (number of Adam's state, parameter group, index in the group)}. ConversionError when shapes disagree."""
    try:
        groups = optimizer["optimizer"]["param_groups"]
        mains = optimizer["fp32_from_fp16_params"]
        states = optimizer["optimizer"]["state"]
    except (KeyError, TypeError):
        raise ConversionError(
            f"{path}: its optimizer is not the fp32-parameters optimizer that K2 used (a distributed one?); convert "
            "without it (--no-optimizer)"
        ) from None
    found: dict[str, tuple[int, int, int]] = {}
    for group, (settings, tensors) in enumerate(zip(groups, mains, strict=True)):
        dimensions = {tensor.dim() for tensor in tensors}
        mine = [name for name in names if {weights[name].dim()} == dimensions]
        if len(mine) != len(tensors):
            raise ConversionError(f"{path}: parameter group {group} has {len(tensors)} tensors, the model {len(mine)}")
        for index, (name, tensor, number) in enumerate(zip(mine, tensors, settings["params"], strict=True)):
            shapes = {tensor.shape, weights[name].shape, states[number]["exp_avg"].shape}
            if len(shapes) != 1:
                raise ConversionError(f"{path}: Adam's state {number} should be that of {name}, and its shape differs")
            found[name] = (number, group, index)
    return found


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, copied out of its mapping; [rows, columns], or [rows, 1] of a vector."""
    plain = tensor.detach().contiguous().clone()
    integer = {2: torch.int16, 4: torch.int32}[plain.element_size()]
    return plain.view(integer).numpy().view(BITS[_DTYPES[tensor.dtype]])
