"""The pipeline schedule by formula: how much of a step idles, and how many micro-batches a stage holds at once.

1F1B and the interleaved schedule as in Narayanan et al. 2021 (arXiv 2104.04473, section 2.2) and megatron-core.
"""

from k2_megatron.config import Config


def bubble(config: Config, step: int) -> float:
    """Idle time of a stage in update number `step`, as a fraction of its useful time: (P - 1) / (V * M)."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    return (stages - 1) / (chunks * config.micro_batches_at(step))


def chunks_in_flight(config: Config, pipeline_rank: int) -> int:
    """Most (micro-batch, model chunk) pairs whose activations stage `pipeline_rank` holds at one time.

    1F1B: a stage runs ahead of its first backward pass by the stages after it, and holds one more. Interleaved:
    twice the stages after it, as a micro-batch passes them all before it comes back to the stage's next chunk, and
    one round of all stages for every chunk but the last. Never more than there are in a step.
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    after = stages - pipeline_rank - 1
    ahead = after if chunks == 1 else 2 * after + (chunks - 1) * stages
    return min(ahead + 1, config.micro_batches_at(config.train.steps - 1) * chunks)
