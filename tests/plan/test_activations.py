"""The activation formula against what autograd really keeps of one micro-batch, with the compiled CPU kernels.

The model runs with real tensors in a world of fake ranks: collectives return without data, which leaves every shape,
and so every size, as it is on a real rank.
"""

import json
import subprocess
import sys

import pytest

from k2_megatron.config import load_config
from k2_megatron.plan.memory import layer_activation_bytes, output_bytes

TOY = "examples/toy/toy.toml"
PROGRAM = """
import gc, json, sys, weakref
from k2_megatron.runtime.quiet import silence_dependencies
silence_dependencies()
import torch, torch.distributed
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore
from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model.build import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.groups import build_groups, disconnect

class Kept:
    def __init__(self, tensor):
        self.tensor = tensor

def kept_bytes(config):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    groups = build_groups(config.parallel)
    model_parallel_cuda_manual_seed(1)
    [model] = build_model(config, dict.fromkeys(OPS, "cpu"), groups.collection)
    kept = weakref.WeakSet()
    def pack(tensor):
        holder = Kept(tensor)
        kept.add(holder)  # lives as long as autograd keeps it: what a recomputed pass saved is gone by the end
        return holder
    length = config.model.sequence_length // config.parallel.context
    tokens = torch.zeros(config.train.micro_batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = model(tokens, None, None, labels=tokens)
    gc.collect()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {holder.tensor.untyped_storage().data_ptr(): holder.tensor.untyped_storage().nbytes() for holder in kept}
    disconnect()
    return sum(size for address, size in storages.items() if address not in weights)

path, *layouts = json.loads(sys.argv[1])
with cpu_stands_in_for_cuda("cpu"):
    print(json.dumps([kept_bytes(load_config(path, layout)) for layout in layouts]))
"""
ONE_STAGE = ["parallel.pipeline=1"]
LAYOUTS = [
    [],
    ["train.precision=bfloat16"],
    ["parallel.sequence=false", "model.kv_heads=2"],
    ["parallel.tensor=1", "parallel.sequence=false", "model.layers=2"],
    ["train.precision=bfloat16", "train.recompute=selective"],
    ["train.recompute=full"],
    ["parallel.context=2"],
    ["parallel.context=2", "train.recompute=selective", "model.kv_heads=2"],
    ["model.loss_chunk_tokens=192"],
    ["model.loss_chunk_tokens=192", "parallel.sequence=false"],
]


@pytest.fixture(scope="module")
def kept():
    command = [sys.executable, "-c", PROGRAM, json.dumps([TOY, *([*ONE_STAGE, *layout] for layout in LAYOUTS)])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[",".join(layout) or "toy" for layout in LAYOUTS])
def test_formula_is_what_autograd_keeps(kept, index):
    config = load_config(TOY, [*ONE_STAGE, *LAYOUTS[index]])
    formula = config.model.layers * layer_activation_bytes(config, config.train.recompute) + output_bytes(config)
    # Of a loss in chunks autograd is not told of the logits that wait.
    formula -= 4 * (config.model.loss_chunk_tokens or 0) * config.model.vocab_size // config.parallel.tensor
    # Not in the formula: the rotary table and a few numbers a position around token ids and loss.
    table = config.model.sequence_length * config.model.head_dim * 4
    a_few = 64 * config.model.sequence_length * config.train.micro_batch
    # Nor the masks that torch writes out for attention from the lower right corner on the CPU, one byte an entry.
    masks = config.model.layers * config.model.sequence_length**2 if config.parallel.context > 1 else 0
    assert formula <= kept[index] <= formula + table + a_few + masks
