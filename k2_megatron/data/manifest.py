"""The manifest of a set of token files: what they were made from, what they hold, and the hash of every block.

In: `PREFIX.manifest.json` beside `PREFIX*.bin/.idx/.xxh3`. Out: `CheckedTokenFile`s that find damage before it is read.
Files of Megatron's own tool have no manifest: they open too, with their sizes and index checked and nothing else;
`tools/inspect_data.py manifest PREFIX` writes one for them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.data.indexed import TokenFile, strip_suffix
from k2_megatron.data.store import BLOCK_BYTES, HashedWriter, read_sealed, write_sealed

FORMAT = "k2_megatron tokens 1"
RESTORE = "restore it, or remove the manifest and make the tokens again with tools/preprocess_data.py"


def manifest_path(prefix: str | os.PathLike) -> Path:
    """Where the manifest of a prefix (or of one of its files) lies."""
    text = os.fspath(prefix)
    return Path(text) if text.endswith(".manifest.json") else Path(strip_suffix(text) + ".manifest.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, whole and of this format. ValueError otherwise."""
    manifest = read_sealed(path, RESTORE)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r}, this reads {FORMAT!r}; {RESTORE}")
    return manifest


class CheckedTokenFile(TokenFile):
    """A token file whose blocks are compared with their hashes the first time they are touched."""

    def __init__(self, prefix: str | os.PathLike, entry: dict[str, Any] | None):
        super().__init__(prefix)
        self.entry, self._bin_name = entry, os.fspath(self.bin_path)
        if entry is None:
            self.check_index()
            return
        found = (self.bin_path.stat().st_size, self.idx_path.stat().st_size, self.dtype.name)
        expected = (entry["bin_bytes"], entry["idx_bytes"], entry["dtype"])
        if found != expected:
            raise ValueError(f"{self.prefix}: .bin, .idx, dtype are {found}, the manifest says {expected}; {RESTORE}")
        self._bin_blocks = -(-entry["bin_bytes"] // BLOCK_BYTES)
        blocks = self._bin_blocks + -(-entry["idx_bytes"] // BLOCK_BYTES)
        self._hashes = self._read_hashes(blocks, entry["blocks_xxh3"])
        self._checked = np.zeros(blocks, dtype=bool)
        self._raw = [self.tokens.view(np.uint8).data, self._index]

    def _read_hashes(self, blocks: int, expected: str) -> np.ndarray:
        path = Path(self.prefix + ".xxh3")
        content = path.read_bytes() if path.is_file() else b""
        if len(content) != 8 * blocks or xxhash.xxh3_64_hexdigest(content) != expected:
            raise ValueError(f"{path}: missing, damaged, or of other token files than the manifest's; {RESTORE}")
        return np.frombuffer(content, dtype="<u8")

    def check_tokens(self, first: int, last: int) -> None:
        """Compare the blocks that hold tokens first..last-1 with their hashes, where that was not done before. A file
        that became shorter since it was opened is found first: to read what a mapping has lost kills the process."""
        size = os.stat(self._bin_name).st_size
        if size < last * self.dtype.itemsize:
            found = f"{self.bin_path}: {size} bytes, and {self.tokens.nbytes} when it was opened"
            raise ValueError(f"{found}: something cut it while it was read; {RESTORE}")
        if self.entry is not None:
            size = self.dtype.itemsize
            self._check(0, first * size // BLOCK_BYTES, (last * size - 1) // BLOCK_BYTES)

    def check_index_bytes(self, first: np.ndarray | int, end: np.ndarray | int) -> None:
        """Compare the blocks that hold bytes first..end-1 of the `.idx` with their hashes, as `check_tokens` does. Of
        arrays, the blocks of each element's first and last byte."""
        if self.entry is None:
            return
        if isinstance(first, int) and isinstance(end, int):
            self._check(1, first // BLOCK_BYTES, (end - 1) // BLOCK_BYTES)
            return
        for block in np.union1d(first // BLOCK_BYTES, (end - 1) // BLOCK_BYTES).tolist():
            self._check(1, block, block)

    def check_whole_index(self) -> None:
        """Compare every block of the `.idx` with its hash."""
        if self.entry is not None:
            self._check(1, 0, (self.entry["idx_bytes"] - 1) // BLOCK_BYTES)

    def check_everything(self) -> None:
        """Read both files whole."""
        self.check_whole_index()
        self.check_tokens(0, self.token_count)

    def _check(self, which: int, first_block: int, last_block: int) -> None:
        offset = self._bin_blocks if which else 0
        if self._checked[offset + first_block : offset + last_block + 1].all():
            return
        for block in range(first_block, last_block + 1):
            if self._checked[offset + block]:
                continue
            content = self._raw[which][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if xxhash.xxh3_64_intdigest(content) != self._hashes[offset + block]:
                path = self.idx_path if which else self.bin_path
                start = block * BLOCK_BYTES
                raise ValueError(f"{path}: bytes {start}..{start + len(content)} differ from their hash; {RESTORE}")
            self._checked[offset + block] = True


def open_token_files(prefix: str | os.PathLike) -> tuple[list[CheckedTokenFile], dict[str, Any] | None]:
    """The token files of a prefix or manifest, in order, and the manifest (None for files made without one)."""
    path = manifest_path(prefix)
    if not path.is_file():
        if os.fspath(prefix).endswith(".manifest.json"):
            raise ValueError(f"{path}: no such manifest; {RESTORE}")
        return [CheckedTokenFile(prefix, None)], None
    manifest = read_manifest(path)
    return [CheckedTokenFile(path.parent / entry["name"], entry) for entry in manifest["files"]], manifest


def manifest_of_foreign_files(prefix: str, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Hash a `.bin/.idx` pair made elsewhere; writes `.xxh3` and the manifest beside it. Sources stay unknown.

    ValueError where there is a manifest: it may know the sources, and hashing anew would take damage for truth.
    """
    if manifest_path(prefix).is_file():
        raise ValueError(
            f"{manifest_path(prefix)}: exists, and this would forget what it was made from; remove it first if the "
            "tokens are known to be whole"
        )
    file = CheckedTokenFile(prefix, None)
    blocks, whole = [], []
    for path in (file.bin_path, file.idx_path):
        digest = xxhash.xxh3_64()
        with open(path, "rb") as stream:
            while content := stream.read(BLOCK_BYTES):
                digest.update(content)
                blocks.append(xxhash.xxh3_64_intdigest(content))
        whole.append(digest.hexdigest())
    hashes = HashedWriter(Path(file.prefix + ".xxh3"))
    hashes.write(np.array(blocks, dtype="<u8").tobytes())
    hashes.commit()
    entry = {
        "name": os.path.basename(file.prefix),
        "documents": file.documents,
        "sequences": file.sequences,
        "tokens": file.token_count,
        "dtype": file.dtype.name,
        "bin_bytes": file.bin_path.stat().st_size,
        "idx_bytes": file.idx_path.stat().st_size,
        "bin_xxh3": whole[0],
        "idx_xxh3": whole[1],
        "blocks_xxh3": hashes.whole_hash,
        "parts": [],
    }
    manifest = {"format": FORMAT, "tokenizer": tokenizer, "sources": [], "files": [entry]}
    write_sealed(manifest_path(prefix), manifest)
    return read_manifest(manifest_path(prefix))
