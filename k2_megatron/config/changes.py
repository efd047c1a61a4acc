"""What may change between two starts of one run: every key of a configuration, and what its change means.

    HARMLESS   changes no weight but by rounding: layout, speed, saving, showing, and paths of files that have hashes
    ACCEPTED   changes the training from here on: taken when the command line names the key by --set, refused otherwise
    ENDED      the same, but may only be taken out
    REFUSED    another model, another data order, or no meaning in a run that has begun: never taken
    RECORDED   what the run itself writes: no change of anybody's

Each key stands once, with the reason; a test walks the schema. The fingerprint of a configuration (tree.py) is made of
what is not harmless.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from k2_megatron.config.schema import SECTIONS

_LAYOUT = "layout: the same weights up to rounding"
_COMPUTED = "how it is computed: the same up to rounding"
_FILES = "files may move: their content has a hash of its own"
_SAVED = "when is saved and what is kept"
_TREE = "layout: the same to the bit, as train.gradient_leaves are the same"
_BEGINNING = "read when a run begins, and this one has begun"
_SPIKES = "what is done about spikes to come"
_HUNG = "when a rank counts as hung"
_SHOWN = "what is shown"

HARMLESS = {
    "run.folder": "the folder may move",
    "model.loss_chunk_tokens": _COMPUTED,
    "model.kernels": _COMPUTED,
    "parallel.tensor": _LAYOUT,
    "parallel.pipeline": _LAYOUT,
    "parallel.virtual_pipeline": _LAYOUT,
    "parallel.context": _LAYOUT,
    "parallel.data": _LAYOUT,
    "parallel.ranks": _LAYOUT,
    "parallel.sequence": _LAYOUT,
    "parallel.distributed_optimizer": _LAYOUT,
    "data.train": _FILES,
    "data.held_out": _FILES,
    "data.tokenizer": _FILES,
    "train.micro_batch": _COMPUTED,
    "train.recompute": _COMPUTED,
    "train.deterministic": _COMPUTED,
    "train.gradient_leaves": _COMPUTED,
    "train.compare_replicas_every_steps": "when replicas are compared",
    "train.evaluate_every_steps": "when the held-out loss is told",
    "train.evaluate_batches": "over how much the held-out loss is taken",
    "checkpoint.every_steps": _SAVED,
    "checkpoint.chunks": _SAVED,
    "checkpoint.keep_last": _SAVED,
    "checkpoint.keep_every_steps": _SAVED,
    "checkpoint.asynchronous": _SAVED,
    "checkpoint.retry_seconds": _SAVED,
    "checkpoint.start_from": _BEGINNING,
    "checkpoint.start_optimizer": _BEGINNING,
    "spikes.policy": _SPIKES,
    "spikes.scope": _SPIKES,
    "spikes.max_rollbacks": _SPIKES,
    "spikes.window_steps": _SPIKES,
    "spikes.threshold": _SPIKES,
    "spikes.benign_steps": _SPIKES,
    "spikes.suspect_factor": _SPIKES,
    "spikes.not_finite_reruns": _SPIKES,
    "spikes.not_finite_steps": _SPIKES,
    "watchdog.step_factor": _HUNG,
    "watchdog.minimum_seconds": _HUNG,
    "watchdog.pause_minimum_seconds": _HUNG,
    "watchdog.pause_seconds": _HUNG,
    "watchdog.heartbeat_seconds": _HUNG,
    "log.every_steps": _SHOWN,
    "log.layers_every_steps": _SHOWN,
    "log.phases_every_steps": _SHOWN,
    "log.tensorboard": _SHOWN,
    "log.wandb": _SHOWN,
}

# Of the layout, what changes no bit where gradients are added up as one and the same tree
SUMMED_AS_A_TREE = (
    "parallel.data",
    "parallel.ranks",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.distributed_optimizer",
)

_RATE = "another learning rate from here on"
_ADAM = "another update rule from here on"
_POSITION = "from here on; the data goes on behind the last token trained on"

ACCEPTED = {
    "train.steps": "another end, and with it another learning rate where the schedule runs to the end",
    "model.sequence_length": f"another sequence length {_POSITION}",
    "train.global_batch": f"another global batch {_POSITION}",
    "optimizer.learning_rate": _RATE,
    "optimizer.min_learning_rate": _RATE,
    "optimizer.warmup_steps": _RATE,
    "optimizer.schedule": _RATE,
    "optimizer.decay_steps": _RATE,
    "optimizer.beta1": _ADAM,
    "optimizer.beta2": _ADAM,
    "optimizer.epsilon": _ADAM,
    "optimizer.weight_decay": _ADAM,
    "optimizer.clip_grad_norm": _ADAM,
}

_SHAPE = "the weights have this shape"
_NAMES = "the weights are stored under its names"
_OTHER_MODEL = "another model: begin a new run with checkpoint.start_from"

ENDED = {"train.batch_ramp": "train.global_batch from here on"}

CHANGEABLE = (*ACCEPTED, *ENDED)

RECORDED = {"train.history": "the checkpoint tells it"}

REFUSED = {
    "run.seed": "the initial weights and the data order came from it",
    "model.layers": _SHAPE,
    "model.hidden_size": _SHAPE,
    "model.ffn_hidden_size": _SHAPE,
    "model.heads": _SHAPE,
    "model.kv_heads": _SHAPE,
    "model.vocab_size": _SHAPE,
    "model.implementation": _NAMES,
    "model.rope_base": _OTHER_MODEL,
    "model.norm_epsilon": _OTHER_MODEL,
    "model.init_std": "the initial weights came from it; it has no effect any more",
    "train.precision": "weights and main parameters are stored in it",
}

# What decides, besides the refused, what a step computes to the bit
COMPUTING = (*CHANGEABLE, *(key for key, reason in HARMLESS.items() if reason in (_LAYOUT, _COMPUTED)))

# What has to be the same for a checkpoint to load
STORED_AS = tuple(key for key, reason in REFUSED.items() if reason in (_SHAPE, _NAMES))


@dataclass(frozen=True)
class Change:
    """A key whose value differs from an earlier start's, and what becomes of it."""

    key: str
    was: Any
    now: Any
    outcome: Literal["harmless", "accepted", "refused"]
    reason: str

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r} and is now {self.now!r} ({self.reason})"


