"""A Hugging Face model of any shape with random weights, for what measures conversions."""

import json
from pathlib import Path

import numpy as np

from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Shape, places
from k2_megatron.convert.safetensors_file import SINGLE, header_bytes


def write_random_model(folder: Path, shape: Shape, sequence_length: int) -> int:
    """A bfloat16 model of so many positions in one safetensors file; the bytes of its weights."""
    folder.mkdir()
    facts = ModelFacts(shape, sequence_length, 10000.0, 1e-5)
    (folder / "config.json").write_text(json.dumps(facts.hugging_face_config("bfloat16", {})))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for place in places(shape):
        for index, name in enumerate(place.hugging_face):
            rows, columns = place.entry.hugging_face_size(index, shape)
            tensors[name] = ("bfloat16", (rows,) if place.entry.cut == "whole" else (rows, columns))
    generator = np.random.default_rng(0)
    with (folder / SINGLE).open("wb") as stream:
        stream.write(header_bytes(tensors))
        for _dtype, size in tensors.values():
            # Bits of numbers around 0.01: exponents that bfloat16 weights have, all mantissas and signs
            bits = generator.integers(0, 1 << 11, size, dtype=np.uint16)
            stream.write(((bits & 0x3FF) | 0x3C00 | ((bits & 0x400) << 5)).tobytes())
    return 2 * shape.parameters
