"""That all ranks train the same run: a node with an older checkout, configuration or copy of the data would not show.

In:  what each rank has read by itself. Out: nothing; or a ValueError, the same on every rank: who differs in what.
"""

import hashlib
from collections import defaultdict

import numpy
import torch
import torch.distributed as distributed

import k2_megatron
from k2_megatron.config import Config
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.run_data import RunData

NAMED = 4  # ranks, of those that hold one value


def require_agreement(config: Config, data: RunData, groups: Groups) -> None:
    """Compare versions, configuration, data and ledger of all ranks."""
    held_out = data.held_out.fingerprint if data.held_out else None
    mine = {
        "version of k2_megatron": k2_megatron.__version__,
        "version of torch": torch.__version__,
        "version of numpy": numpy.__version__,
        "configuration": hashlib.sha256(config.to_toml().encode()).hexdigest()[:16],
        "data.train": data.fingerprint,
        "data.held_out": held_out,
        "ledger": data.ledger.mark(),
    }
    everywhere: list = [None] * groups.world_size
    distributed.all_gather_object(everywhere, mine)
    wrong = [words for name in mine if (words := _differing(name, [facts[name] for facts in everywhere]))]
    if wrong:
        raise ValueError(
            f"the ranks would not train the same run: {'; '.join(wrong)}. Give every node the same code, configuration "
            "and files (a copy on a node's own disk may be an old one), and start again"
        )


def _differing(name: str, values: list) -> str:
    """ "data.train is abc on 3 ranks (0, 1, 2), def on 1 rank (3)"; nothing where all are equal."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        ranks[str(value)].append(rank)
    if len(ranks) == 1:
        return ""
    held = []
    for value, those in sorted(ranks.items(), key=lambda item: -len(item[1])):
        named = ", ".join(map(str, those[:NAMED])) + (", ..." if len(those) > NAMED else "")
        held.append(f"{value} on {len(those)} of {len(values)} ({named})")
    return f"{name} is {', '.join(held)}"
