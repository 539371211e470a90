"""torch.distributed among the workers of Ray Train, whose controller needs no PyTorch for it.

Ray's own TorchConfig (2.60) imports PyTorch in the controller: 2 s. And it leaves the imports of the workers to the
moment in which they load the training function: 10 s in which nothing of Ray Train notices that a worker is killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

from raylm import console, timeline
from raylm.local_worker import TRAINER

CLOSING_SECONDS = 30.0
"""How long workers may take to leave their process group; that of Ray's TorchConfig."""


def load_training() -> None:
    """Import what a worker needs for a training."""
    timeline.start("worker")
    with timeline.phase("import what a training needs"), console.importing():
        importlib.import_module(TRAINER)
        importlib.import_module("ray.train.torch")
        gc.freeze()  # as in local_worker.serve


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The settings of torch.distributed.init_process_group, as in TorchConfig."""

    timeout_s: float
    backend: str | None = None
    """nccl or gloo, by TorchTrainer."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup

    @property
    def train_func_context(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return _on_own_device


class _ProcessGroup(Backend):
    """The process group of a worker group, from the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroupConfig)
        worker_group.execute(load_training)
        address, port = worker_group.execute_single(0, _address_and_port)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, address, port, rank, size, backend_config)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=CLOSING_SECONDS)


def _address_and_port() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _join(address: str, port: int, rank: int, world_size: int, config: ProcessGroupConfig) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    if (interface := _interface(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    _set_torch_distributed_env_vars()
    with timeline.phase("join the process group"):
        _setup_torch_process_group(config.backend, rank, world_size, "env://", config.timeout_s)


def _interface(address: str) -> str | None:
    """The network interface with this address of the node, by which other nodes reach it.

    Gloo takes the one that the host's own name resolves to. On Debian that is 127.0.1.1, where no other node gets.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            return name
    return None


def _leave(destroys_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroys_group)


@contextlib.contextmanager
def _on_own_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield
