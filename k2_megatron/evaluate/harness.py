"""lm-evaluation-harness over a checkpoint of ours: its `LM`, answered by our scorer. This file alone imports lm_eval.

Every rank runs the harness on all requests, and the scorer shares them out: the harness sees one process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as distributed
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from k2_megatron.data.tokenizer import Tokenizer
from k2_megatron.evaluate.figures import Figure
from k2_megatron.evaluate.scorer import Scorer
from k2_megatron.evaluate.tasks import encode_pair
from k2_megatron.evaluate.windows import Window, continuation_window, document_windows

if TYPE_CHECKING:
    from k2_megatron.evaluate.texts import HarnessWanted

BOOTSTRAPS = 1000  # for standard errors of what is no mean
NEW_TOKENS = 256  # of generate_until, where a task does not say: lm-eval's own default


class HarnessModel(LM):
    """What lm-evaluation-harness asks of a model."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._scorer, self._tokenizer = scorer, tokenizer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy choice) of each (context, continuation)."""
        windows = [self._window(*request.args) for request in requests]
        found = []
        for window, scored in zip(windows, self._scorer.score(windows, greedy=True), strict=True):
            is_greedy = np.array_equal(scored.greedy, window.tokens[1 + window.first :])
            found.append((-float(scored.losses.sum()), is_greedy))
        return found

    def _window(self, context: str, continuation: str) -> Window:
        before, following = encode_pair(self._tokenizer, context, continuation)
        if len(following) > self._scorer.longest:
            raise ValueError(
                f"lm-eval asks for {len(following)} tokens behind a context, the model reads {self._scorer.longest}; "
                "leave the task out"
            )
        return continuation_window(before, following, self._scorer.longest)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each (text,), in windows without overlap, the last one full, as the harness wants them."""
        of_request: list[int] = []
        windows: list[Window] = []
        for number, request in enumerate(requests):
            tokens = self._tokenizer.encode(request.args[0])
            ours = list(document_windows(tokens, self._tokenizer.end_of_document, self._scorer.longest, 1))
            windows += ours
            of_request += [number] * len(ours)
        found = [0.0] * len(requests)
        for number, scored in zip(of_request, self._scorer.score(windows), strict=True):
            found[number] -= float(scored.losses.sum())
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy continuation of each (context, settings), up to the first of its stops. All of them grow by one
        token a round, and each round reads the windows again."""
        growing = [_Growing(self._tokenizer, self._scorer.longest, *request.args) for request in requests]
        while waiting := [one for one in growing if not one.is_done]:
            windows = [one.window() for one in waiting]
            for one, scored in zip(waiting, self._scorer.score(windows, greedy=True), strict=True):
                one.add(int(scored.greedy[-1]))
        return [one.text for one in growing]


class _Growing:
    """One continuation that grows until a stop, the end of a document, or its length."""

    def __init__(self, tokenizer: Tokenizer, longest: int, context: str, settings: dict[str, Any]) -> None:
        if settings.get("do_sample") and settings.get("temperature"):
            raise ValueError("an lm-eval task asks for sampled text (do_sample); checkpoints are evaluated greedily")
        self._tokenizer = tokenizer
        stops = settings.get("until") or []
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        self._new = int(settings.get("max_gen_toks", NEW_TOKENS))
        if not 0 < self._new < longest:
            raise ValueError(f"an lm-eval task asks for {self._new} new tokens, and the model reads {longest}")
        before = tokenizer.encode(context) or [tokenizer.end_of_document]
        self._tokens, self._from = before[-(longest - self._new) :], min(len(before), longest - self._new)
        self.text, self.is_done = "", False

    def window(self) -> Window:
        """What predicts the next token, in whose place a 0 stands."""
        return Window(np.array([*self._tokens, 0], dtype=np.int64), len(self._tokens) - 1)

    def add(self, token: int) -> None:
        if token == self._tokenizer.end_of_document:
            self.is_done = True
            return
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens[self._from :])
        places = [place for stop in self._stops if stop and (place := self.text.find(stop)) >= 0]
        if places:
            self.text = self.text[: min(places)]
        self.is_done = bool(places) or len(self._tokens) - self._from >= self._new


class HarnessTask:
    """A task or group of lm-evaluation-harness, as texts.py has its `Text`s."""

    kind = "lm_eval"
    tokens = None

    def __init__(self, name: str, wanted: HarnessWanted, manager: TaskManager, tokenizer: Tokenizer) -> None:
        self.name, self.path = name, ""
        self._wanted, self._manager, self._tokenizer = wanted, manager, tokenizer
        self.hash = f"lm_eval {version('lm_eval')}"  # which names the data sets' versions in its own files
        self.settings = {"shots": wanted.shots, "limit": wanted.limit}

    def figures(self, scorer: Scorer) -> dict[str, Figure]:
        """ValueError when the task fails, as where its data set is not at hand."""
        # For standard errors it would fork a process a core, in each rank.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        try:
            results = simple_evaluate(
                model=HarnessModel(scorer, self._tokenizer),
                tasks=[self.name],
                num_fewshot=self._wanted.shots,
                limit=self._wanted.limit,
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
            )
        except Exception as error:  # of data sets, of the network, of code that comes with a task
            reason = (str(error).splitlines() or [""])[0][:300]
            raise ValueError(f"--lm-eval {self.name}: {type(error).__name__}: {reason}") from error
        # The harness gives its results to local rank 0 alone.
        told: list[Any] = [None if results is None else results["results"]]
        distributed.broadcast_object_list(told)
        if self.name not in told[0]:
            raise ValueError(f"--lm-eval {self.name}: has no figures of its own; name {', '.join(told[0])}")
        return {**_figures(told[0][self.name]), "tokens": scorer.tokens}


def _figures(told: dict[str, Any]) -> dict[str, Figure]:
    """Numbers alone, those of metrics before the counts; "acc" for the harness's "acc,none"."""
    numbers = {
        key: int(value) if isinstance(value, int) else float(value)  # numpy's among them
        for key, value in told.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    of_metrics = {key.removesuffix(",none"): value for key, value in numbers.items() if "," in key}
    return {**of_metrics, **{key: value for key, value in numbers.items() if "," not in key}}


def open_tasks(wanted: HarnessWanted, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[HarnessTask]:
    """The tasks asked for. ValueError for names that the harness does not know."""
    manager = TaskManager(include_path=wanted.include)
    unknown = [name for name in wanted.names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"--lm-eval {','.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists them")
    tasks = [HarnessTask(name, wanted, manager, tokenizer) for name in wanted.names]
    for task in tasks:
        task.settings |= settings
    return tasks
