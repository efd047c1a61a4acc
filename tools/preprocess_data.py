"""Text files to Megatron's .bin/.idx token files, with a manifest of what was read and written.

    python tools/preprocess_data.py --input examples/toy/state_of_the_union.jsonl.xz \
        --tokenizer examples/toy/tokenizer.json --output-prefix runs/toy_data/speeches --append-eod

writes runs/toy_data/speeches_text_document.bin, .idx, .xxh3 and .manifest.json. A killed run is started again with the
same command and goes on. Past one machine: the same command with --part I/N on each, then once with --merge.
Exit code: 0 done; 1 a worker died, the same command goes on; 2 a mistake, or what the disk refuses; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from k2_megatron.data.encoder import ENCODERS
from k2_megatron.data.long_texts import UNBROKEN_BYTES
from k2_megatron.data.preprocess import preprocess
from k2_megatron.data.preprocess_job import Job
from k2_megatron.data.progress import ConsoleProgress
from k2_megatron.data.sources import find_sources
from k2_megatron.runtime.tool import run_tool

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
DEFAULT_SHARD_BYTES = 256 << 20


def parse_size(text: str) -> int:
    """Bytes, with K, M or G for powers of 1024."""
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    if not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M")
    return int(number) * unit


def parse_part(text: str) -> tuple[int, int]:
    """ "I/N", I from 0 to N-1."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)


def parse_workers(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def parse_fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 1")
    return fraction


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl, .parquet, .txt files (.gz .zst .xz), folders or globs")
    add("--json-keys", nargs="+", default=["text"], help="keys or columns to tokenize, each into files of its own")
    add("--tokenizer", required=True, help="tokenizer.json, a folder that holds one, or a sentencepiece .model")
    add("--eod-token", help="the piece that ends a document, where the tokenizer does not say")
    add("--append-eod", action="store_true", help="end every document with that piece")
    add("--special-tokens-in-text", action="store_true", help="let text such as <s> become control ids")
    add("--output-prefix", required=True, help="outputs are PREFIX_KEY_document.bin and so on")
    add("--workers", type=parse_workers, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--shard-size", type=parse_size, help="leave the output in shards of so much text, e.g. 1G (default: one file)")
    add("--part", type=parse_part, default=(0, 1), help="I/N: this machine's share; needs --shard-size")
    add("--merge", action="store_true", help="after all parts: check them and write the manifest")
    add(
        "--max-bad-fraction",
        type=parse_fraction,
        default=0.001,
        help="stop where more documents are unreadable (0.001)",
    )
    add(
        "--max-unbroken-size",
        type=parse_size,
        default=UNBROKEN_BYTES,
        help="reject a document with a longer stretch whose ids can only be made at once, in up to 45 times as much "
        "memory (4M)",
    )
    add("--encoder", choices=ENCODERS, default="auto", help="library that encodes (auto: the fastest exact one)")
    options = parser.parse_args()
    if (options.part[1] > 1 or options.merge) and options.shard_size is None:
        parser.error("--part and --merge need --shard-size: parts leave their shards as they are")
    if options.max_unbroken_size < UNBROKEN_BYTES:
        parser.error(f"--max-unbroken-size: {UNBROKEN_BYTES >> 20}M or more: so much is encoded at once anyway")
    return options


def main() -> int:
    options = parse_arguments()
    return run_tool(
        "preprocess_data",
        lambda: make_tokens(options),
        interrupted="stopped; the same command goes on from the finished shards",
    )


def make_tokens(options: argparse.Namespace) -> int:
    start = time.monotonic()
    job = Job(
        sources=tuple(find_sources(options.input, options.output_prefix, print)),
        keys=tuple(dict.fromkeys(options.json_keys)),
        tokenizer_path=options.tokenizer,
        end_of_document_piece=options.eod_token,
        special_pieces=options.special_tokens_in_text,
        append_end_of_document=options.append_eod,
        prefix=options.output_prefix,
        shard_bytes=options.shard_size or DEFAULT_SHARD_BYTES,
        one_file=options.shard_size is None,
        encoder=options.encoder,
        unbroken_bytes=options.max_unbroken_size,
    )
    try:
        with ConsoleProgress(sum(source.size for source in job.sources) // options.part[1]) as progress:
            totals = preprocess(
                job,
                workers=options.workers,
                max_bad_fraction=options.max_bad_fraction,
                part=options.part,
                merge_only=options.merge,
                report=progress,
                announce=print,
            )
    except RuntimeError as error:  # a worker died, or what was written is not what was read: no mistake of the user's
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    if totals is None:
        print(f"part {options.part[0]} of {options.part[1]} done in {seconds:.1f} s; after all parts run --merge")
    else:
        print(
            f"{options.output_prefix}: {totals['documents']} documents, {totals['tokens']} tokens, "
            f"{totals['rejected']} rejected, {seconds:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
