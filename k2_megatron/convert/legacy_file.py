"""One rank's file of the old K2 training code, told as positions of tensors: nothing of it is mapped or held.

Files are pickles. They are read with torch's weights_only loader and the few names below allowed, under fake tensors,
which have a shape, a dtype and the position of their first byte, and no data.
"""

import argparse
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.safetensors_file import StoredTensor

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_OLDEST_VERSION = 2.0  # before it the rows of a fused QKV were grouped otherwise


class _EnumValue(int):
    """A member of one of the training code's enumerations, as its number."""


@dataclass(frozen=True)
class RankFile:
    """`weights` are by name, a dictionary a model chunk (one chunk, unless stages were interleaved)."""

    path: Path
    arguments: argparse.Namespace
    iteration: int
    weights: tuple[dict[str, StoredTensor], ...]
    optimizer: dict[str, Any] | None

    @property
    def dtype(self) -> str:
        """The dtype of the weights. ConversionError when there are several."""
        dtypes = {tensor.dtype for named in self.weights for tensor in named.values()}
        if len(dtypes) != 1:
            raise ConversionError(f"{self.path} holds weights of {sorted(dtypes)}; one float dtype is read")
        return dtypes.pop()


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """{(tensor rank, pipeline rank): file} of one iteration. ConversionError when one is missing or there twice."""
    found: dict[tuple[int, int], Path] = {}
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):  # glob would find nothing there
        raise ConversionError(f"{folder} cannot be read (Permission denied); restore access to it")
    for path in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            rank = int(match.group(1)), int(match.group(2) or 0)
            if rank in found:
                raise ConversionError(f"{found[rank].parent} and {path.parent.name} are the same rank; remove one")
            found[rank] = path
    if not found:
        iterations = sorted(folder.glob("iter_*")) or [Path("iter_0000941")]
        raise ConversionError(f"{folder} holds no mp_rank_TT_PPP/{FILE}; give one iteration, such as {iterations[-1]}")
    ranks, stages = (1 + max(numbers) for numbers in zip(*found, strict=True))
    missing = sorted({(tensor, stage) for tensor in range(ranks) for stage in range(stages)} - set(found))
    if missing:
        raise ConversionError(f"{folder} lacks the file of tensor rank {missing[0][0]}, pipeline rank {missing[0][1]}")
    return found


def load_safely(path: Path, **how) -> dict[str, Any]:
    """torch.load with the allow-list. ConversionError when the file is damaged, or names anything else."""
    try:
        with torch.serialization.safe_globals(_allowed()):
            state = torch.load(path, weights_only=True, **how)
    except PermissionError:
        raise ConversionError(f"{path} cannot be read (Permission denied); restore access to it") from None
    except OSError:  # a position outside the file
        raise ConversionError(f"{path} cannot be read: it is cut or damaged; fetch it again") from None
    except Exception as error:  # the loader raises pickle, runtime, key and other errors alike for a bad file
        raise ConversionError(f"{path} cannot be read safely: {_why_refused(error)}") from None
    if not isinstance(state, dict):
        raise ConversionError(f"{path} holds a {type(state).__name__}, not the state of a training run")
    return state


def _why_refused(error: Exception) -> str:
    """In our words: torch's advise to load the file without restriction."""
    names = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if names:
        return f"it names {names.group(1)}, which no checkpoint of K2's holds and which may run code; use another file"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, numbers and text, which may run code; use another file"
    return f"it is cut, damaged or no file of torch.save ({type(error).__name__}); fetch it again"


def read_rank_file(folder: Path, path: Path, *, optimizer: bool) -> RankFile:
    """What a file of `folder` holds. ConversionError when it is damaged, or not of that code."""
    with FakeTensorMode():
        state = load_safely(path)
    arguments, iteration = state.get("args"), state.get("iteration")
    if not isinstance(arguments, argparse.Namespace) or not isinstance(iteration, int):
        raise ConversionError(f"{path} lacks the arguments or the iteration of its run: it is no checkpoint of K2's")
    version = state.get("checkpoint_version", 0)
    if not (isinstance(version, int | float) and version >= _OLDEST_VERSION):
        raise ConversionError(f"{path} has checkpoint_version {version!r}; {_OLDEST_VERSION} and newer are read")
    name = str(path.relative_to(folder))
    weights = tuple(
        {key: _stored(name, tensor, path) for key, tensor in model_tensors(model, path)}
        for model in model_chunks(state, path)
    )
    adam = _adam(name, state["optimizer"], path) if optimizer and "optimizer" in state else None
    return RankFile(path, arguments, iteration, weights, adam)


