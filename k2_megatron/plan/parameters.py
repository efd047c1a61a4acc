"""How many parameters the model has, and how many of them each rank holds, by formula and exactly.

In: a Config. Out: counts by component. Tensor parallelism cuts the matrices and replicates the norms; pipeline
parallelism deals out the layers, with the embedding on the first stage and final norm and output matrix on the last.
Data-parallel and context-parallel ranks hold copies. `dry_run.py` checks these counts against the model as built.
"""

from dataclasses import dataclass, fields

from k2_megatron.config import Config


@dataclass(frozen=True)
class Parameters:
    """Counts by component; `layers` says how many transformer layers the attention, mlp and norms are of."""

    layers: int
    embedding: int
    attention: int
    mlp: int
    layer_norms: int
    final_norm: int
    output: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "layers")

    @property
    def without_embeddings(self) -> int:
        """Neither the embedding nor the output matrix."""
        return self.total - self.embedding - self.output


def model_parameters(config: Config) -> Parameters:
    """The whole model, every parameter once."""
    return _count(config, tensor=1, layers=config.model.layers, first=True, last=True)


def rank_parameters(config: Config, pipeline_rank: int) -> Parameters:
    """What one rank of pipeline stage `pipeline_rank` holds; all tensor ranks of a stage hold equally much.

    Under the interleaved schedule a stage holds several chunks of layers, the first stage chunk 0 and the last stage
    the final one, so the sum is the same as without.
    """
    stages = config.parallel.pipeline
    return _count(
        config,
        tensor=config.parallel.tensor,
        layers=config.model.layers // stages,
        first=pipeline_rank == 0,
        last=pipeline_rank == stages - 1,
    )


def _count(config: Config, tensor: int, layers: int, first: bool, last: bool) -> Parameters:
    model = config.model
    hidden, kv_size = model.hidden_size, model.kv_heads * model.head_dim
    vocabulary = model.vocab_size * hidden // tensor
    return Parameters(
        layers=layers,
        embedding=vocabulary * first,
        attention=layers * (2 * hidden * hidden + 2 * hidden * kv_size) // tensor,
        mlp=layers * 3 * hidden * model.ffn_hidden_size // tensor,
        layer_norms=layers * 2 * hidden,
        final_norm=hidden * last,
        output=vocabulary * last,
    )
