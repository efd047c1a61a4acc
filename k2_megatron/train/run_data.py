"""The data of one run: the rows it trains on, the rows it is evaluated on, its ledger, and its position."""

import os
from functools import partial
from pathlib import Path

from k2_megatron.config import Config, batch
from k2_megatron.data.feed import Feed
from k2_megatron.data.ledger import CHAIN_START, Ledger, LedgerNotWritten
from k2_megatron.data.open_feed import AnyFeed, open_feed
from k2_megatron.data.plan import Plan
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.runtime.durable import persist
from k2_megatron.runtime.journal import JOURNAL, read_events
from k2_megatron.train.checkpoints.manifest import CheckpointError, is_imported
from k2_megatron.train.position import refuse_in_the_past


class RunData:
    """`train` and `held_out` (None when the run is not evaluated) give rows by sample number.

    `chain` is the hash over all samples consumed so far, kept by the rank that writes the ledger.
    """

    def __init__(self, train: AnyFeed, held_out: AnyFeed | None, ledger: Ledger, *, writer: bool) -> None:
        self.train = train
        self.held_out = held_out
        self.fingerprint = train.fingerprint
        self.ledger = ledger
        self._writer = writer
        self.chain = CHAIN_START
        self._from_step = 0  # where this life of the run began

    def consumed(self, first_sample: int, end_sample: int) -> None:
        """Tell of samples first_sample ... end_sample - 1; they follow those told before."""
        if self._writer:
            self.chain = self.ledger.chain(self.chain, first_sample, end_sample)

    def record_position(self, config: Config, step: int) -> None:
        """Write the position reached and its chain into the ledger, before a checkpoint of it is saved: what was
        consumed is so whether or not the save succeeds. What the disk refuses is tried again."""
        if not self._writer:
            return
        lines = [partial(self.ledger.append, "change", **change) for change in self._untold_change(config)]
        parts = chain_parts(config, step)
        more = {"parts": parts} if len(parts) > 1 else {}
        lines.append(partial(self.ledger.record_position, parts[-1][2], self.chain, step=step, **more))
        for line in lines:
            persist(line, config.checkpoint.retry_seconds, LedgerNotWritten)

    def _untold_change(self, config: Config) -> list[dict[str, int]]:
        """The batch and length in which this life of the run goes on, where the ledger's last change tells of others or
        of another beginning: it is not told of yet, or nothing else was saved of what is told."""
        told, changed, step = self.ledger.last_change, config.last_change, self._from_step
        if told is None and changed is None:
            return []
        if told is not None and told["from_step"] >= (changed.first_step if changed else 0):
            now = _stage_line(config, told["from_step"])
            if now == {key: told[key] for key in now}:
                return []
        return [_stage_line(config, step)]

    def position(self) -> dict:
        """What a checkpoint says of the data; the sample number itself is a function of the step."""
        return {
            "data": self.fingerprint,
            "chain": self.chain,
            "amendments": len(self.ledger.amendments),
            "ledger": self.ledger.mark(),
        }

    def resume_at(self, manifest: dict) -> None:
        """Go on after a checkpoint. CheckpointError when it was trained on other rows than this run would read, or the
        ledger has lost or changed a line that it had when the checkpoint was saved, or amends what was trained."""
        if is_imported(manifest):
            return
        if manifest["data"] != self.fingerprint:
            if manifest["data"] != self.train.earlier_fingerprint:
                raise CheckpointError(
                    f"the checkpoint of step {manifest['step']} was trained on data {manifest['data']}, data.train is "
                    f"now {self.fingerprint}; put the old files back, or start a new run.folder"
                )
            self.fingerprint = manifest["data"]  # as the run has called it from its beginning, and its chain does
        try:
            refuse_lost_ledger(self.ledger)
            self.ledger.check_mark(manifest)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        amendments = self.ledger.amendments
        for entry in amendments[manifest.get("amendments", len(amendments)) :]:  # earlier versions did not write it
            try:
                refuse_in_the_past(entry, manifest)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.ledger.path}: {error}. Set the run back to a checkpoint from before that sample: "
                    "tools/roll_back.py RUN --before STEP --reason ..."
                ) from None
        if self._writer:
            self.ledger.continue_from(manifest)
        self.chain, self._from_step = manifest["chain"], manifest["step"]


def refuse_lost_ledger(ledger: Ledger) -> None:
    """ValueError where there is none and the journal beside it tells of its lines: what they amend would be undone.
    A checkpoint that was taken to a new folder has no such journal."""
    journal = ledger.path.with_name(JOURNAL)
    if ledger.exists or not journal.is_file():
        return
    lines = max((event["ledger"]["lines"] for event in read_events(journal) if "ledger" in event), default=0)
    if lines:
        raise ValueError(
            f"{ledger.path} is gone, and {JOURNAL} tells of {lines} lines in it: put back the ledger.jsonl of this run"
        )


