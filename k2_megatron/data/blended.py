"""Megatron's ordinary blended datasets, through mcore's own builder: for people who bring prefixes and weights.

In: a blend file (TOML):

    samples = 3_840_000           # train.steps x train.global_batch, or more
    cache = "runs/blend_cache"    # where mcore keeps its indices

    [[sources]]
    prefix = "tokens/web_text_document"
    weight = 0.7

    [[sources]]
    prefix = "tokens/code_text_document"
    weight = 0.3

Out: a feed whose sample n is element n of mcore's BlendedDataset of GPTDatasets. The order is mcore's, and so are its
limits: no amendments, no hashes of contents. A plan (build.py) has both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from k2_megatron.config.toml_text import tomllib
from k2_megatron.data.documents import DocumentSpan
from k2_megatron.data.indexed import TokenFile, strip_suffix
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.permutation import hash64
from k2_megatron.data.schedule import Schedule

if TYPE_CHECKING:
    from k2_megatron.data.feed import Feed

SPLIT = "1,0,0"  # everything is for training; a blend for evaluation is a blend file of its own


class BlendSource(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    prefix: str
    weight: float = Field(gt=0, allow_inf_nan=False)


class Blend(BaseModel):
    """A blend file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int = Field(gt=0)
    cache: str
    sources: tuple[BlendSource, ...] = Field(min_length=1)


def load_blend(path: Path) -> Blend:
    """Read and check a blend file. ValueError tells every problem."""
    try:
        return Blend.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a plan folder, a prefix, or a blend file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path}: {problems}") from None


class BlendedFeed:
    """What training asks of `feed.Feed`."""

    earlier_fingerprint: str | None = None

    def __init__(self, path: Path, *, sequence_length: int, seed: int, vocab_size: int):
        blend = load_blend(path)
        for source in blend.sources:
            TokenFile(source.prefix)  # one clear error for a file that is missing or cut
        self.path, self.sequence_length, self.vocab_size = path, sequence_length, vocab_size
        self.source_names = [os.path.basename(strip_suffix(source.prefix)) for source in blend.sources]
        try:
            os.makedirs(blend.cache, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{path}: cache {blend.cache!r} cannot be made ({error.strerror}); name a folder that can be written"
            ) from None
        self.dataset = _build(blend, sequence_length, seed, vocab_size)
        self.rows = min(blend.samples, len(self.dataset))
        self.seconds_waited = 0.0
        content = [
            f"{s.prefix} {s.weight} {Path(strip_suffix(s.prefix) + '.bin').stat().st_size}" for s in blend.sources
        ]
        self.fingerprint = f"{hash64('blend', *content, blend.samples, sequence_length, seed):016x}"

    def tokens(self, first_sample: int, count: int) -> np.ndarray:
        """Samples first_sample.. as ids int32 [count, S + 1]. ValueError past the end, or for ids out of range."""
        start = time.monotonic()
        if first_sample + count > self.rows:
            raise ValueError(
                f"samples {first_sample}..{first_sample + count - 1} asked for, {self.path} has {self.rows}; raise its "
                "samples, or lower train.steps"
            )
        out = np.empty((count, self.sequence_length + 1), dtype=np.int32)
        for number in range(count):
            item = self.dataset[first_sample + number]
            out[number, :-1] = item["tokens"]
            out[number, -1] = item["labels"][-1]
        if out.size and (int(out.max()) >= self.vocab_size or int(out.min()) < 0):
            raise ValueError(
                f"{self.path}: token id {int(out.max())}, but model.vocab_size is {self.vocab_size}; use the data's "
                "own tokenizer, or a larger vocab_size"
            )
        self.seconds_waited += time.monotonic() - start
        return out

    def prefetch(self, first_sample: int, count: int) -> None:
        """Nothing is read ahead: the pages of the memory maps are the system's to keep."""

    def _dataset_and_sample(self, sample: int) -> tuple[int, int]:
        if hasattr(self.dataset, "dataset_sample_index"):
            return int(self.dataset.dataset_index[sample]), int(self.dataset.dataset_sample_index[sample])
        return 0, sample

    def sample_records(self, first_sample: int, count: int) -> Iterable[bytes]:
        """What the ledger's chain hashes: dataset and sample in it."""
        samples = range(first_sample, first_sample + count)
        return (np.array(self._dataset_and_sample(sample), dtype="<u8").tobytes() for sample in samples)

    def describe(self, sample: int) -> list[DocumentSpan]:
        """The source a sample is of; mcore does not tell documents apart."""
        dataset, number = self._dataset_and_sample(sample)
        name, size = self.source_names[dataset], self.sequence_length + 1
        return [DocumentSpan(name, name, number, 0, size, False, 0, size)]

    def after(self, amendment: dict[str, Any]) -> Schedule:
        """ValueError: mcore's order cannot be amended."""
        raise ValueError(
            f"{self.path}: a blended dataset's order cannot be amended; build a plan (tools/build_plan.py)"
        )


def open_blend(path: Path, ledger: Ledger | None, **settings: int) -> BlendedFeed:
    """Open a blend file. ValueError where the ledger holds amendments."""
    feed = BlendedFeed(path, **settings)
    if ledger is not None:
        for amendment in ledger.amendments:
            feed.after(amendment)
    return feed


def amendable(feed: Feed | BlendedFeed) -> Feed:
    """The feed, whose order can be amended. ValueError where it is mcore's."""
    if isinstance(feed, BlendedFeed):
        raise ValueError("the order of mcore's blended datasets cannot be amended; build a plan (tools/build_plan.py)")
    return feed


def _build(blend: Blend, sequence_length: int, seed: int, vocab_size: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    pieces = SimpleNamespace(vocab_size=vocab_size, eod=0, pad=-1, unique_identifiers={"vocab_size": vocab_size})
    prefixes = [strip_suffix(source.prefix) for source in blend.sources]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=(prefixes, [source.weight for source in blend.sources]),
        split=SPLIT,
        tokenizer=pieces,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=blend.cache,
    )
    with _process_group():
        return BlendedMegatronDatasetBuilder(GPTDataset, [blend.samples, 0, 0], lambda: True, config).build()[0]


@contextmanager
def _process_group() -> Iterator[None]:
    """mcore's BlendedDataset asks for its rank even in a process that has no group: give it one of itself alone."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
