"""inspect: what a checkpoint holds, told from its tables alone: no tensor is read."""

from pathlib import Path

import numpy as np

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Shape, places
from k2_megatron.convert.safetensors_file import INDEX, SINGLE
from k2_megatron.convert.source import KEY_PREFIX
from k2_megatron.convert.torch_dist import TorchDistSource, checkpoint_folder, read_manifest

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def kind_of(path: Path) -> str:
    """ "hugging_face", "legacy" or "training", by what lies in the folder."""
    if not path.is_dir():
        raise ConversionError(f"{path} is no folder; give a checkpoint, a run folder or a model folder")
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return "hugging_face"
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return "legacy"
    return "training"


def describe(path: Path) -> str:
    """The text of `inspect` for a folder of any kind. ConversionError when it is not a checkpoint."""
    kind = kind_of(path)
    if kind == "hugging_face":
        return _hugging_face(path)
    return _legacy(path) if kind == "legacy" else _training(checkpoint_folder(path))


def _training(folder: Path) -> str:
    manifest = read_manifest(folder)
    source = TorchDistSource(folder, manifest)
    stored = sum(file["bytes"] for file in manifest["files"].values())
    samples, tokens = manifest.get("consumed_samples", 0), manifest.get("consumed_tokens", 0)
    lines = [
        f"{folder}: training checkpoint of step {manifest['step']:,}",
        f"  consumed     {samples:,} samples, {tokens:,} tokens",
        f"  layout       {manifest.get('layout')}" + (f", chunks {manifest['chunks']}" if "chunks" in manifest else ""),
        f"  precision    {manifest['precision']}",
        f"  fingerprint  {manifest['weights']}",
        f"  files        {len(manifest['files'])}, {stored / 1e9:.3f} GB",
        *_shape_lines(source.shape),
        *_wounds(folder, manifest),
    ]
    for kind, prefix in KEY_PREFIX.items():
        if kind not in source.dtypes:
            continue
        lines.append(f"{kind} ({source.dtypes[kind]})")
        for key, tensor in source.stored.tensors.items():
            if key.startswith("optimizer.") if not prefix else not key.startswith(prefix):
                continue
            size = int(np.prod(tensor.shape, dtype=np.int64)) * _BYTES[tensor.dtype]
            lines.append(
                _row(key.removeprefix(prefix), tensor.shape, tensor.dtype, size, f"{len(tensor.chunks)} chunks")
            )
    return "\n".join([*lines, f"{len(source.stored.objects)} byte objects (generator states, extra state)"])


def _wounds(folder: Path, manifest: dict) -> list[str]:
    """Files that are not there, or not as long as they were: what can be told without reading them."""
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in manifest["files"]}
    return [
        f"  NOT SOUND    {name} "
        + ("is missing" if size is None else f"has {size} bytes, {facts['bytes']} were written")
        for (name, size), facts in zip(sizes.items(), manifest["files"].values(), strict=True)
        if size != facts["bytes"]
    ]


def _hugging_face(folder: Path) -> str:
    facts = ModelFacts.from_hugging_face(folder)
    source = HuggingFaceSource(folder, facts)
    lines = [
        f"{folder}: Hugging Face model, {source.dtypes['weights']}, RoPE base {facts.rope_base:g}, "
        f"context {facts.context}, embeddings {'tied' if facts.tied_embeddings else 'untied'}",
        *_shape_lines(facts.shape),
    ]
    for name, tensor in source.tensors.items():
        size = int(np.prod(tensor.shape, dtype=np.int64)) * _BYTES[tensor.dtype]
        lines.append(_row(name, tensor.shape, tensor.dtype, size, tensor.file))
    return "\n".join(lines)


def _legacy(folder: Path) -> str:
    from k2_megatron.convert.legacy_k2 import LegacyK2Source

    source = LegacyK2Source(folder)
    held = ", ".join(f"{kind} ({dtype})" for kind, dtype in source.dtypes.items())
    samples = getattr(source.arguments, "consumed_train_samples", 0)
    dtype = source.dtypes["weights"]
    rows = []
    for place in places(source.shape):
        shape, home = place.entry.size(source.shape), source.home(place)
        where = f"stage {home.stage}" + (f" chunk {home.chunk}" if source.virtual_pipeline > 1 else "")
        cut = f"{where}, cut over {source.tensor_parallel} ranks" if place.entry.cut != "whole" else where
        name = place.entry.legacy.format(layer=place.layer)
        rows.append(_row(name, shape, dtype, shape[0] * shape[1] * _BYTES[dtype], cut))
    interleaved = f" x VP {source.virtual_pipeline}" if source.virtual_pipeline > 1 else ""
    return "\n".join(
        [
            f"{folder}: old K2 checkpoint of iteration {source.iteration:,}, TP {source.tensor_parallel} x PP "
            f"{source.pipeline_parallel}{interleaved}, holds {held}",
            f"  consumed     {samples:,} samples, {samples * source.facts.context:,} tokens",
            *_shape_lines(source.shape),
            *rows,
        ]
    )


def _shape_lines(shape: Shape) -> list[str]:
    return [
        f"  model        {shape.parameters:,} parameters: {shape.layers} layers, hidden {shape.hidden_size}, FFN "
        f"{shape.ffn_hidden_size}, {shape.heads} heads, {shape.kv_heads} KV heads, vocabulary {shape.vocab_size}"
    ]


def _row(name: str, shape: tuple[int, ...], dtype: str, size: int, note: str) -> str:
    return f"  {name:58} {'x'.join(map(str, shape)):>18} {dtype:9} {size / 1e6:12.3f} MB  {note}"