def _stage_line(config: Config, step: int) -> dict[str, int]:
    return {
        "from_step": step,
        "from_sample": config.consumed_samples_at(step),
        "global_batch": config.global_batch_at(step),
        "sequence_length": config.sequence_length_at(step),
    }


def chain_parts(config: Config, step: int) -> list[tuple[int, int, int]]:
    """(sequence length, first sample, the one after the last) of what the updates 0 ... step - 1 read; batches do not
    matter to the chain."""
    found: list[tuple[int, int, int]] = []
    for stage, first, end in batch.parts(config.stages, step):
        if found and found[-1][0] == stage.sequence_length:
            first = found.pop()[1]
        found.append((stage.sequence_length, first, end))
    return found


def open_run_data(config: Config, *, writer: bool = False) -> RunData:
    """Open what data.train and data.held_out name, under the ledger of the run folder.

    ValueError when files are missing, damaged, too small for the run, or made for another vocabulary.
    """
    if config.data.tokenizer:
        _check_tokenizer(config.data.tokenizer, config.model.vocab_size)
    ledger = Ledger(Path(config.run.folder))
    # One prefix for both is split by document; two names are taken whole.
    split = config.data.train == config.data.held_out
    train = _open(config, config.data.train, "train" if split else "all", ledger, config.stages[0].sequence_length)
    _check_train(config, train)
    _check_rows("data.train", config.data.train, train, config.total_samples, "train.steps or train.global_batch")
    held_out = None
    if config.train.evaluate_every_steps and config.data.held_out and config.train.evaluate_batches:
        held_out = open_evaluated(config, config.data.held_out, "held_out" if split else "all")
        needed = config.train.evaluate_batches * config.train.global_batch
        if _are_the_same(config, train, held_out):
            raise ValueError(
                f"data.held_out = {config.data.held_out!r}: holds the very rows of data.train = {config.data.train!r}; "
                "name the held-out plan (build_plan.py --held-out), or other token files"
            )
        _check_rows("data.held_out", config.data.held_out, held_out, needed, "train.evaluate_batches")
    return RunData(train, held_out, ledger, writer=writer)


def _are_the_same(config: Config, train: AnyFeed, held_out: AnyFeed) -> bool:
    """Whether both give the same rows. What nobody has hashed, files without a manifest, is told apart by its place:
    their fingerprint knows how many tokens there are."""
    if held_out.fingerprint != train.fingerprint:
        return False
    hashed = isinstance(train, Feed) and train.earlier_fingerprint != train.fingerprint
    places = {os.path.realpath(f"{path}.bin") for path in (config.data.train, config.data.held_out)}
    return hashed or len(places) == 1


def _check_train(config: Config, train: AnyFeed) -> None:
    """ValueError where the data is not there to be trained on, or cannot be amended as the configuration asks."""
    path, policy = config.data.train, config.spikes.policy
    if not isinstance(train, Feed):
        if policy != "watch":
            raise ValueError(
                f'spikes.policy = "{policy}": data.train = {path!r}, and the order of mcore\'s blended datasets cannot '
                'be amended; build a plan (tools/build_plan.py), or set spikes.policy = "watch"'
            )
    elif isinstance(train.order, Plan) and train.order.content["part"] == "held_out":
        raise ValueError(
            f"data.train = {path!r} is a held-out plan; name the plan that build_plan.py --output made, and this one "
            "under data.held_out"
        )


def _open(config: Config, path: str, part: str, ledger: Ledger | None, row_length: int | None) -> AnyFeed:
    return open_feed(
        path,
        sequence_length=config.model.sequence_length,
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        row_length=row_length,
        part=part,
        ledger=ledger,
    )


def open_evaluated(config: Config, path: str, part: str) -> AnyFeed:
    """The rows that a model of this configuration is evaluated on: no ledger amends them. ValueError as above."""
    return _open(config, path, part, None, None)


def _check_tokenizer(path: str, vocab_size: int) -> None:
    pieces = load_tokenizer(path).vocab_size
    if pieces > vocab_size:
        raise ValueError(
            f"data.tokenizer = {path!r} has {pieces} pieces, model.vocab_size is {vocab_size}; "
            f"set vocab_size to at least {pieces}, or name the tokenizer that made the tokens"
        )


def _check_rows(key: str, path: str, feed: AnyFeed, needed: int, remedy: str) -> None:
    if feed.rows is not None and feed.rows < needed:
        raise ValueError(
            f"{key} = {path!r} has {feed.rows:,} rows and {needed:,} are asked for; lower {remedy}, or give more data"
        )
