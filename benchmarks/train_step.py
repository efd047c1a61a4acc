"""Tokens/s of whole training steps: K2 on megatron-core with our kernels against transformers' LlamaForCausalLM.

    python -m benchmarks.train_step [--kernels cpu] [--precision float32] [--steps 20]

Same shapes, same batch, same threads, gradient clipping and AdamW on both sides; torch's fused AdamW and SDPA attention
on transformers' side. Steps are taken in turns, ours, theirs, ours ..., so that a machine whose speed drifts slows
both; the ratio to quote is the median over pairs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy
import torch

from k2_megatron.config import Config
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.optimizer import build_optimizer, set_learning_rate, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.step import train_step

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class RandomRows:
    """A feed of seeded random tokens, made before the clock starts."""

    def __init__(self, batch: int, sequence: int, vocabulary: int) -> None:
        self._rows = numpy.random.default_rng(0).integers(0, vocabulary, (batch, sequence + 1), dtype=numpy.int32)
        self.seconds_waited = 0.0

    def tokens(self, _first_sample: int, count: int) -> numpy.ndarray:
        return self._rows[:count]

    def prefetch(self, _first_sample: int, _count: int) -> None:
        """All rows are in memory."""


def make_config(options: argparse.Namespace) -> Config:
    """A K2-shaped model of the asked size, as one process trains it."""
    return Config.model_validate(
        {
            "run": {"folder": tempfile.gettempdir(), "seed": 1},
            "model": {
                "layers": options.layers,
                "hidden_size": options.hidden_size,
                "ffn_hidden_size": options.ffn_hidden_size,
                "heads": options.heads,
                "kv_heads": options.heads,
                "vocab_size": options.vocab_size,
                "sequence_length": options.sequence_length,
                "kernels": {"default": options.kernels},
            },
            "data": {"train": "random"},
            "train": {
                "steps": 1_000_000,
                "micro_batch": options.batch,
                "global_batch": options.batch,
                "precision": options.precision,
            },
            "optimizer": {
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "weight_decay": WEIGHT_DECAY,
                "clip_grad_norm": CLIP,
            },
        }
    )


def our_step(config: Config, device) -> Callable[[], float]:
    """A function that takes one step of ours and returns its loss."""
    groups = build_groups(config.parallel)
    seed_everything(config.run.seed, groups)
    kernels = choose_backends(config.model.kernels, device.type)
    chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
    optimizer = build_optimizer(config, chunks, kernels, groups.collection)
    parts = Parts(groups, chunks, optimizer, device.torch)
    feed = RandomRows(config.train.global_batch, config.model.sequence_length, config.model.vocab_size)
    set_learning_rate(optimizer, LEARNING_RATE, WEIGHT_DECAY)
    return lambda: train_step(config, parts, cast(AnyFeed, feed), 0).loss  # it asks for tokens alone


def transformers_step(config: Config, device) -> Callable[[], float]:
    """A function that takes one step of transformers' model and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.train.precision]
    shape = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.sequence_length,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # is of every configuration, which takes it by name
    )
    llama = LlamaForCausalLM(shape).to(device.torch, dtype)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )
    feed = RandomRows(config.train.global_batch, model.sequence_length, model.vocab_size)

    def step() -> float:
        optimizer.zero_grad()
        rows = torch.from_numpy(feed.tokens(0, config.train.global_batch).astype(numpy.int64)).to(device.torch)
        # The shift to the next token is transformers' own: as many targets as ours.
        loss = llama(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def seconds_of(step: Callable[[], float], device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> int:
    options = parse()
    config = make_config(options)
    device = find_device(local_rank=0)
    if options.threads:
        torch.set_num_threads(options.threads)
    theirs = transformers_step(config, device)
    with cpu_stands_in_for_cuda(device.type):
        connect(single_rank(), device, timeout_seconds=60.0)
        ours = our_step(config, device)
        for _ in range(options.warmup):
            ours()
    for _ in range(options.warmup):
        theirs()
    pairs = []
    for _ in range(options.steps):
        with cpu_stands_in_for_cuda(device.type):
            mine = seconds_of(ours, device)
        pairs.append((mine, seconds_of(theirs, device)))
    disconnect()

    tokens = config.tokens_per_step
    our_speed = tokens / statistics.median(mine for mine, _ in pairs)
    their_speed = tokens / statistics.median(other for _, other in pairs)
    ratio = statistics.median(other / mine for mine, other in pairs)
    print(f"{device.name}, {torch.get_num_threads()} threads, {config.train.precision}, kernels {options.kernels}")
    print(f"ours          {our_speed:>12,.0f} tokens/s")
    print(f"transformers  {their_speed:>12,.0f} tokens/s")
    print(f"ratio         {ratio:>12.3f} (ours / transformers, median of {len(pairs)} pairs)")
    if options.output:
        result = {"device": device.name, **vars(options), "output": None, "tokens_per_second": our_speed}
        result |= {"transformers_tokens_per_second": their_speed, "ratio": ratio, "torch": torch.__version__}
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--ffn-hidden-size", type=int, default=688)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kernels", choices=("auto", "cuda", "cpu", "torch"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
