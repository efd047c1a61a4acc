"""What a checkpoint costs one rank: what the step waits, what hashing takes, the memory; and what a start takes.

    python -m benchmarks.save [--layers 16] [--mode background] [--turns 3] [--hash xxh3] [--folder SCRATCH]

A bfloat16 model of K2's shape with fp32 main parameters and both moments, all filled (14 bytes a parameter; the default
is 551 M parameters, 7.7 GB). In the background a save holds a copy as large again. Gradients are let go: no step is
taken. Each turn saves once, and writes the same bytes plainly, synced, for comparison.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

from k2_megatron.config import Config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoints import hashing_writer
from k2_megatron.train.checkpoints.file_hash import AES_LANES, HASHES
from k2_megatron.train.checkpoints.load import find_checkpoint, load_checkpoint
from k2_megatron.train.checkpoints.manifest import folder_name, read_manifest
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import model_state, optimizer_state, part_bytes, weight_fingerprint
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts

KERNELS = dict.fromkeys(OPS, "torch")
HIDDEN, FFN, HEADS, VOCABULARY = 1536, 4096, 12, 32032


def make_config(layers: int, asynchronous: bool) -> Config:
    model = {
        "layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "heads": HEADS,
        "kv_heads": HEADS,
        "vocab_size": VOCABULARY,
        "sequence_length": 128,
    }
    train = {"steps": 1000, "micro_batch": 1, "global_batch": 1, "precision": "bfloat16"}
    return Config.model_validate(
        {
            "run": {"folder": tempfile.gettempdir(), "seed": 1},
            "model": model,
            "data": {"train": "none"},
            "train": train,
            "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
            "checkpoint": {"asynchronous": asynchronous},
        }
    )


CLOCK_READINGS = 10_000


class HashClock:
    """CPU seconds of the writer's hashing, without those of reading the clock around each block, a tenth as many."""

    def __init__(self) -> None:
        began = time.thread_time()
        for _ in range(CLOCK_READINGS):
            time.thread_time()
        reading = (time.thread_time() - began) / CLOCK_READINGS
        self.seconds = 0.0
        make = hashing_writer.new_hash
        clock = self

        class Digest:
            def __init__(self, name: str) -> None:
                self.digest = make(name)

            def update(self, data) -> None:
                began = time.thread_time()
                self.digest.update(data)
                clock.seconds += time.thread_time() - began - reading

            def hexdigest(self) -> str:
                return self.digest.hexdigest()

        hashing_writer.new_hash = Digest


def write_plainly(path: Path, size: int) -> float:
    """Bytes a second of writing `size` bytes from memory in blocks of 64 MiB and syncing them."""
    block = os.urandom(64 << 20)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    path.unlink()
    return size // len(block) * len(block) / seconds


def measure(options: argparse.Namespace, folder: Path) -> None:
    config, device = make_config(options.layers, options.mode == "background"), find_device(0)
    with cpu_stands_in_for_cuda(device.type):
        connect(single_rank(), device, 60.0)
        groups = build_groups(config.parallel)
        seed_everything(1, groups)
        chunks = wrap_model(config, build_model(config, KERNELS, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, KERNELS, groups.collection)
        parts = Parts(groups, chunks, optimizer, device.torch)
        optimizer_state(optimizer, model_state(chunks), loading=True)  # makes the moments, as a first step would
        for moments in optimizer.chained_optimizers[0].optimizer.state.values():
            for moment in moments.values():  # one that nothing was written to would be a page of zeros
                moment.uniform_()
        for buffer in chunks[0].buffers:  # no step is taken
            buffer.grad_data.untyped_storage().resize_(0)
        parameters = sum(parameter.numel() for parameter in chunks[0].parameters())
        hashing_writer.HASH = options.hash
        process, clock = psutil.Process(), HashClock()
        resident = process.memory_info().rss
        print(f"{parameters / 1e6:.0f} M parameters, {resident / 1e9:.1f} GB resident, {options.mode}", flush=True)
        saver = CheckpointWriter(
            folder / "checkpoints",
            groups,
            asynchronous=config.checkpoint.asynchronous,
            part_bytes=part_bytes(chunks, groups),
        )
        time.sleep(0.5 * parameters / 1e8 if config.checkpoint.asynchronous else 0.0)  # a run trains before it saves
        for turn in range(1, options.turns + 1):
            began = time.monotonic()
            weight_fingerprint(chunks, device.torch)
            fingerprint = time.monotonic() - began
            clock.seconds = 0.0
            used = time.thread_time()
            saver.save(turn, config, parts, {})
            used = time.thread_time() - used
            held = process.memory_info().rss - resident
            saved = saver.wait()
            assert saved is not None, "a save was begun"
            plain = write_plainly(folder / "plain", saved.bytes)
            facts = {
                "bytes": saved.bytes,
                "stall_seconds": round(saved.stall_seconds, 2),
                "stall_cpu_seconds": round(used, 2),
                "fingerprint_seconds": round(fingerprint, 2),
                "stall_gb_per_second": round(saved.bytes / saved.stall_seconds / 1e9, 2),
                "seconds": round(saved.seconds, 2),
                "gb_per_second": round(saved.bytes / saved.seconds / 1e9, 2),
                "plain_gb_per_second": round(plain / 1e9, 2),
                "hash_cpu_seconds": round(clock.seconds, 2),
                "hash_percent": round(100 * clock.seconds / saved.seconds, 1),
                "memory_grew_gb": round(held / 1e9, 2),
            }
            print(json.dumps(facts), flush=True)
            if turn < options.turns:
                shutil.rmtree(saved.folder)
        began = time.monotonic()
        found, doubts = find_checkpoint(folder / "checkpoints", groups)
        verified = time.monotonic() - began
        assert found and found.name == folder_name(options.turns) and not doubts
        load_checkpoint(found, read_manifest(found), config, parts)
        loaded = time.monotonic() - began - verified
        print(json.dumps({"verify_seconds": round(verified, 2), "load_seconds": round(loaded, 2)}))
        disconnect()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/save.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=16, help="16: 551 M parameters; 10: 381 M")
    parser.add_argument("--mode", choices=("foreground", "background"), default="foreground")
    parser.add_argument("--hash", choices=HASHES, default=AES_LANES, help="xxh3: as earlier versions, to compare")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; left out, a temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
