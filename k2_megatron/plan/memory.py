"""Memory of each rank by formula: model state exactly, activations and logits as an estimate.

In: a Config. Out: bytes by kind for a rank of each pipeline stage.

Model state. bfloat16 keeps 2 bytes of weights, 4 of gradients (accumulated and reduced in fp32), and in the optimizer
4 of fp32 main weights and 8 of Adam's two moments: 18 bytes a parameter. float32 needs no second copy of the weights:
16 bytes. The distributed optimizer divides the optimizer's share by the ranks that hold copies (data * context): 6 +
12 / DP bytes under bfloat16. Gradient leaves (config/leaves.py) cost one more gradient buffer for each level of their
tree that a rank adds up by itself.

Activations follow the accounting of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), with the tensors that our
layer keeps for its backward pass: no dropout masks, no S x S scores (flash attention), SwiGLU packed. Per micro-batch
and layer, in units of S * B elements, T the tensor ranks:
    residual  4 H: the layer's input, its norm's output, the sum after attention, that norm's output; divided by T
              under sequence parallelism. Two fp32 inverse roots beside them.
    attention (2 H + 2 K) / T: query, key and value after rotary, and the output; fp32 log-sum-exps, heads / T.
              Under context parallelism over C ranks (2 K C + H) / T more: the gathered keys and values, and the two
              pieces' outputs joined; selective recompute gathers again.
    mlp       3 F / T: packed gate and up, and their product.
After the last layer come the final norm's input and output and the logits (of model.loss_chunk_tokens at a time), whose
storage their gradient takes over.
The first stage of 1F1B holds as many micro-batches as there are stages, the last holds one. The tests compare with
what autograd saves with the compiled CPU kernels; the torch backend keeps about twice as much.

Not counted: the CUDA context and NCCL's buffers, what the allocator loses to fragmentation, GEMM workspaces, and
pipeline buffers in flight: allow some GiB.
"""

from dataclasses import dataclass, fields

from k2_megatron.config import Config
from k2_megatron.config.leaves import levels_of_a_rank
from k2_megatron.plan.parameters import rank_parameters
from k2_megatron.plan.schedule import chunks_in_flight

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
ADAM_BYTES = 8
MAIN_WEIGHT_BYTES = {"float32": 0, "bfloat16": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def model_state(self) -> int:
        """What is there between two steps: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(config: Config, pipeline_rank: int) -> Memory:
    """Memory of a rank of pipeline stage `pipeline_rank`; all ranks of a stage need equally much."""
    parameters = rank_parameters(config, pipeline_rank).total
    precision = config.train.precision
    sharers = config.parallel.data * config.parallel.context if config.parallel.distributed_optimizer else 1
    leaves, data = config.train.gradient_leaves, config.parallel.data
    buffers = 1 if leaves is None else 1 + len(levels_of_a_rank(leaves, data))
    last = pipeline_rank == config.parallel.pipeline - 1
    return Memory(
        weights=parameters * ELEMENT_BYTES[precision],
        gradients=parameters * GRADIENT_BYTES * buffers,
        optimizer=-(-parameters * (MAIN_WEIGHT_BYTES[precision] + ADAM_BYTES) // sharers),
        activations=_activations(config, pipeline_rank),
        logits=output_bytes(config) if last else 0,
    )


def micro_batch_tokens(config: Config) -> int:
    """S * B of one rank in one micro-batch."""
    return config.model.sequence_length * config.train.micro_batch // config.parallel.context


def layer_activation_bytes(config: Config, recompute: str) -> int:
    """What one layer keeps of one micro-batch until its backward pass, in bytes."""
    model, tensor = config.model, config.parallel.tensor
    element, positions = ELEMENT_BYTES[config.train.precision], micro_batch_tokens(config)
    hidden, kv_size = model.hidden_size, model.kv_heads * model.head_dim
    residual_shards = tensor if config.parallel.sequence else 1
    if recompute == "full":
        return positions * hidden * element // residual_shards
    inverse_roots = 2 * 4
    residual = (4 * hidden * element + inverse_roots) // residual_shards
    # Under selective recompute the log-sum-exps are computed again; the output stays, as the projection's input.
    log_sum_exps = 0 if recompute == "selective" else 4 * model.heads // tensor
    attention = (2 * hidden + 2 * kv_size) * element // tensor + log_sum_exps
    if config.parallel.context > 1 and recompute != "selective":
        attention += (2 * kv_size * config.parallel.context + hidden) * element // tensor
    return positions * (residual + attention + 3 * model.ffn_hidden_size * element // tensor)


def _activations(config: Config, pipeline_rank: int) -> int:
    recompute = config.train.recompute
    kept = chunks_in_flight(config, pipeline_rank) * config.layers_per_chunk * layer_activation_bytes(config, recompute)
    # While a layer runs its backward pass again, all that it kept back is there for that one layer.
    working = layer_activation_bytes(config, "none") if recompute == "full" else 0
    return kept + working


def output_bytes(config: Config) -> int:
    """What the last stage keeps of one micro-batch after its layers: final norm and logits, in bytes.

    In chunks there are the logits of one at a time, and the norm's output is kept as it was gathered.
    """
    element, positions, model = ELEMENT_BYTES[config.train.precision], micro_batch_tokens(config), config.model
    residual_shards = config.parallel.tensor if config.parallel.sequence else 1
    hidden, chunk = model.hidden_size * element, model.loss_chunk_tokens
    logits = model.vocab_size * element // config.parallel.tensor * min(positions, chunk or positions)
    output_shards = 1 if chunk else residual_shards
    return logits + positions * ((hidden + 4) // residual_shards + hidden // output_shards)
