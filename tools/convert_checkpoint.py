"""Convert checkpoints, and prove it: Hugging Face, the old K2 shards, other chunk layouts.

    convert_checkpoint.py to-hf          --load RUN_OR_CHECKPOINT --save FOLDER [--dtype float16] [--workers N]
    convert_checkpoint.py from-hf        --load MODEL_FOLDER --save RUN_FOLDER [--config TRAIN.toml]
    convert_checkpoint.py from-k2-legacy --load iter_0000941 --save RUN_FOLDER --config TRAIN.toml
    convert_checkpoint.py reshard        --load RUN_OR_CHECKPOINT --save RUN_FOLDER --tensor 4 --pipeline 2
    convert_checkpoint.py inspect        --load ANY
    convert_checkpoint.py verify         --load ANY

Exit codes: 0 done, 1 a check or a proof failed, 2 a mistake or what the disk refuses, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

from k2_megatron.runtime.tool import NOT_SOUND, run_tool


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    interrupted = "interrupted; the same command goes on where this one was"
    return run_tool("convert_checkpoint", lambda: options.run(options), interrupted=interrupted)


def run_to_hf(options: argparse.Namespace) -> int:
    from k2_megatron.convert.export_model import ExportOptions, export_hugging_face

    saved = export_hugging_face(
        ExportOptions(
            options.load,
            options.save,
            options.dtype,
            options.weights,
            options.vocab_size,
            options.tokenizer,
            int(options.shard_gb * 1e9),
            options.workers,
            options.proof,
        )
    )
    print(saved)
    return 0


def run_from_hf(options: argparse.Namespace) -> int:
    from k2_megatron.convert.import_model import import_hugging_face

    print(import_hugging_face(_import_options(options, options.vocab_size, options.proof)))
    return 0


def run_from_k2_legacy(options: argparse.Namespace) -> int:
    from k2_megatron.convert.import_legacy import import_legacy

    print(import_legacy(_import_options(options, None, options.proof), optimizer=options.optimizer))
    return 0


def _import_options(options: argparse.Namespace, vocab_size: int | None, proof: bool):
    from k2_megatron.convert.import_model import ImportOptions

    return ImportOptions(
        options.load,
        options.save,
        options.config,
        options.precision,
        vocab_size,
        options.tensor,
        options.pipeline,
        options.workers,
        proof,
    )


def run_reshard(options: argparse.Namespace) -> int:
    from k2_megatron.convert.reshard import reshard

    print(reshard(options.load, options.save, options.tensor, options.pipeline, options.workers))
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    from k2_megatron.convert.describe import describe

    print(describe(options.load))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from k2_megatron.convert.describe import kind_of
    from k2_megatron.convert.torch_dist import checkpoint_folder
    from k2_megatron.convert.verify import verify_export, verify_training

    kind = kind_of(options.load)
    if kind == "legacy":
        raise ValueError(
            f"{options.load}: old K2 checkpoints carry no hashes; from-k2-legacy checks what can be checked"
        )
    folder = options.load if kind == "hugging_face" else checkpoint_folder(options.load)
    if kind == "hugging_face":
        problems = verify_export(folder, options.workers)
    else:
        problems = verify_training(folder, options.workers, announced=True)
    for problem in problems:
        print(f"convert_checkpoint: {problem}", file=sys.stderr)
    print(f"{folder}: {'sound' if not problems else 'NOT sound'}")
    return NOT_SOUND if problems else 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _gigabytes(text: str) -> float:
    number = float(text)
    if not 1e-6 <= number <= 1e6:  # and no NaN
        raise argparse.ArgumentTypeError(f"{text} GB is no size of a file")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, saves: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--load", type=Path, required=True, help="what to read")
        added.add_argument(
            "--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: one a core)"
        )
        if saves:
            added.add_argument("--save", type=Path, required=True, help="what to write; must not exist yet")
        return added

    def proof(added: argparse.ArgumentParser) -> None:
        added.add_argument("--no-proof", dest="proof", action="store_false", help="leave out the run of both models")

    def start(added: argparse.ArgumentParser) -> None:
        added.add_argument("--config", type=Path, help="the training configuration to start with")
        added.add_argument(
            "--precision", choices=("float32", "bfloat16"), help="default: the model's, half as bfloat16"
        )

    def layout(added: argparse.ArgumentParser) -> None:
        added.add_argument("--tensor", type=_positive, default=1, help="cut chunks for this many tensor ranks (1)")
        added.add_argument("--pipeline", type=_positive, default=1, help="file layers by this many stages (1)")

    out = command("to-hf", run_to_hf, "a checkpoint of ours as safetensors of LlamaForCausalLM")
    out.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's precision")
    out.add_argument("--weights", choices=("model", "main"), default="model", help="main: the optimizer's fp32 copy")
    out.add_argument("--vocab-size", type=_positive, help="rows in use; the padding above them is left out")
    out.add_argument("--tokenizer", type=Path, help="tokenizer file or folder to put beside (default: the run's)")
    out.add_argument("--shard-gb", type=_gigabytes, default=5.0, help="largest shard (5 GB)")
    proof(out)

    into = command("from-hf", run_from_hf, "a Llama-shaped model as a checkpoint that pretrain_k2.py starts from")
    start(into)
    proof(into)
    into.add_argument("--vocab-size", type=_positive, help="rows of the vocabulary, padding included")
    layout(into)

    old = command("from-k2-legacy", run_from_k2_legacy, "an iteration of the old K2 training code, Adam state included")
    start(old)
    old.add_argument(
        "--no-optimizer", dest="optimizer", action="store_false", help="weights alone; moments start at zero"
    )
    proof(old)
    layout(old)

    layout(command("reshard", run_reshard, "the same checkpoint with chunks cut for another layout"))
    command("inspect", run_inspect, "what a checkpoint holds, without loading it", saves=False)
    command("verify", run_verify, "hashes, manifest and fingerprint of a checkpoint", saves=False)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from k2_megatron.runtime.memory import keep_freed_blocks

    keep_freed_blocks()
    sys.exit(main())
