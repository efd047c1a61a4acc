"""Train a byte-level BPE tokenizer on text files and write its `tokenizer.json`.

    python tools/train_tokenizer.py --input examples/toy/state_of_the_union.jsonl.xz --vocab-size 4096 \
        --output examples/toy/tokenizer.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from k2_megatron.data.readers import documents
from k2_megatron.data.sources import find_sources
from k2_megatron.data.training import train_byte_level_bpe
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.tool import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files, folders or globs")
    parser.add_argument("--json-key", default="text", help="the key or column that holds the text (default: text)")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, special pieces included")
    parser.add_argument("--special-tokens", nargs="*", default=["<|endoftext|>"], help="the first ends a document")
    parser.add_argument("--output", type=Path, required=True, help="where tokenizer.json goes")
    options = parser.parse_args()
    return run_tool("train_tokenizer", lambda: train(options))


def train(options: argparse.Namespace) -> int:
    check_output(options.output)
    texts = documents(find_sources(options.input, announce=print), options.json_key)
    tokenizer = train_byte_level_bpe(texts, options.vocab_size, options.special_tokens)
    write_file(options.output, tokenizer.to_str(pretty=True))
    pieces = tokenizer.get_vocab_size()
    short = f" of the {options.vocab_size} asked for: the text has no more; give more text"
    print(f"{options.output}: {pieces} pieces{short if pieces < options.vocab_size else ''}")
    return 0


def check_output(path: Path) -> None:
    """Make the folder that `path` goes to. ValueError, before any text is read, where there can be no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: its folder cannot be made ({error.strerror}); name another file") from None
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; name a file in it, such as {path / 'tokenizer.json'}")


if __name__ == "__main__":
    sys.exit(main())
