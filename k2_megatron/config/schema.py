"""The sections of a run's TOML file as frozen pydantic models: names, types, ranges, defaults, and what each means.

In: the tables of one TOML file. Out: typed sections that `tree.Config` holds. A check that needs one field alone is
written here as its type; a check that needs several fields is in `checks.py`. Optional fields are left out of the file
to switch the feature off: TOML has no null, and a zero that means "off" would be a second way of saying it.
"""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
CountInt = Annotated[int, Field(ge=0)]
SeedInt = Annotated[int, Field(ge=0, lt=2**63)]  # TOML's integers; torch takes a little more
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CountFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BetaFloat = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1)]
Backend = Literal["auto", "cuda", "cpu", "torch", "apex", "transformer_engine"]
OurBackend = Literal["auto", "cuda", "cpu", "torch"]
ApexBackend = Literal["auto", "cuda", "cpu", "torch", "apex"]
TransformerEngineBackend = Literal["auto", "cuda", "cpu", "torch", "transformer_engine"]


class Section(BaseModel):
    """One table of the file: frozen, strict about types (no "4" for 4, no true for 1), closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Run(Section):
    """Where the run lives and what its random numbers start from."""

    folder: PathText
    """Run folder (journal, ledger, checkpoints). A relative path is relative to the current directory."""
    seed: SeedInt
    """Seed of the initial weights, of the data order and of anything else random in the run."""


class Kernels(Section):
    """Which backend computes each of our ops; `kernels = "cpu"` in the file is short for `{default = "cpu"}`."""

    default: Backend = "auto"
    """Backend of every op that has no entry of its own; "auto" takes the fastest that this machine can run."""
    rms_norm: Backend | None = None
    """Backend of RMSNorm, alone and fused with the residual addition."""
    rotary: TransformerEngineBackend | None = None
    """Backend of the rotary position embedding."""
    cross_entropy: TransformerEngineBackend | None = None
    """Backend of the vocabulary-parallel cross entropy."""
    swiglu: OurBackend | None = None
    """Backend of SwiGLU."""
    adamw: ApexBackend | None = None
    """Backend of the AdamW update."""

    def backend(self, op: str) -> str:
        """Backend asked for `op` (a field of this table other than default)."""
        return getattr(self, op) or self.default

    def not_offered(self) -> list[str]:
        """Ops that are left to the default backend, and that it does not compute."""
        offered = {op: get_args(get_args(field.annotation)[0]) for op, field in type(self).model_fields.items()}
        return [op for op in offered if getattr(self, op) is None and self.default not in offered[op]]


def _kernels_from_text(value: object) -> object:
    return {"default": value} if isinstance(value, str) else value


class Model(Section):
    """Shape of the Llama-like decoder: RMSNorm, RoPE, SwiGLU, untied embeddings, no biases."""

    layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width H of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width F of SwiGLU: gate and up each project H to F, down projects F to H."""
    heads: PositiveInt
    """Query heads; hidden_size / heads is the head dimension."""
    kv_heads: PositiveInt
    """Key and value heads; equal to heads for multi-head attention, fewer for grouped-query attention."""
    vocab_size: PositiveInt
    """Rows of the embedding and of the output matrix, unused rows included; nothing is padded behind your back."""
    sequence_length: PositiveInt
    """Tokens S of one training sequence; a row of the data holds S + 1, inputs and targets overlapping by S."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies base^(-2i/D)."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 * layers)."""
    loss_chunk_tokens: PositiveInt | None = None
    """Compute output projection and cross-entropy together, so many tokens at a time, so that all the logits never
    exist at once; costs one more matrix product of the output layer. Left out: the logits are kept whole."""
    implementation: Literal["k2", "transformer_engine"] = "k2"
    """Whose layers megatron-core's GPTModel is built from: ours, or Transformer Engine's."""
    kernels: Annotated[Kernels, BeforeValidator(_kernels_from_text)] = Kernels()
    """Backend of our ops: a name for all of them, or a table with a default and entries per op."""

    @property
    def head_dim(self) -> int:
        """Dimension D of one attention head."""
        return self.hidden_size // self.heads


class Parallel(Section):
    """The layout: how many ways each dimension is cut. Ranks = tensor * pipeline * context * data."""

    tensor: PositiveInt = 1
    """Tensor-parallel ranks that share each matrix."""
    pipeline: PositiveInt = 1
    """Pipeline stages that share the layers."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage; above 1 selects the interleaved schedule."""
    context: PositiveInt = 1
    """Context-parallel ranks that share each sequence, two pieces each; attention gathers keys and values."""
    data: PositiveInt = 1
    """Data-parallel replicas. Under torchrun and srun it is derived from the number of ranks and this value is not
    read; a plain start uses it to know how many local ranks to start."""
    ranks: PositiveInt | None = None
    """Instead of data: the number of ranks the run is meant for, from which data follows. Resolved when loaded."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals hold S / tensor positions a rank."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel (times context-parallel) ranks."""


