"""Files of torch's formats that are written without torch: torch finds in them what it would have written itself."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo

from k2_megatron.convert.torch_metadata import Chunk, Stored, Tensor, read_metadata, write_metadata

LONG = 1 << 33  # positions beyond 4 GB
STORED = Stored(
    {
        "layers.ä": Tensor(
            "bfloat16",
            (2, 3, 4),
            (Chunk((0, 0, 0), (1, 3, 4), "__0.distcp", 0, 24), Chunk((1, 0, 0), (1, 3, 4), "a", LONG, 24)),
        ),
        "norm": Tensor("float32", (300,), (Chunk((0,), (300,), "a", 255, 1200),)),
    },
    {"extra/shard_0_1": Chunk((), (), "a", 65536, 300)},
)


def test_tables_are_those_that_torch_would_write(tmp_path: Path) -> None:
    write_metadata(tmp_path, STORED)
    wanted = records.Metadata(state_dict_metadata={}, planner_data=None, storage_data={})
    for key, tensor in STORED.tensors.items():
        chunks = [records.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        properties = records.TensorProperties(dtype=getattr(torch, tensor.dtype))
        wanted.state_dict_metadata[key] = records.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = records.MetadataIndex(key, torch.Size(chunk.offsets), number)
            wanted.storage_data[index] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    for key, chunk in STORED.objects.items():
        wanted.state_dict_metadata[key] = records.BytesStorageMetadata()
        wanted.storage_data[records.MetadataIndex(key)] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert found == wanted
    sizes = [size for tensor in found.state_dict_metadata.values() if hasattr(tensor, "size") for size in [tensor.size]]
    assert {type(size) for size in sizes} == {torch.Size}  # which equals a tuple
    numbers = {(index.fqn, index.index): index.offset for index in found.storage_data}
    assert numbers == {(index.fqn, index.index): index.offset for index in wanted.storage_data}
    assert read_metadata(tmp_path) == STORED
