"""Hugging Face models as a source: a folder of safetensors with the names of LlamaForCausalLM."""

from pathlib import Path

import numpy as np

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.files import OpenFiles
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import EMBEDDING, OUTPUT, Place, Shape, places, segments
from k2_megatron.convert.numbers import BITS
from k2_megatron.convert.safetensors_file import StoredTensor, read_exactly, read_index
from k2_megatron.convert.source import Kind

_BLOCK_ROWS = 4096
_DERIVED = ".rotary_emb.inv_freq"  # a buffer that old versions of transformers stored; it follows from the RoPE base


class HuggingFaceSource:
    """Reads our rows out of Hugging Face's tensors. Padding rows of the vocabulary are zeros.

    Raises ConversionError unless every tensor of the folder is used exactly once, with the shape the table gives it.
    """

    def __init__(self, folder: Path, facts: ModelFacts) -> None:
        self.folder = folder
        self.shape: Shape = facts.shape
        self.tied = facts.tied_embeddings
        self.tensors = read_index(folder)
        self.derived = sorted(name for name in self.tensors if name.endswith(_DERIVED))
        self._check(folder)
        dtypes = {tensor.dtype for name, tensor in self.tensors.items() if name not in self.derived}
        if len(dtypes) != 1:
            raise ConversionError(f"{folder} mixes {', '.join(sorted(dtypes))}; convert it to one dtype first")
        self.dtypes: dict[Kind, str] = {"weights": dtypes.pop()}
        self._files = OpenFiles(folder)
        if self.tied and OUTPUT.hugging_face[0] in self.tensors:
            self._require_equal_embeddings()

    def read(self, kind: Kind, place: Place, first_row: int, last_row: int) -> np.ndarray:
        assert kind == "weights", f"a Hugging Face model holds no {kind}"
        columns = place.entry.size(self.shape)[1]
        rows = np.empty((last_row - first_row, columns), BITS[self.dtypes["weights"]])
        if place.entry.rows == "vocabulary":
            rows[max(0, self.shape.used_vocabulary - first_row) :] = 0
        names = self._names(place)
        for segment in segments(place.entry, self.shape):
            first = max(first_row, segment.our_row)
            last = min(last_row, segment.our_row + segment.rows)
            if first < last:
                self._read_into(
                    rows[first - first_row : last - first_row],
                    self.tensors[names[segment.tensor]],
                    segment.row + first - segment.our_row,
                )
        return rows

    def read_bytes_total(self, kinds: tuple[Kind, ...]) -> int:
        return self.shape.parameters * BITS[self.dtypes["weights"]].itemsize

    def _read_into(self, rows: np.ndarray, tensor: StoredTensor, first_row: int) -> None:
        position = tensor.position + first_row * rows.shape[1] * rows.itemsize
        read_exactly(self._files.descriptor(tensor.file), rows, position, self._files.folder / tensor.file)

    def _names(self, place: Place) -> tuple[str, ...]:
        """Tied embeddings: the output matrix is read from the embedding, which makes two tensors of one."""
        if self.tied and place.entry is OUTPUT and OUTPUT.hugging_face[0] not in self.tensors:
            return EMBEDDING.hugging_face
        return place.hugging_face

    def _require_equal_embeddings(self) -> None:
        """A folder may tie its embeddings and store both; transformers then takes the one and leaves the other."""
        used = self.shape.used_vocabulary
        for first in range(0, used, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, used)
            first_rows, last_rows = (self.read("weights", Place(e, None), first, last) for e in (EMBEDDING, OUTPUT))
            if not np.array_equal(first_rows, last_rows):
                raise ConversionError(
                    f"{self.folder}: config.json ties the embeddings, and the stored {OUTPUT.hugging_face[0]} differs "
                    f"from {EMBEDDING.hugging_face[0]}; remove the tensor, or say tie_word_embeddings false"
                )

    def _check(self, folder: Path) -> None:
        if self.shape.layers > len(self.tensors):  # before names are made for each
            raise ConversionError(
                f"{folder} holds {len(self.tensors)} tensors, config.json says {self.shape.layers} layers; "
                "fetch both again"
            )
        wanted: dict[str, tuple[int, ...]] = {}
        for place in places(self.shape):
            for index, name in enumerate(self._names(place)):
                rows, columns = place.entry.hugging_face_size(index, self.shape)
                wanted[name] = (rows,) if place.entry.cut == "whole" else (rows, columns)
        unused = sorted(set(self.tensors) - set(wanted) - set(self.derived))
        missing = sorted(set(wanted) - set(self.tensors))
        if unused or missing:
            raise ConversionError(
                f"{folder} does not hold the tensors of its config.json: "
                + "; ".join(
                    f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
                    for word, names in (("missing", missing), ("no place for", unused))
                    if names
                )
            )
        for name, shape in wanted.items():
            if self.tensors[name].shape != shape:
                raise ConversionError(
                    f"{folder}: {name} is {list(self.tensors[name].shape)}, config.json says {list(shape)}"
                )
