"""Layouts by name, such as tp2-pp2-sp: what is certified is named in this form, asked for and told.

In: a configuration and names, or a number of ranks. Out: the configuration in each of these layouts; ValueError where
one does not divide the model.
"""

import re
from collections.abc import Iterator

from k2_megatron.config import Config
from k2_megatron.config.checks import problems_of
from k2_megatron.config.schema import Parallel

ONE_PROCESS = "one process"
_SIZES = {"tp": "tensor", "pp": "pipeline", "vp": "virtual_pipeline", "cp": "context", "dp": "data"}
_SWITCHES = {"sp": "sequence", "do": "distributed_optimizer"}


def name_of(parallel: Parallel) -> str:
    """tp2-pp2-sp: sizes above one, then sp (sequence parallelism) and do (distributed optimizer) where they are on."""
    sizes = [f"{word}{size}" for word, key in _SIZES.items() if (size := getattr(parallel, key)) > 1]
    return "-".join([*sizes, *(word for word, key in _SWITCHES.items() if getattr(parallel, key))]) or ONE_PROCESS


def layout_named(name: str) -> Parallel:
    """The layout of a name; what it does not tell of is one, or off."""
    found: dict[str, int | bool] = {}
    for part in name.split("-"):
        size = re.fullmatch(r"([a-z]+)([1-9]\d*)", part)
        key = _SIZES.get(size[1]) if size else _SWITCHES.get(part)
        if key is None or key in found:
            wrong = "stands twice" if key else "is no part of a layout"
            raise ValueError(f"layout {name!r}: {part!r} {wrong}; give a name such as tp2-pp2-vp2-cp2-dp2-sp-do")
        found[key] = int(size[2]) if size else True
    return Parallel.model_validate(found)


def in_layout(config: Config, parallel: Parallel) -> Config:
    """`config` in another layout, its training unchanged. ValueError where the layout does not fit the model."""
    found, problems = _in_layout(config, parallel)
    if problems:
        raise ValueError(f"layout {name_of(parallel)}: {'; '.join(problems)}")
    return found


def layouts_of(config: Config, ranks: int) -> list[Parallel]:
    """Every layout that so many ranks allow, by virtual stages none or two. ValueError where there is none."""
    fitting = [parallel for parallel in _layouts(ranks) if not _in_layout(config, parallel)[1]]
    if not fitting:
        raise ValueError(f"--ranks {ranks}: no layout of {ranks} ranks divides this model and its batch")
    return fitting


def _layouts(ranks: int) -> Iterator[Parallel]:
    def divisors(number: int) -> list[int]:
        return [size for size in range(1, number + 1) if number % size == 0]

    for tensor in divisors(ranks):
        for pipeline in divisors(ranks // tensor):
            for context in divisors(ranks // tensor // pipeline):
                for virtual in (1, 2) if pipeline > 1 else (1,):
                    for sequence in (False, True) if tensor > 1 else (False,):
                        data = ranks // tensor // pipeline // context
                        for sharded in (False, True) if data * context > 1 else (False,):
                            yield Parallel(
                                tensor=tensor,
                                pipeline=pipeline,
                                virtual_pipeline=virtual,
                                context=context,
                                data=data,
                                sequence=sequence,
                                distributed_optimizer=sharded,
                            )


def _in_layout(config: Config, parallel: Parallel) -> tuple[Config, list[str]]:
    # A comparison of replicas changes nothing that is computed, and has no effect in a layout without any. The first
    # steps are those from the seed's weights, whatever the run itself begins with.
    train = config.train.model_copy(update={"compare_replicas_every_steps": None, "history": None})
    checkpoint = config.checkpoint.model_copy(update={"start_from": None, "start_optimizer": None})
    found = config.model_copy(update={"parallel": parallel, "train": train, "checkpoint": checkpoint})
    return found, [str(problem) for problem in problems_of(found)]