class Data(Section):
    """What is read. Paths that are relative are relative to the current directory; they are opened when training."""

    train: PathText
    """Training rows: a plan folder, or the prefix of a .bin/.idx pair."""
    held_out: PathText | None = None
    """Rows that are evaluated and never trained on, in the same two forms."""
    tokenizer: PathText | None = None
    """Tokenizer file or folder: checked against vocab_size, and used to print text."""


class BatchRamp(Section):
    """Global batch that grows from `start` to train.global_batch by `increment`, over the first `samples` samples."""

    start: PositiveInt
    """Global batch of the first step, in sequences."""
    increment: PositiveInt
    """Growth of the global batch from one stage of the ramp to the next, in sequences."""
    samples: PositiveInt
    """Samples over which the ramp runs; each of its stages gets an equal share."""


class Stage(Section):
    """Steps of one global batch and one sequence length, from `first_step` finished ones on."""

    first_step: CountInt
    """Updates that were done before its first."""
    first_sample: CountInt
    """The first sample it reads: samples are counted in sequences of its own length."""
    global_batch: PositiveInt
    """Sequences in one optimizer update."""
    sequence_length: PositiveInt
    """Tokens of one sequence."""


def _tuple_from_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Train(Section):
    """The loop: how long, how much a step, in which precision."""

    steps: PositiveInt
    """Optimizer updates of the whole run."""
    micro_batch: PositiveInt
    """Sequences in one forward pass of one data-parallel rank."""
    global_batch: PositiveInt
    """Sequences in one optimizer update, over all data-parallel ranks."""
    batch_ramp: BatchRamp | None = None
    """Grow the global batch at the start of the run; left out, every step has train.global_batch."""
    history: Annotated[tuple[Stage, ...] | None, BeforeValidator(_tuple_from_list)] = None
    """Not to be set: what the run went through before it was resumed under another batch or sequence length, and since
    when it has the present ones. It keeps this in its own config.toml and checkpoints, and reads it there alone."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations. Main parameters, gradient accumulation, gradient reduction and optimizer
    state are float32 with either."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none; "selective", the attention product alone, which saves
    little here because ours keeps no scores; or "full", each whole layer from its input."""
    deterministic: bool = False
    """Ask every library for bitwise repeatable algorithms, at some cost in speed."""
    gradient_leaves: Annotated[int, Field(ge=2)] | None = None
    """Add up the gradients of a step as a fixed tree of so many leaves, and losses and norms so that no order matters:
    then a run goes on to the bit under another parallel.data. That may be the leaves divided by their smallest prime
    factors, one after another: of 12 leaves 12, 6, 3 or 1. Each such division costs one more gradient buffer a rank.
    Left out: added up in the order of the ranks."""
    compare_replicas_every_steps: PositiveInt | None = None
    """Compare the weights (and moments, unless sharded) of data-parallel replicas, and what tensor-parallel ranks hold
    alike, to the bit, before the update of every so many steps; left out: before each save alone."""
    evaluate_every_steps: PositiveInt | None = None
    """Evaluate on data.held_out after every so many steps, and after the last; left out: never."""
    evaluate_batches: PositiveInt | None = None
    """Global batches (of train.global_batch sequences) read in one evaluation."""


class Optimizer(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101) and its learning-rate schedule."""

    learning_rate: PositiveFloat
    """Peak learning rate, reached at the end of the warm-up."""
    min_learning_rate: CountFloat | None = None
    """Learning rate at the end of the decay (cosine, wsd)."""
    warmup_steps: CountInt = 0
    """Steps over which the learning rate grows linearly to learning_rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to train.steps; constant, then a decay over the last decay_steps; or constant."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay of "wsd" (warm-up, stable, decay), in steps."""
    beta1: BetaFloat = 0.9
    """Decay of the first moment."""
    beta2: BetaFloat = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: CountFloat = 0.1
    """Decoupled weight decay of the matrices; norms have none."""
    clip_grad_norm: PositiveFloat | None = None
    """Scale gradients down to this global L2 norm when they exceed it; left out: no clipping."""


