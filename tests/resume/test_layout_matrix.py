"""One state saved under each layout and loaded under each other: weights, moments, main parameters, to the bit."""

import itertools
from pathlib import Path

import layout_matrix
import numpy as np
import pytest
import torch
from rank_processes import results_of, run_ranks
from small_run import checkpoint_tensors, overrides
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from k2_megatron.convert.names import places
from k2_megatron.convert.torch_dist import TorchDistSource
from k2_megatron.train.checkpoints.manifest import read_manifest

SHARDED = {"parallel.distributed_optimizer": True}
LAYOUTS = {
    "dp4-sharded": SHARDED,
    "tp2-sp-dp2": {"parallel.tensor": 2, "parallel.sequence": True},
    "tp2-pp2-sp": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True},
    "pp2-vp2-dp2-sharded": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, **SHARDED},
    "pp4": {"parallel.pipeline": 4},
    "tp2-cp2-sharded": {"parallel.tensor": 2, "parallel.context": 2, **SHARDED},
}
# Ranks that hold the same tensors, data- and context-parallel ones: they share the writing.
REPLICAS = {
    "dp4-sharded": [(0, 1, 2, 3)],
    "tp2-sp-dp2": [(0, 2), (1, 3)],
    "pp2-vp2-dp2-sharded": [(0, 1), (2, 3)],
    "tp2-cp2-sharded": [(0, 2), (1, 3)],
}
# A float32 run has no main parameters of its own: what differs there is how the optimizers say so.
MATRICES = {"bfloat16": LAYOUTS, "float32": {name: LAYOUTS[name] for name in ("dp4-sharded", "tp2-pp2-sp")}}


@pytest.fixture(scope="module", params=MATRICES)
def matrix(request, whole_run, small_config, tmp_path_factory):
    """(the folder with a checkpoint a layout, the trained checkpoint they come from, what each pair's load found)."""
    precision = {"train.precision": request.param}
    source = whole_run(4, {**LAYOUTS["tp2-pp2-sp"], **precision}) / "checkpoints" / layout_matrix.STEP
    folder = tmp_path_factory.mktemp("matrix")
    layouts = {
        name: overrides({"train.steps": 8, **settings, **precision})
        for name, settings in MATRICES[request.param].items()
    }
    arguments = (small_config, layouts, source, folder)
    results = results_of(run_ranks(layout_matrix.save_and_load_all, 4, arguments, folder / "output"))
    assert all(result == results[0] for result in results)
    return folder, source, results[0]


def test_every_pair_of_layouts_keeps_every_bit(matrix):
    folder, _, found = matrix
    saves = sorted(path.name for path in folder.iterdir() if path.name != "output")
    layouts = [name for name in saves if name not in layout_matrix.GATHERED.values()]
    assert len(saves) == len(layouts) + 1, "what megatron-core gathers is not among them"
    assert set(found) == set(itertools.product(["source", *saves], layouts))
    expected = found["source", "tp2-pp2-sp"]
    assert len(set(expected.values())) >= 3, "weights and two moments are not the same tensors"
    assert {pair: state for pair, state in found.items() if state != expected} == {}


def test_every_layout_stores_the_same_tensors(matrix):
    """Read by torch itself and by the conversions, whole; and each byte of them once, no rank writing much more than
    its part."""
    folder, source, found = matrix
    expected = checkpoint_tensors(source)
    largest = max(tensor[:1].nbytes if tensor.dim() == 3 else tensor.nbytes for tensor in expected.values())
    for layout in {name for _, name in found}:
        saved = folder / layout / layout_matrix.STEP
        stored = checkpoint_tensors(saved)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items()), layout
        assert_conversions_read(saved, expected)
        written = written_bytes(saved)
        assert sum(written) == sum(tensor.nbytes for tensor in expected.values()), layout
        for ranks in REPLICAS.get(layout, []):
            shares = [written[rank] for rank in ranks]
            assert max(shares) - min(shares) <= largest, (layout, shares)


def assert_conversions_read(saved: Path, expected: dict[str, torch.Tensor]) -> None:
    source = TorchDistSource(saved, read_manifest(saved))
    for kind in source.dtypes:
        for place in places(source.shape):
            rows, columns = place.entry.size(source.shape)
            read = torch.from_numpy(source.read(kind, place, 0, rows).view(np.uint8))
            tensor = expected[source.key(kind, place)]
            tensor = (tensor if place.layer is None else tensor[place.layer]).reshape(rows, columns)
            assert torch.equal(read, tensor.contiguous().view(torch.uint8)), (saved, kind, place)


def written_bytes(checkpoint: Path) -> list[int]:
    """Bytes of tensors that each rank's file holds."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    written = dict.fromkeys((f"__{rank}_0.distcp" for rank in range(4)), 0)
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            (chunk,) = [chunk for chunk in entry.chunks if chunk.offsets == index.offset]
            written[place.relative_path] += chunk.sizes.numel() * entry.properties.dtype.itemsize
    return list(written.values())