def changes(
    now: Mapping[str, Mapping[str, Any]], was: Mapping[str, Mapping[str, Any]], given: Collection[str]
) -> Iterator[Change]:
    """What becomes of each key that differs between two configurations, dumped without None; `given` are the keys that
    --set names. What `was` lacks had its default; what this version has no key for is refused."""
    leaves = [of.get("train", {}).get("gradient_leaves") for of in (now, was)]
    as_a_tree = SUMMED_AS_A_TREE if leaves[0] is not None and leaves[0] == leaves[1] else ()
    for section, kind in SECTIONS.items():
        ours, theirs = now.get(section, {}), was.get(section, {})
        for name, field in kind.model_fields.items():
            default = field.get_default(call_default_factory=True)
            default = default.model_dump(exclude_none=True) if isinstance(default, BaseModel) else default
            before, after = theirs.get(name, default), ours.get(name, default)
            key = f"{section}.{name}"
            if before == after or key in RECORDED:
                continue
            if key in as_a_tree:
                yield Change(key, before, after, "harmless", _TREE)
            elif key == "train.global_batch" and ours.get("batch_ramp"):
                yield Change(key, before, after, "refused", "it ends the ramp: give --set train.batch_ramp= as well")
            else:
                yield _change(key, before, after, given)
        for name in theirs.keys() - kind.model_fields.keys():
            reason = "this version knows no such key: use the version that wrote it"
            yield Change(f"{section}.{name}", theirs[name], None, "refused", reason)


def _change(key: str, was: Any, now: Any, given: Collection[str]) -> Change:
    if key in HARMLESS:
        return Change(key, was, now, "harmless", HARMLESS[key])
    if key in REFUSED:
        return Change(key, was, now, "refused", REFUSED[key])
    if key in ENDED and now is not None:
        return Change(key, was, now, "refused", f"a run that has begun can only end it: give --set {key}=")
    reason = {**ACCEPTED, **ENDED}[key]
    if key in given:
        return Change(key, was, now, "accepted", f"--set; {reason}")
    value = "" if now is None else now
    return Change(key, was, now, "refused", f"{reason}: to take it, give --set {key}={value}")


def keys_given(overrides: Collection[str]) -> set[str]:
    """The dotted keys that `--set section.key=value` arguments name; a key inside a table counts as the table."""
    return {".".join(override.partition("=")[0].strip().split(".")[:2]) for override in overrides}
