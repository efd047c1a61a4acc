"""That all ranks train the same run: a node with an older checkout, configuration or copy of the data would not show.

In:  what each rank has read by itself. Out: nothing; or a ValueError, the same on every rank: who differs in what.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
import torch.distributed as distributed

import k2_megatron
from k2_megatron.config import Config
from k2_megatron.train.run_data import RunData, open_run_data

NAMED = 4  # ranks, of those that hold one value
_PACKAGE = Path(k2_megatron.__file__).parent


def code_and_configuration(config: Config) -> dict[str, str]:
    """What is to be equal before groups of ranks are built by it."""
    code = hashlib.sha256()
    for path in [_PACKAGE.with_name("pretrain_k2.py"), *sorted(_PACKAGE.rglob("*.py"))]:
        if path.is_file():  # an installed package stands without the script
            code.update(f"{path.relative_to(_PACKAGE.parent)}\0".encode() + path.read_bytes())
    return {
        "code of k2_megatron": code.hexdigest()[:16],
        "version of torch": torch.__version__,
        "version of numpy": numpy.__version__,
        "configuration": hashlib.sha256(config.to_toml().encode()).hexdigest()[:16],
    }


def open_agreed_data(config: Config, *, writer: bool) -> RunData:
    """The data of the run, which every rank has found the same."""
    data = open_run_data(config, writer=writer)
    require_agreement(rows_and_ledger(data))
    return data


def rows_and_ledger(data: RunData) -> dict[str, object]:
    """What is to be equal before anything is trained on them."""
    held_out = data.held_out.fingerprint if data.held_out else None
    return {"data.train": data.fingerprint, "data.held_out": held_out, "ledger": data.ledger.mark()}


def require_agreement(mine: Mapping[str, object]) -> None:
    """Compare what all ranks hold, which give the same names."""
    everywhere: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, dict(mine))
    wrong = [words for name in mine if (words := _differing(name, [facts[name] for facts in everywhere]))]
    if wrong:
        raise ValueError(
            f"the ranks would not train the same run: {'; '.join(wrong)}. Give every node the same code, configuration "
            "and files (a copy on a node's own disk may be an old one), and start again"
        )


def _differing(name: str, values: list) -> str:
    """ "data.train is abc on 3 of 4 (0, 1, 2), def on 1 of 4 (3)"; nothing where all are equal."""
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
