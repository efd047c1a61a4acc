"""Process groups: built once here, passed down everywhere else.

megatron-core keeps its groups in module globals (`parallel_state`); its own classes take a `ProcessGroupCollection`
instead. This file is the only one that touches the globals, to fill such a collection.
"""

import os
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from math import ceil

import torch.distributed as distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from k2_megatron.config.schema import Parallel
from k2_megatron.runtime.devices import Device
from k2_megatron.runtime.launch import RankEnvironment, port_is_free
from k2_megatron.runtime.mistakes import LOST_PEER, RanksDidNotMeet

_OVERDUE_SECONDS = 5.0  # after the time that torch was given to end by itself
_REMEDY = "; start again, and if it is so again look whether every rank was started, and what else uses that port"


@dataclass(frozen=True)
class Groups:
    """The collection megatron-core's classes take, and this rank's coordinates in the layout TP x CP x DP x PP."""

    collection: ProcessGroupCollection
    rank: int
    world_size: int
    tensor_rank: int
    context_rank: int
    data_rank: int
    pipeline_rank: int
    context_size: int
    data_size: int
    pipeline_size: int
    timeout: timedelta | None = None  # of a collective of these groups, and of others that are made beside them

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def name(self) -> str:
        """The rank's place in words, for error messages."""
        return (
            f"rank {self.rank} (tensor {self.tensor_rank}, pipeline {self.pipeline_rank}, "
            f"context {self.context_rank}, data {self.data_rank})"
        )


def connect(environment: RankEnvironment, device: Device, timeout_seconds: float) -> None:
    """Join the world of all ranks. ValueError when the port of the meeting point is taken, RanksDidNotMeet when not all
    are there within `timeout_seconds`."""
    backend, timeout = device.backend, timedelta(seconds=timeout_seconds)
    if environment.launcher == "single":
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    where = f"rank {environment.rank} of {environment.world_size} at {environment.address}:{environment.port}"
    overdue = threading.Timer(timeout_seconds + _OVERDUE_SECONDS, _end_overdue, [where])
    overdue.daemon = True
    overdue.start()
    try:
        _join(environment, backend, timeout)
    except RuntimeError as error:  # of torch and gloo
        raise RanksDidNotMeet(f"{where} did not meet the others ({str(error).splitlines()[0]}){_REMEDY}") from None
    finally:
        overdue.cancel()


def _end_overdue(where: str) -> None:
    """torch waits without a limit for the answer of a program that accepts connections and says nothing."""
    print(f"{where} did not meet the others (no answer){_REMEDY}", file=sys.stderr, flush=True)
    os._exit(LOST_PEER)


def _join(environment: RankEnvironment, backend: str, timeout: timedelta) -> None:
    # torchrun and our own launcher hold the store themselves; under srun rank 0 opens it.
    hosts_store = environment.launcher == "srun" and environment.rank == 0
    if hosts_store and not port_is_free(environment.port):
        raise ValueError(
            f"port {environment.port} on {environment.address} is in use, so the ranks cannot meet there; "
            "set MASTER_PORT to a free port and submit again"
        )
    if environment.launcher == "torchrun":
        distributed.init_process_group(backend, timeout=timeout)
        return
    store = distributed.TCPStore(
        environment.address, environment.port, environment.world_size, hosts_store, timeout, wait_for_workers=False
    )
    distributed.init_process_group(
        backend, store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
    )


def build_groups(parallel: Parallel, timeout_seconds: float | None = None) -> Groups:
    """Divide the world into TP x CP x DP x PP groups (tensor ranks adjacent, pipeline outermost).

    A collective of the world or of a group may take `timeout_seconds`; left out, what `connect` said and 30 minutes.
    """
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    if timeout is not None:
        # torch has no public name for it; init_process_group's own timeout also limits how long the ranks may meet.
        distributed.distributed_c10d._set_pg_timeout(timeout)
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        # Checkpoints gather nothing over gloo in the fully reshardable format, and every gloo group costs threads.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=30 if timeout_seconds is None else ceil(timeout_seconds / 60),
    )
    return Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_size=parallel.context,
        data_size=parallel_state.get_data_parallel_world_size(),
        pipeline_size=parallel.pipeline,
        timeout=timeout,
    )


def disconnect() -> None:
    """Leave the world; safe to call when it was never joined."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()
