"""What a run trained on, and whether that can be proved.

python tools/inspect_data.py verify RUN               the ledger's chain, the plan, the token files
python tools/inspect_data.py step RUN N               documents of step N: source, file, line, text, token span
python tools/inspect_data.py document RUN FILE:NUMBER every step that saw a document
python tools/inspect_data.py mix RUN A B              mixture of steps A to B against the plan's
python tools/inspect_data.py show RUN N               N samples decoded
python tools/inspect_data.py amend RUN skip|defer ... append an amendment to the ledger
python tools/inspect_data.py manifest PREFIX          hashes for .bin/.idx files made with Megatron's own tool

Exit code: 0 done; 1 `verify` found what is not as it was written; 2 a mistake, such as a folder that is no run's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k2_megatron.data.inspect import document_lines, mix_lines, show_lines, step_lines
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.manifest import manifest_of_foreign_files, manifest_path
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.tool import CheckFailed, run_tool
from k2_megatron.train.checkpoints.manifest import is_imported
from k2_megatron.train.position import refuse_in_the_past
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.run_folder import hold_run_folder, newest_manifest, with_past
from k2_megatron.train.verify_data import verify_lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name)
        added.add_argument("run", help="the run folder")
        return added

    verify = command("verify")
    verify.add_argument("--quick", action="store_true", help="do not read the token files whole")
    verify.add_argument(
        "--sources", type=Path, nargs="+", default=(), metavar="FOLDER", help="read the texts below these again, too"
    )
    step = command("step")
    step.add_argument("number", type=int)
    step.add_argument(
        "--characters", type=count, default=100, help="of the text of each document (100); 0 leaves it out"
    )
    command("document").add_argument("identity", help="FILE:NUMBER, as step prints it")
    mix = command("mix")
    mix.add_argument("first", type=int)
    mix.add_argument("last", type=int)
    show = command("show")
    show.add_argument("count", type=int)
    show.add_argument("--from", dest="first_sample", type=int, default=0, help="the first sample (0)")
    amend = command("amend")
    amend.add_argument("action", choices=["skip", "defer"])
    what = amend.add_mutually_exclusive_group(required=True)
    what.add_argument("--chunk", type=int)
    what.add_argument("--samples", type=int, nargs=2, metavar=("FIRST", "END"))
    amend.add_argument(
        "--from-sample",
        type=int,
        required=True,
        help="the next sample of the checkpoint to go on from, in the run's present sequence length",
    )
    amend.add_argument("--reason", required=True)
    commands.add_parser("manifest").add_argument("prefix")
    return parser.parse_args()


def count(text: str) -> int:
    """0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def answer(options: argparse.Namespace) -> Iterator[str]:
    if options.command == "manifest":
        manifest = manifest_of_foreign_files(options.prefix)
        yield f"{manifest_path(options.prefix)}: {manifest['files'][0]['tokens']} tokens"
        return
    run = Run(options.run)
    if options.command == "verify":
        try:
            yield from verify_lines(run, contents=not options.quick, sources=options.sources)
        except ValueError as error:
            raise CheckFailed(str(error)) from None
    elif options.command == "step":
        yield from step_lines(run, options.number, options.characters)
    elif options.command == "document":
        yield from document_lines(run, options.identity)
    elif options.command == "mix":
        yield from mix_lines(run, options.first, options.last)
    elif options.command == "show":
        yield from show_lines(run, options.count, options.first_sample)
    else:
        yield amend_order(run, options)


def amend_order(run: Run, options: argparse.Namespace) -> str:
    """Append an amendment that fits the run's schedule and what it has trained; the journal vouches for the line.

    ValueError, with nothing changed, where it does not fit, or the run is at work: the ledger cannot be undone."""
    from k2_megatron.train.spikes.rollback import check_fits  # brings torch

    config = run.config.model_copy(update={"run": run.config.run.model_copy(update={"folder": str(run.folder)})})
    fields = {
        "action": options.action,
        "from_sample": options.from_sample,
        "sequence_length": config.model.sequence_length,
        "chunk": options.chunk,
        "samples": tuple(options.samples) if options.samples else None,
        "reason": options.reason,
    }
    with hold_run_folder(config):
        config = with_past(config)
        data = open_run_data(config, writer=True)
        check_fits(config, {key: value for key, value in fields.items() if value is not None}, data)
        manifest = newest_manifest(run.folder)
        if manifest is not None and not is_imported(manifest):
            refuse_in_the_past(fields, manifest)
        data.ledger.amend(**fields)
        journal = Journal(run.folder, writer=True)
        journal.write("amendment", reason=options.reason, ledger=data.ledger.mark())
        journal.close()
    return f"{data.ledger.path}: {options.action} holds from sample {options.from_sample}; it goes for the next start"


def main() -> int:
    options = parse_arguments()
    return run_tool("inspect_data", lambda: tell_answer(options))


def tell_answer(options: argparse.Namespace) -> int:
    for line in answer(options):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
