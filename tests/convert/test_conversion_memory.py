"""Memory of a conversion does not grow with the model: peak resident set of a process that converts a model many times
as large as its largest tensor."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from conversions import export_model, import_model
from legacy_checkpoint import write_legacy

from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.import_model import ImportOptions
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Shape, places
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.safetensors_file import SINGLE, header_bytes
from k2_megatron.convert.verify import verify_training
from k2_megatron.convert.work import resident_bytes

SHAPE = Shape(
    layers=16, hidden_size=512, ffn_hidden_size=1376, heads=4, kv_heads=4, vocab_size=4096, used_vocabulary=4096
)
LARGEST_BYTES = 4 * 4096 * 512  # of one tensor in float32
BOUND_BYTES = 3 * LARGEST_BYTES + (24 << 20)  # and what the allocator keeps


def write_model(folder: Path) -> int:
    """A bfloat16 model of about 110 MB; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(ModelFacts(SHAPE, 64, 1e4, 1e-5).hugging_face_config("bfloat16", {}))
    )
    tensors = {}
    for place in places(SHAPE):
        for index, name in enumerate(place.hugging_face):
            rows, columns = place.entry.hugging_face_size(index, SHAPE)
            tensors[name] = ("bfloat16", (rows,) if place.entry.cut == "whole" else (rows, columns))
    generator = numpy.random.default_rng(0)
    with (folder / SINGLE).open("wb") as stream:
        stream.write(header_bytes(tensors))
        for _dtype, size in tensors.values():
            stream.write((generator.integers(0, 1 << 10, size, numpy.uint16) | 0x3C00).tobytes())
    return (folder / SINGLE).stat().st_size


def growth_of(action: Callable[[], object]) -> int:
    """Bytes by which the resident set of a process grows at its peak while it does `action`."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        before = resident_bytes()
        action()
        writer.send(resident_bytes() - before)

    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return reader.recv()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = write_model(tmp_path / "hf")
    assert size > 2 * BOUND_BYTES
    run = tmp_path / "run"
    steps: dict[str, Callable[[], object]] = {
        "from-hf": lambda: import_model(tmp_path / "hf", run),
        "to-hf": lambda: export_model(run, tmp_path / "out"),
        "reshard": lambda: reshard(run, tmp_path / "other", tensor=2, pipeline=4, workers=1),
        "verify": lambda: verify_training(run / "checkpoints" / "step_00000000", workers=1),
    }
    for name, action in steps.items():
        grown = growth_of(action)
        assert grown <= BOUND_BYTES, f"{name} of {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB"


def test_memory_does_not_grow_with_old_shards(tmp_path: Path) -> None:
    """Weights, fp32 copies and moments of one rank's file: 14 bytes a parameter."""
    generator = torch.Generator().manual_seed(1)
    shape = Shape(8, 384, 1024, 4, 4, 1024, 1024)
    weights = {}
    for place in places(shape):
        for index, name in enumerate(place.hugging_face):
            rows, columns = place.entry.hugging_face_size(index, shape)
            weights[name] = torch.randn((rows,) if place.entry.cut == "whole" else (rows, columns), generator=generator)
    folder = tmp_path / "iter_0000941"
    write_legacy(folder, weights, {"exp_avg": weights, "exp_avg_sq": weights}, 1, 1)
    (file,) = folder.rglob("*.pt")
    bound = 3 * 4 * 2 * 1024 * 384 + (48 << 20)  # the largest tensor is gate over up; and torch's loader
    assert file.stat().st_size > 3 * bound
    options = ImportOptions(folder, tmp_path / "run", proof=False)
    grown = growth_of(lambda: import_legacy(options, optimizer=True))
    assert grown <= bound, f"{file.stat().st_size / 1e6:.0f} MB took {grown / 1e6:.0f} MB"
