"""Ray: a connection, the resources of a run, and the communication of a command with its workers.

address        whether the cluster that a command uses answers, and its token
output         Ray's own output, in a file instead of on the terminal
capacity       the resources of a cluster, with autoscaling, and of a run
process_group  torch.distributed among the workers of Ray Train
connection     a connection to Ray, on this machine alone or to a cluster; and its nodes
progress       the progress of the workers, their messages, and requests to stop
submission     a command as a job of a cluster, by its dashboard

The names of `connection` are imported when they are first used: Ray takes 0.5 s, and a lone worker whose tokens are
ready has its first step without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raylm.cluster.capacity import Resources, amount_of, cpus_here, planned_resources, resources, this_machine
from raylm.cluster.progress import (
    ProgressChannel,
    handle_signals,
    interruption,
    progress_channel,
    stop_signal,
)

if TYPE_CHECKING:
    from raylm.cluster.connection import (
        DRIVER_ENVIRONMENT,
        check_reachable,
        connect,
        on_a_worker,
        on_nodes,
        other_nodes,
        start_ray_early,
    )

__all__ = [
    "DRIVER_ENVIRONMENT",
    "ProgressChannel",
    "Resources",
    "amount_of",
    "check_reachable",
    "connect",
    "cpus_here",
    "handle_signals",
    "interruption",
    "on_a_worker",
    "on_nodes",
    "other_nodes",
    "planned_resources",
    "progress_channel",
    "resources",
    "start_ray_early",
    "stop_signal",
    "this_machine",
]

_LATER = (
    "DRIVER_ENVIRONMENT",
    "check_reachable",
    "connect",
    "on_a_worker",
    "on_nodes",
    "other_nodes",
    "start_ray_early",
)
"""The names of `connection`, which is imported when one is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.connection"), name)
