"""Ray: a connection, what a run may use of it, and how a command and its workers talk.

capacity     what a cluster has, or may come to have, and what a run takes of it
connection   a connection to Ray, on this machine alone or to a cluster; and its nodes
process      a process of this machine for the one worker of a run, which needs no Ray
board        how far the workers are, what they say, and whether they shall stop
"""

from raylm.cluster.board import Board, SharedBoard, interruption, signals, stopped_by, watch
from raylm.cluster.capacity import Resources, cpus_here, resources, this_machine, workers
from raylm.cluster.connection import (
    DRIVER_ENVIRONMENT,
    ahead,
    alone,
    connect,
    is_local,
    on_nodes,
    other_nodes,
    plan,
)
from raylm.cluster.process import LESS_MEMORY, WORKER_ENVIRONMENT, begin, process

__all__ = [
    "DRIVER_ENVIRONMENT",
    "LESS_MEMORY",
    "WORKER_ENVIRONMENT",
    "Board",
    "Resources",
    "SharedBoard",
    "ahead",
    "alone",
    "begin",
    "connect",
    "cpus_here",
    "interruption",
    "is_local",
    "on_nodes",
    "other_nodes",
    "plan",
    "process",
    "resources",
    "signals",
    "stopped_by",
    "this_machine",
    "watch",
    "workers",
]
