"""Ray: a connection, what a run may use of it, and how a command and its workers talk.

capacity     what a cluster has, or may come to have, and what a run takes of it
connection   a connection to Ray, on this machine alone or to a cluster; and its nodes
board        how far the workers are, what they say, and whether they shall stop
"""

from raylm.cluster.board import Board, interruption, signals, stopped_by, watch
from raylm.cluster.capacity import Resources, cpus_here, resources, workers
from raylm.cluster.connection import (
    DRIVER_ENVIRONMENT,
    WORKER_ENVIRONMENT,
    ahead,
    connect,
    is_local,
    loaded,
    on_nodes,
    other_nodes,
    plan,
)

__all__ = [
    "DRIVER_ENVIRONMENT",
    "WORKER_ENVIRONMENT",
    "Board",
    "Resources",
    "ahead",
    "connect",
    "cpus_here",
    "interruption",
    "is_local",
    "loaded",
    "on_nodes",
    "other_nodes",
    "plan",
    "resources",
    "signals",
    "stopped_by",
    "watch",
    "workers",
]
