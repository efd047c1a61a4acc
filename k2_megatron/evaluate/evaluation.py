"""One checkpoint after another, one text after another: what is computed, what was before, and what is passed over.

In: a run folder, which is only read; what is asked for. Out: lines of evaluations.jsonl, each on the disk before the
next evaluation begins, and a table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from k2_megatron.config import Config
from k2_megatron.evaluate.chosen import evaluation_config
from k2_megatron.evaluate.results import append_result, identity, identity_of, read_results
from k2_megatron.evaluate.scorer import Scorer
from k2_megatron.evaluate.table import in_words, results_table
from k2_megatron.evaluate.texts import Text, Wanted, open_texts
from k2_megatron.evaluate.weights import Damaged, Removed, build_parts, fill
from k2_megatron.kernels.dispatch import choices
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import Device, find_device
from k2_megatron.runtime.groups import Groups, build_groups, connect, disconnect
from k2_megatron.runtime.journal import JOURNAL, standing_events
from k2_megatron.runtime.launch import RankEnvironment
from k2_megatron.runtime.seeds import require_determinism, seed_everything
from k2_megatron.train.agreement import code_and_configuration, require_agreement
from k2_megatron.train.checkpoints.load import as_rank_0_sees
from k2_megatron.train.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointVersionError,
    content_hash,
    read_manifest,
)
from k2_megatron.train.checkpoints.state import layout_name
from k2_megatron.train.run_folder import provenance

RENDEZVOUS_TIMEOUT_SECONDS = 600.0
COLLECTIVE_TIMEOUT_SECONDS = 3600.0  # a rank may read a text, or wait for a slow file system, while others wait

SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `again`: compute also what stands in the results."""

    run: Path
    output: Path
    wanted: Wanted
    overrides: tuple[str, ...] = ()
    micro_batch: int | None = None
    again: bool = False

    def config_of(self, manifest: dict[str, Any], world_size: int | None) -> Config:
        """A checkpoint's configuration in the layout of this evaluation."""
        return evaluation_config(manifest, self.overrides, self.micro_batch, world_size)

    def any_config(self, folders: Sequence[Path], world_size: int | None) -> Config:
        """That of the last of `folders` whose manifest can be read: the layout is the same in all. CheckpointError when
        none can."""
        problem: CheckpointError | None = None
        for folder in reversed(folders):
            try:
                manifest = read_manifest(folder)
            except CheckpointVersionError:
                raise
            except CheckpointError as error:
                problem = problem or error
                continue
            return self.config_of(manifest, world_size)
        assert problem is not None, "an evaluation of no checkpoints"
        raise problem


def evaluate_all(request: Request, folders: Sequence[Path], environment: RankEnvironment) -> list[str]:
    """Evaluate `folders` on this rank, together with the others, and print what is found; the names of damaged ones.

    ValueError, before a model is built, for what does not fit.
    """
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, RENDEZVOUS_TIMEOUT_SECONDS)
        ended_well = False
        try:
            damaged = _evaluate_together(request, folders, environment, device)
            ended_well = True
        finally:  # with other ranks that is left to the end of the process: who speaks is settled in their store
            if ended_well or environment.launcher == "single":
                disconnect()
    return damaged


def _evaluate_together(
    request: Request, folders: Sequence[Path], environment: RankEnvironment, device: Device
) -> list[str]:
    config = request.any_config(folders, environment.world_size)
    require_agreement({**code_and_configuration(config), "checkpoints": [folder.name for folder in folders]})
    groups = build_groups(config.parallel, COLLECTIVE_TIMEOUT_SECONDS)
    seed_everything(config.run.seed, groups)
    if config.train.deterministic:
        require_determinism()
    say = partial(print, flush=True) if groups.rank == 0 else _say_nothing
    count = f"{len(folders)} checkpoint{'s' * (len(folders) > 1)} of {request.run}"
    say(f"{count} in {layout_name(config)} on {device.name}; results go to {request.output}")
    evaluation = Evaluation(request, groups, device, say)
    results = [result for folder in folders for result in evaluation.evaluate(folder)]
    if groups.rank == 0 and results:
        Console().print(results_table(results))
    return evaluation.damaged


def _say_nothing(_text: str) -> None:
    """Of the ranks, one speaks."""


class Progress:
    """Says now and then how far a text is, whose `tokens` are None where nobody knows how many they will be."""

    def __init__(self, scorer: Scorer, what: str, tokens: int | None, say: Callable[[str], None]) -> None:
        self._scorer, self._what, self._tokens, self._say = scorer, what, tokens, say
        self._next_seconds = SECONDS_BETWEEN_LINES

    def __call__(self) -> None:
        done, seconds = self._scorer.tokens, self._scorer.seconds
        if seconds < self._next_seconds or done == self._tokens:
            return
        self._next_seconds = seconds + SECONDS_BETWEEN_LINES
        line = f"{self._what}: {done:,} tokens, {done / seconds:,.0f} a second"
        if self._tokens is not None:
            left = (self._tokens - done) * seconds / done
            line += f", {done / self._tokens:.0%} in {seconds / 60:.1f} minutes, {left / 60:.1f} left"
        self._say(line)


