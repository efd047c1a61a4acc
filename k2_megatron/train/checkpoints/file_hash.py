"""Size and hash of a file, as manifests tell of it: {"bytes": 12, "aes_lanes": "..."}; the name says which hash.

Checkpoints are written with aes_lanes. Those of earlier versions have xxh3 (of 128 bits, as `xxhsum -H2` prints it). So
have Hugging Face folders: whoever reads them may have no k2_megatron.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from k2_megatron.train.checkpoints.aes_lanes import Hash, aes_lanes

AES_LANES, XXH3 = "aes_lanes", "xxh3"
HASHES = (AES_LANES, XXH3)
_READ_BYTES = 256 << 10  # stays in a core's second cache between reading and hashing


def new_hash(name: str) -> Hash:
    """One of HASHES, of nothing yet."""
    assert name in HASHES, f"{name!r} is none of {HASHES}"
    return aes_lanes() if name == AES_LANES else xxhash.xxh3_128()


def hash_file(path: Path, name: str = AES_LANES) -> dict[str, Any]:
    """{"bytes", name} of a file on disk."""
    digest, size = new_hash(name), 0
    block = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
    return {"bytes": size, name: digest.hexdigest()}


def file_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The size and the hash among other facts of a file."""
    return {key: facts[key] for key in ("bytes", *HASHES) if key in facts}


def problem_of_file(path: Path, facts: Mapping[str, Any]) -> str | None:
    """Why a file is not the one that `facts` tell of: missing, cut, altered; None when it is. OSError when it cannot be
    read."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"{path} has {size} bytes, {facts['bytes']} were written"
    name = next((name for name in HASHES if name in facts), None)
    if name is None:
        return f"{path} has no hash in the manifest that this version knows ({', '.join(HASHES)})"
    if hash_file(path, name)[name] != facts[name]:
        return f"{path} was altered after it was written (its {name} hash differs)"
    return None
