"""megatron-core's torch_dist loading with nothing unpickled unrestricted: tables from records, objects weights_only.

Same files, same result as megatron-core's own strategy for folders that hold data alone; it and torch's planner would
unpickle tables and byte objects whatever they call (torch/distributed/checkpoint/default_planner.py, load_bytes).
"""

import io
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from k2_megatron.train.checkpoints.pickles import Tensor, read_tables


class RestrictedLoading(megatron_torch.TorchDistLoadShardedStrategy):
    """A loading strategy for `dist_checkpointing.load`."""

    def load(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> dict:
        """Fill `sharded_state_dict` from a torch_dist folder. CheckpointException, CheckpointingException."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        planner = _Planner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        named, mapping, renamed = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        filled = megatron_torch.mcore_to_pyt_state_dict(named, True)
        torch_checkpoint.load_state_dict(filled, _Reader(checkpoint_dir), planner=planner)
        parts = {key: megatron_torch._unwrap_pyt_sharded_tensor(value) for key, value in filled.items()}
        result = megatron_torch._replace_sharded_keys_with_state_dict_keys(parts, mapping, renamed)
        megatron_torch._restore_dict_types(result, sharded_state_dict)
        return cast(dict, result)


class _Reader(FileSystemReader):
    def read_metadata(self, *_unused, **_unused_too) -> Metadata:
        tables = read_tables(Path(self.path))
        return Metadata(
            state_dict_metadata={
                key: BytesStorageMetadata() if entry is None else _tensor(entry)
                for key, entry in tables.entries.items()
            },
            storage_data={MetadataIndex(*index): _StorageInfo(*place) for index, place in tables.places.items()},
            storage_meta=StorageMeta(load_id=self.load_id),
        )


def _tensor(entry: Tensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, entry.dtype)), torch.Size(entry.shape), chunks)


class _Planner(megatron_torch.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        found = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)