class Evaluation:
    """The evaluation of a run's checkpoints by the ranks of `groups`. `say` prints on one rank."""

    def __init__(self, request: Request, groups: Groups, device: Device, say: Callable[[str], None]) -> None:
        self.request, self.groups, self.device, self.say = request, groups, device, say
        self.damaged: list[str] = []
        self._config: Config | None = None
        self._scorer: Scorer | None = None
        self._texts: list[Text] = []
        stored = as_rank_0_sees(groups, partial(read_results, request.output))
        self.results = {identity_of(result): result for result in stored}
        self._told = as_rank_0_sees(groups, partial(_told_losses, request.run))

    def evaluate(self, folder: Path) -> list[dict[str, Any]]:
        """The results of one checkpoint, of now or of before; [] when it is damaged or was removed meanwhile."""
        try:
            manifest = as_rank_0_sees(self.groups, partial(_manifest_of, folder))
            if manifest is None:
                raise Removed(f"{folder.name} was removed meanwhile")
            if isinstance(manifest, str):
                raise Damaged(manifest)
            return self._evaluate(folder, manifest)
        except Removed as error:
            self.say(f"{error}, and is passed over")
        except Damaged as error:
            self.damaged.append(folder.name)
            self.say(f"{error}, and is passed over")
        return []

    def _evaluate(self, folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        self._prepare(manifest)
        checkpoint = {"name": folder.name, "manifest": content_hash(manifest), "weights": manifest["weights"]}
        known = {} if self.request.again else self.results
        keys = [identity(checkpoint["manifest"], _text_facts(text), text.settings) for text in self._texts]
        is_loaded, found = False, []
        for text, key in zip(self._texts, keys, strict=True):
            result = known.get(key)
            if result is None:
                if not is_loaded:
                    fill(folder, self._model().parts)
                    is_loaded = True
                result = self.results[key] = self._result(manifest, checkpoint, text)
            else:
                self.say(f"step {manifest['step']}  {text.name}: {in_words(result)}; {_before(result)}")
            found.append(result)
        return found

    def _prepare(self, manifest: dict[str, Any]) -> None:
        """Texts and model for a checkpoint: those of the one before, where the configuration is the same."""
        config = self.request.config_of(manifest, self.groups.world_size)
        if config == self._config:
            return
        self._config, self._scorer = config, None
        self._texts = open_texts(self.request.wanted, config, self.request.run)
        require_agreement({f"text {text.name}": text.hash for text in self._texts})

    def _model(self) -> Scorer:
        """The model, built when the first checkpoint is loaded into it."""
        assert self._config is not None, "a checkpoint was evaluated before anything was prepared for it"
        if self._scorer is None:
            self._scorer = Scorer(self._config, build_parts(self._config, self.groups, self.device))
        return self._scorer

    def _result(self, manifest: dict[str, Any], checkpoint: dict[str, str], text: Text) -> dict[str, Any]:
        scorer = self._model()
        scorer.tokens, scorer.seconds = 0, 0.0
        scorer.tell = Progress(scorer, f"step {manifest['step']}  {text.name}", text.tokens, self.say)
        figures = text.figures(scorer)
        result = {
            "step": manifest["step"],
            "consumed_tokens": manifest.get("consumed_tokens"),
            "checkpoint": checkpoint,
            "text": {**_text_facts(text), "path": text.path},
            "settings": text.settings,
            "figures": figures,
            "tokens_per_second": scorer.tokens / scorer.seconds if scorer.seconds else 0.0,  # lm-eval may ask nothing
            "seconds": scorer.seconds,
            "layout": layout_name(scorer.config),
            "device": self.device.name,
            "kernels": {one.op: one.backend for one in choices(scorer.config.model.kernels, self.device.type)},
            "versions": provenance(),
        }
        as_rank_0_sees(self.groups, partial(append_result, self.request.output, result))
        speed = f"{result['tokens_per_second']:,.0f} tokens/s"
        self.say(f"step {manifest['step']}  {text.name}: {in_words(result)}; {speed}{self._beside_journal(result)}")
        return result

    def _beside_journal(self, result: dict[str, Any]) -> str:
        """How the run's own held-out loss compares with what the training loop told of the step."""
        told = self._told.get(result["step"])
        if told is None or result["text"]["name"] != "held_out" or self.request.wanted.rows is not None:
            return ""
        loss = result["figures"]["loss"]
        return "; the journal's, to the bit" if loss == told else f"; the journal has {told:.6f}, {loss - told:+.1e}"


def _text_facts(text: Text) -> dict[str, str]:
    return {"name": text.name, "kind": text.kind, "hash": text.hash}


def _before(result: dict[str, Any]) -> str:
    when = str(result.get("time", "at another time"))[:16]
    return f"evaluated {when} in {result.get('layout')} (--again computes it anew)"


def _manifest_of(folder: Path) -> dict[str, Any] | str | None:
    """The manifest; what is wrong with it; None of a folder that is not there any more."""
    try:
        return read_manifest(folder)
    except CheckpointVersionError:
        raise
    except CheckpointError as error:
        return str(error) if (folder / MANIFEST).exists() else None


def _told_losses(run: Path) -> dict[int, float]:
    """{step: the held-out loss that the journal tells of it}, of the branch that stands."""
    journal = run / JOURNAL
    if not journal.is_file():
        return {}
    return {event["step"]: event["held_out_loss"] for event in standing_events(journal, "evaluation")}
