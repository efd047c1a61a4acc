"""Certify that a layout computes the same steps as one process does: losses, norms, every gradient, weights.

    python tools/certify_layout.py examples/toy/toy.toml                               # the configured layout
    python tools/certify_layout.py examples/toy/toy.toml --layouts tp2,pp2,tp2-pp2-sp  # these, on this machine
    python tools/certify_layout.py examples/toy/toy.toml --ranks 4                     # all that 4 ranks allow
    srun python tools/certify_layout.py record CONFIG.toml --output records/tp8-pp4    # on a cluster: record each
    python tools/certify_layout.py compare records/tp8-pp4 records/tp4-pp8             # and compare them

The first steps are trained from the initial weights on the run's own data; nothing is written into the run's folder.
Bounds come from repeats of the reference in which every result is moved by a rounding. docs/certificate.md says what
the certificate proves. Exit code: 0 same, 1 different, 2 not possible.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k2_megatron.runtime.quiet import silence_dependencies
from k2_megatron.runtime.tool import NOT_SOUND, run_tool

if TYPE_CHECKING:
    from k2_megatron.certify.certificate import Certificate

SAME, DIFFERENT = 0, NOT_SOUND
NAME = "certify_layout"


def main(arguments: list[str]) -> int:
    silence_dependencies()
    command = arguments[0] if arguments else ""
    if command == "record":
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is to be saved, and no rank is to say so
        from k2_megatron.runtime.mistakes import leave, run_program

        leave(lambda: run_program(record, arguments[1:]))
    if command == "compare":
        return run_tool(NAME, lambda: compare(compare_parser().parse_args(arguments[1:])))
    return run_tool(NAME, lambda: certify(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=f"{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_run(found)
    which = found.add_mutually_exclusive_group()
    which.add_argument(
        "--layouts", metavar="NAME,...", help="such as tp2,pp2-vp2,tp2-sp-dp2-do; default: the configured one"
    )
    which.add_argument("--ranks", type=int, metavar="N", help="every layout that N ranks allow")
    found.add_argument("--repeats", type=int, default=3, metavar="N", help=_REPEATS)
    found.add_argument("--output", type=Path, default=Path("certificate.json"), help="default: %(default)s")
    found.add_argument("--records", type=Path, metavar="FOLDER", help="keep the records there; else they are removed")
    return found


_REPEATS = "repeats of the reference, each moved by other roundings, which make the bounds (default %(default)s)"


def record_parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=f"{NAME}.py record", description="Record the first steps in the layout of the ranks started; any launcher."
    )
    _add_run(found)
    found.add_argument("--repeats", type=int, default=0, metavar="N", help=_REPEATS)
    found.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the record, a new folder")
    return found


def compare_parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=f"{NAME}.py compare", description="Compare records with a reference.")
    found.add_argument("reference", type=Path, help="the record of the reference, made with --repeats")
    found.add_argument("record", type=Path, nargs="+", help="the records of other layouts")
    found.add_argument("--output", type=Path, default=Path("certificate.json"), help="default: %(default)s")
    return found


def _add_run(found: argparse.ArgumentParser) -> None:
    found.add_argument("config", help="the run's TOML file")
    found.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    found.add_argument("--steps", type=int, default=3, metavar="N", help="steps to train (default %(default)s)")


def certify(options: argparse.Namespace) -> int:
    """Record and compare, all on this machine."""
    from k2_megatron.certify.layouts import layout_named, layouts_of
    from k2_megatron.certify.one_machine import certify as certified
    from k2_megatron.config import load_config
    from k2_megatron.runtime.launch import Remedies, run_local_ranks
    from k2_megatron.train.watchdog import collective_timeout_seconds

    check_numbers(("--steps", options.steps, 1), ("--repeats", options.repeats, 1))
    remedies = Remedies(*["There is no certificate of this; start again."] * 2)
    check_output(options.output)
    config = load_config(options.config, options.overrides)
    layouts = [config.parallel]
    if options.layouts is not None:
        layouts = [layout_named(name) for name in options.layouts.split(",")]
    elif options.ranks is not None:
        check_numbers(("--ranks", options.ranks, 1))
        layouts = layouts_of(config, options.ranks)
    leaving_seconds = collective_timeout_seconds(config.watchdog)
    with folder_for(options.records, options.output) as folder:
        found = certified(
            config,
            layouts,
            steps=options.steps,
            repeats=options.repeats,
            folder=folder,
            launch=lambda given, ranks: run_local_ranks([__file__, "record", *given], ranks, leaving_seconds, remedies),
            say=partial(print, flush=True),
        )
    return finish(found, options.output)


def record(arguments: list[str]) -> int:
    """Be one rank of a record, or start its local ranks."""
    from k2_megatron.certify.layouts import in_layout
    from k2_megatron.certify.one_machine import check_before, check_steps
    from k2_megatron.certify.record import record as recorded
    from k2_megatron.config import load_config
    from k2_megatron.runtime.devices import find_device
    from k2_megatron.runtime.launch import Remedies, read_environment, run_local_ranks, single_rank
    from k2_megatron.train.watchdog import collective_timeout_seconds

    options = record_parser().parse_args(arguments)
    check_numbers(("--steps", options.steps, 1), ("--repeats", options.repeats, 0))
    environment = read_environment()
    config = load_config(options.config, options.overrides, world_size=environment.world_size if environment else None)
    config = in_layout(config, config.parallel)
    check_steps(config, options.steps)
    if environment is None:
        check_before(config, [config])
        if config.world_size > 1:
            limit = collective_timeout_seconds(config.watchdog)
            remedies = Remedies(*["The record is not whole; start again with another --output."] * 2)
            return run_local_ranks([__file__, "record", *arguments], config.world_size, limit, remedies)
        environment = single_rank()
    device = find_device(environment.local_rank)
    recorded(config, environment, device, options.output, steps=options.steps, repeats=options.repeats)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Judge records that were made elsewhere."""
    from k2_megatron.certify.compare import compare as compared

    check_output(options.output)
    return finish(compared(options.reference, options.record, partial(print, flush=True)), options.output)


def finish(found: "Certificate", output: Path) -> int:
    """Write the certificate, say the verdict, and return the exit code."""
    from k2_megatron.certify.certificate import last_line, write_certificate

    write_certificate(found, output)
    print(f"\n{last_line(found, output)}")
    return SAME if found.same else DIFFERENT


def check_numbers(*options: tuple[str, int, int]) -> None:
    """ValueError naming the option whose value is below the least."""
    for option, value, least in options:
        if value < least:
            raise ValueError(f"{option} {value}: give {least} or more")


def check_output(output: Path) -> None:
    """ValueError where the certificate could not be written after all the work."""
    if not output.parent.is_dir() or output.is_dir():
        found = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise ValueError(f"--output {output}: {found}; name a file in a folder that is there")


@contextlib.contextmanager
def folder_for(kept: Path | None, output: Path) -> Iterator[Path]:
    """The folder of the records: `kept`, which must be new or empty; or one beside the certificate, and removed."""
    if kept is None:
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # or it would be left
        try:
            with tempfile.TemporaryDirectory(prefix=".certify_", dir=output.resolve().parent) as folder:
                yield Path(folder)
        finally:
            signal.signal(signal.SIGTERM, before)
        return
    if kept.exists() and (not kept.is_dir() or any(kept.iterdir())):
        raise ValueError(f"--records {kept} is there and is no empty folder: name one that does not exist")
    kept.mkdir(parents=True, exist_ok=True)
    yield kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