class Checkpoint(Section):
    """When the run is saved, and what of it is kept. The last step is always saved and always kept."""

    every_steps: PositiveInt = 1000
    """Steps between two checkpoints: a chunk, in K2's words."""
    chunks: PositiveInt | None = None
    """Instead of every_steps: cut the run into this many equal chunks, with a checkpoint at the end of each.
    Resolved into every_steps when loaded."""
    keep_last: PositiveInt | None = None
    """Newest checkpoints that are kept when a save begins, and at the end, never fewer than two; left out, all are."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept whatever their age; a multiple of the distance between two."""
    asynchronous: bool = False
    """Write in the background while training goes on; the host memory for the copy is held from the start."""
    retry_seconds: CountFloat = 120.0
    """How long what the disk refuses of a save is tried again (a file server that restarts, a disk on which somebody
    makes room), before the run ends and is left to go on from the checkpoint before."""
    start_from: PathText | None = None
    """Begin the run with the weights of this checkpoint (a step_* folder, or a run folder: its latest) of another run,
    at step 0, with data, schedule, RoPE base and sequence length of its own. Once the run has a checkpoint, no more."""
    start_optimizer: Literal["fresh", "kept"] | None = None
    """With start_from: Adam's moments begin at zero ("fresh", the default), or are those of that checkpoint."""


class Spikes(Section):
    """What counts as a loss spike, and what is done about one that does not go away by itself."""

    policy: Literal["watch", "skip", "rollback"] = "watch"
    """watch: tell of it. skip, rollback: when it is malignant, go back to the checkpoint before it, and drop the
    samples that led into it (skip) or move them to the end of the data (rollback), by a line in the ledger."""
    scope: Literal["batches", "chunk"] | None = None
    """What skip and rollback take out: the samples from that checkpoint to the spike, their number doubled for each
    earlier time from the same checkpoint, as far as the data has as many; or a whole chunk of the plan."""
    max_rollbacks: PositiveInt | None = None
    """How often the run may go back by itself; then it stops, for a person to look."""
    window_steps: Annotated[int, Field(ge=16)] = 128
    """Undisturbed steps whose median and median absolute deviation are the measure."""
    threshold: PositiveFloat = 20.0
    """Sum of deviations (in robust standard deviations, each at most 8, less 3 a step) that makes a spike."""
    benign_steps: PositiveInt = 100
    """A spike of loss or gradient norm that is over within so many steps is benign, a longer one malignant."""
    suspect_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10.0
    """A step whose loss or gradient norm is more than this many times the median of the window is computed again before
    it is applied, at most twice: what a machine did wrong in passing leaves no trace. With 1e30 none ever is."""
    not_finite_reruns: CountInt = 1
    """How often a step whose loss or gradient is not finite is computed again, in the same way; more than twice is as
    twice."""
    not_finite_steps: CountInt = 0
    """Steps in a row that stay not finite which are passed over (no update); one more stops."""


class Watchdog(Section):
    """When a rank that makes no progress is called hung; every rank then writes its stacks and ends."""

    step_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    """A step hangs when it takes this many times the median of the recent ones (by sample: batches may grow) ..."""
    minimum_seconds: PositiveFloat = 10.0
    """... and so many seconds more, which a busy machine or a slow file system may cost any step."""
    pause_minimum_seconds: PositiveFloat = 300.0
    """What is no step (evaluation, saving, going back) hangs when it takes `step_factor` times the longest of its kind
    since the start and so many seconds more: a file system may stall for minutes. So do the second and third step."""
    pause_seconds: PositiveFloat = 3600.0
    """Limit of what cannot be compared yet: the start, and the first step, evaluation and save after it. No limit of a
    pause is longer."""
    heartbeat_seconds: PositiveFloat = 10.0
    """How often each rank writes down what it is doing."""


class Log(Section):
    """What is shown. The journal itself always has every step."""

    every_steps: PositiveInt = 1
    """Steps between two lines on the console."""
    layers_every_steps: PositiveInt = 1
    """Steps between two step events that tell of each layer: the norm of its gradient, the root mean square of its
    output. The spike detector watches them at these steps. The cost is small, the lines of the journal are long."""
    phases_every_steps: PositiveInt | None = None
    """Steps between two straggler reports: what each rank spent the step on (data, forward, backward, optimizer, the
    last save), and the rank that is slower than its like, if one is. Left out: none."""
    tensorboard: bool = False
    """Mirror the journal into TensorBoard files in the run folder."""
    wandb: PathText | None = None
    """Mirror the journal into this Weights & Biases project."""


SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "parallel": Parallel,
    "data": Data,
    "train": Train,
    "optimizer": Optimizer,
    "checkpoint": Checkpoint,
    "spikes": Spikes,
    "watchdog": Watchdog,
    "log": Log,
}
