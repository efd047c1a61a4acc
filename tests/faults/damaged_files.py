"""What happens to a run's files while nobody writes them: damage, and a cut of the power.

In:  the run's folder, or the prefix of its token files, and a random generator. Out: the file that was changed.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import step_of

Damage = Callable[[Path, random.Random], None]


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _zero(path: Path, chance: random.Random) -> None:
    """A block of zeros over what was none."""
    content = bytearray(path.read_bytes())
    first = chance.choice([place for place in range(len(content)) if content[place]])
    content[first : first + 4096] = bytes(len(content[first : first + 4096]))
    path.write_bytes(content)


def _lose(path: Path, _chance: random.Random) -> None:
    path.unlink()


def damage_the_newest(run: Path, chance: random.Random) -> None:
    """Damage a file of the newest checkpoint in one of five ways, when there is one before it; the fifth is to put the
    file of the same name of the one before in its place."""
    folders = complete_checkpoints(run / "checkpoints")
    if len(folders) < 2:
        return
    path = chance.choice(sorted(folders[0].iterdir()))
    older = folders[1] / path.name

    def exchange(path: Path, _chance: random.Random) -> None:
        path.write_bytes(older.read_bytes()) if older.exists() else path.unlink()

    ways: tuple[Damage, ...] = (_flip, _cut, _zero, _lose, exchange)
    chance.choice(ways)(path, chance)


def damage_the_pointer(run: Path, chance: random.Random) -> None:
    """`latest` is cut, names a checkpoint that there is not, or no checkpoint at all."""
    pointer = run / "checkpoints" / "latest"
    if pointer.exists():
        wrong = (pointer.read_text()[: chance.randrange(10)], "step_00009999\n", chance.randbytes(14).hex())
        pointer.write_text(chance.choice(wrong))


def damage_the_tokens(prefix: Path, chance: random.Random) -> Path:
    """Damage one of the files that a start reads whole; of the tokens themselves, which are checked block by block when
    they are read, cut off the end."""
    ways: dict[str, tuple[Damage, ...]] = {".idx": (_flip, _cut, _zero, _lose), ".xxh3": (_flip, _cut, _zero, _lose)}
    suffix = chance.choice([".bin", *ways])
    path = Path(f"{prefix}{suffix}")
    chance.choice(ways.get(suffix, (_cut, _lose)))(path, chance)
    return path


def lose_power(run: Path, chance: random.Random) -> None:
    """What was not yet on the disk is lost: half-written files are cut, zeros, or gone, and of the journal's last line,
    if it was written since the last save, a part."""
    for path in sorted(run.glob("checkpoints/.step_*.writing/*")):
        if path.stat().st_size:
            chance.choice((_cut, lambda path, _chance: os.truncate(path, 0), _lose))(path, chance)
    journal, saved = run / "journal.jsonl", complete_checkpoints(run / "checkpoints")
    content = journal.read_bytes() if journal.exists() else b""
    last = content[content.rfind(b"\n", 0, -1) + 1 :]
    if content.endswith(b"\n") and json.loads(last)["event"] == "step":  # other events are synced one by one
        if not saved or json.loads(last)["step"] > step_of(saved[0]):
            os.truncate(journal, len(content) - chance.randrange(1, len(last)))