def model_chunks(state: dict[str, Any], path: Path) -> list[Any]:
    """The models of a rank: "model", or with interleaved stages "model0", "model1" and so on."""
    if "model" in state:
        return [state["model"]]
    numbers = sorted(int(key[5:]) for key in state if re.fullmatch(r"model\d+", str(key)))
    if not numbers or numbers != list(range(len(numbers))):
        raise ConversionError(f"{path} holds neither model nor model0, model1 ... (found {sorted(map(str, state))})")
    return [state[f"model{number}"] for number in numbers]


def model_tensors(model: Any, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The nested dictionaries of a language model as dotted names. inv_freq follows from the RoPE base."""

    def walk(prefix: str, node: dict) -> Iterator[tuple[str, torch.Tensor]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(f"{prefix}{key}.", value)
            elif isinstance(value, torch.Tensor) and not str(key).endswith("inv_freq"):
                yield f"{prefix}{key}", value

    if not isinstance(model, dict) or not isinstance(model.get("language_model"), dict):
        raise ConversionError(f"{path} has no model.language_model")
    yield from walk("", model["language_model"])


def _stored(file: str, tensor: Any, path: Path) -> StoredTensor:
    """Where a tensor's bytes lie."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES or not tensor.is_contiguous():
        what = f"{tensor.dtype}, strides {tensor.stride()}" if isinstance(tensor, torch.Tensor) else type(tensor)
        raise ConversionError(f"{path} holds a tensor that is {what}; dense {', '.join(_DTYPES.values())} are read")
    return StoredTensor(file, _position(tensor), _DTYPES[tensor.dtype], tuple(tensor.shape))


def _position(tensor: torch.Tensor) -> int:
    start = tensor.untyped_storage()._checkpoint_offset  # torch's own word for it, given under fake tensors alone
    assert isinstance(start, int), "torch.load under fake tensors gave no position"
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _adam(file: str, optimizer: dict[str, Any], path: Path) -> dict[str, Any]:
    """{"groups": numbers by group, "main": fp32 parameters by group, "state": moments by number, "updates": count}."""
    try:
        return {
            "updates": _updates(optimizer["optimizer"], path),
            "groups": [group["params"] for group in optimizer["optimizer"]["param_groups"]],
            "main": [[_stored(file, t, path) for t in group] for group in optimizer["fp32_from_fp16_params"]],
            "state": {
                number: {kind: _stored(file, state[kind], path) for kind in ("exp_avg", "exp_avg_sq")}
                for number, state in optimizer["optimizer"]["state"].items()
            },
        }
    except (KeyError, TypeError):
        raise ConversionError(
            f"{path}: its optimizer is not the fp32-parameters optimizer that K2 used (a distributed one?); convert "
            "without it (--no-optimizer)"
        ) from None


def _updates(adam: dict[str, Any], path: Path) -> int | None:
    """How many updates Adam counts, in its groups (apex) or with each tensor's moments (torch); None if it does not.

    Fewer than iterations where updates were skipped. ConversionError when tensors were updated unequally often.
    """
    holders = (*adam["param_groups"], *adam["state"].values())
    found = {_number(holder["step"], path) for holder in holders if holder.get("step") is not None}
    if len(found) > 1:
        raise ConversionError(
            f"{path}: Adam made {' and '.join(map(str, sorted(found)))} updates of different tensors; one count is "
            "read, convert without it (--no-optimizer)"
        )
    return found.pop() if found else None


def _number(value: Any, path: Path) -> int:
    if not isinstance(value, torch.Tensor):
        return int(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return int(np.fromfile(path, dtype, 1, offset=_position(value))[0])  # a fake tensor has no value of its own


def _allowed() -> list:
    reconstruct = np.array([]).__reduce__()[0]
    enumerations = ("megatron.core.enums.ModelType", "megatron.model.enums.ModelType")
    return [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.uint32)),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        *((_EnumValue, name) for name in enumerations),
    ]
