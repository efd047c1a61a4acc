"""Memory of a conversion does not grow with the model: peak resident set of a process that converts a model many times
as large as its largest tensor."""

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conversions import export_model, import_model, source_of
from legacy_checkpoint import write_legacy

from benchmarks.random_model import write_random_model
from k2_megatron.convert.import_legacy import import_legacy
from k2_megatron.convert.import_model import ImportOptions
from k2_megatron.convert.logits import compare_logits
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Shape, places
from k2_megatron.convert.reshard import reshard
from k2_megatron.convert.safetensors_file import SINGLE
from k2_megatron.convert.transformers_model import TransformersModel
from k2_megatron.convert.verify import verify_training
from k2_megatron.convert.workers import process_pool, resident_bytes

SHAPE = Shape(
    layers=16, hidden_size=512, ffn_hidden_size=1376, heads=4, kv_heads=4, vocab_size=4096, used_vocabulary=4096
)
LARGEST_BYTES = 4 * 4096 * 512  # of one tensor in float32
BOUND_BYTES = 3 * LARGEST_BYTES + (16 << 20)  # and what the allocator keeps

SMALL_SHAPE = replace(SHAPE, layers=2)


def growth_of(action: Callable[[Path], object], rehearsal: Path, model: Path) -> int:
    """Bytes by which the resident set of a process grows at its peak while it does `action` to `model`.

    It has done it to the small `rehearsal` before: the pages of code that a first conversion maps (hundreds of MB of
    torch, as many as happen to be in the page cache) and what allocators and imports keep are no part of the growth.
    """
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        action(rehearsal)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS: proc_pid_clear_refs(5)
        before = resident_bytes()
        action(model)
        writer.send(resident_bytes() - before)

    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    return reader.recv()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    for folder, shape in ((large, SHAPE), (small, SMALL_SHAPE)):
        folder.mkdir()
        write_random_model(folder / "hf", shape, 64)
    size = (large / "hf" / SINGLE).stat().st_size
    assert size > 2 * BOUND_BYTES
    steps: dict[str, Callable[[Path], object]] = {
        "from-hf": lambda model: import_model(model / "hf", model / "run"),
        "to-hf": lambda model: export_model(model / "run", model / "out"),
        "reshard": lambda model: reshard(model / "run", model / "other", tensor=2, pipeline=2, workers=1),
        "verify": lambda model: verify_training(model / "run" / "checkpoints" / "step_00000000", workers=1),
    }
    for name, action in steps.items():
        grown = growth_of(action, small, large)
        print(f"{name} of {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB")
        assert grown <= BOUND_BYTES, f"{name} of {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB"


def write_old(folder: Path, shape: Shape) -> int:
    """One rank's old file with weights, fp32 copies and moments, 14 bytes a parameter; its bytes."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for place in places(shape):
        for index, name in enumerate(place.hugging_face):
            rows, columns = place.entry.hugging_face_size(index, shape)
            weights[name] = torch.randn((rows,) if place.entry.cut == "whole" else (rows, columns), generator=generator)
    write_legacy(folder / "iter_0000941", weights, {"exp_avg": weights, "exp_avg_sq": weights}, 1, 1)
    (file,) = folder.rglob("*.pt")
    return file.stat().st_size


def test_memory_does_not_grow_with_old_shards(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    shape = Shape(8, 384, 1024, 4, 4, 1024, 1024)
    write_old(small, replace(shape, layers=1))
    size = write_old(large, shape)
    bound = 3 * 4 * 2 * 1024 * 384 + (24 << 20)  # the largest tensor is gate over up; and what the allocator keeps
    assert size > 3 * bound

    def convert(folder: Path) -> None:
        import_legacy(ImportOptions(folder / "iter_0000941", folder / "run", proof=False), optimizer=True)

    grown = growth_of(convert, small, large)
    print(f"{size / 1e6:.0f} MB took {grown / 1e6:.0f} MB")
    assert grown <= bound, f"{size / 1e6:.0f} MB took {grown / 1e6:.0f} MB"


def test_the_proof_holds_half_a_layer_at_most(tmp_path: Path) -> None:
    """K2's layer has 3.24 GB in float32, its MLP 2.16 GB; the bound on a process is 3.16 GB, libraries included."""
    shape = Shape(1, 2560, 4096, 4, 4, 256, 256)
    attention, mlp = (4 * count * 2560 for count in (4 * 2560, 3 * 4096))
    models = []
    for name, sizes in (("small", replace(shape, hidden_size=64, ffn_hidden_size=172)), ("large", shape)):
        write_random_model(tmp_path / name, sizes, 64)
        import_model(tmp_path / name, tmp_path / f"{name}_run")
        facts = ModelFacts.from_hugging_face(tmp_path / name)
        models.append((TransformersModel(tmp_path / name), source_of(tmp_path / f"{name}_run"), facts))
    with process_pool(1, keep_memory=False) as pool:  # as `prove` does it
        pool.submit(compare_logits, *models[0]).result()
        pool.submit(Path("/proc/self/clear_refs").write_text, "5").result()
        before = pool.submit(resident_bytes).result()
        proof = pool.submit(compare_logits, *models[1]).result()
        grown = pool.submit(resident_bytes).result() - before
    print(f"both models took {grown / 1e6:.0f} MB; attention {attention / 1e6:.0f} MB, MLP {mlp / 1e6:.0f} MB")
    assert proof.holds, proof
    assert grown <= mlp + (56 << 20) < mlp + attention, f"{grown / 1e6:.0f} MB"
