"""Random generators of a rank. K2 has no dropout: weights and data come from seeded pure functions, so what is seeded
here decides nothing today, and is still saved and restored so that a model which draws numbers resumes exactly."""

import os
import random

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from k2_megatron.runtime.groups import Groups


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed Python, numpy, torch and megatron-core's tensor-parallel tracker of this rank."""
    # Stages draw different numbers, as in megatron-core; tensor ranks differ within the tracker only.
    stage_seed = seed + 100 * groups.pipeline_rank
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(
        stage_seed,
        tp_rank=groups.tensor_rank,
        ep_rank=0,
        etp_rank=groups.tensor_rank,
        force_reset_rng=True,
    )


def require_determinism() -> None:
    """Have torch use repeatable algorithms alone, and raise where an operation has none (train.deterministic)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: one fixed workspace a stream
    os.environ.setdefault("NCCL_ALGO", "Ring")  # a tree adds up in an order that depends on timing
    torch.use_deterministic_algorithms(True)


def random_states() -> dict:
    """All generator states of this rank, in types that load without unpickling code (numbers, tuples, tensors)."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    words = torch.from_numpy(numpy.asarray(keys).astype(numpy.int64))
    states = {
        "python": random.getstate(),
        "numpy": (name, words, position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states["tracker"] = get_cuda_rng_tracker().get_states()
    return states


def restore_random_states(states: dict) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(dict(states["tracker"]))  # it keeps what it is given, and writes into it
