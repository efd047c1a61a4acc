"""Checkpoints as versions before aes_lanes left them: format 1, an xxh3 hash of each file."""

import json
from pathlib import Path

from k2_megatron.train.checkpoints.file_hash import XXH3, hash_file
from k2_megatron.train.checkpoints.manifest import manifest_text


def write_manifest_of_before(folder: Path) -> None:
    """Replace the manifest of a checkpoint (where the file is shared with others by links, theirs stays)."""
    path = folder / "k2.json"
    manifest = json.loads(path.read_text())
    files = {name: hash_file(folder / name, XXH3) for name in manifest["files"]}
    path.unlink()
    path.write_text(manifest_text({**manifest, "format": 1, "files": files}))
