"""Ray: a connection, what a run may use of it, and how a command and its workers talk.

address      which cluster a command uses, whether it is there, and the token that it asks for
output       what Ray says on its own, in a file instead of on the terminal
capacity     what a cluster has, or may come to have, and what a run takes of it
connection   a connection to Ray, on this machine alone or to a cluster; and its nodes
process      a process of this machine for the one worker of a run, which needs no Ray
board        how far the workers are, what they say, and whether they shall stop
"""

from raylm.cluster.address import Address, address_of, has_token, is_local, no_token, show_token, token_source
from raylm.cluster.board import Board, SharedBoard, interruption, signals, stopped_by, watch
from raylm.cluster.capacity import Resources, cpus_here, resources, this_machine, workers
from raylm.cluster.connection import (
    DRIVER_ENVIRONMENT,
    ahead,
    alone,
    check_reachable,
    connect,
    on_nodes,
    other_nodes,
    plan,
)
from raylm.cluster.process import LESS_MEMORY, MAY_PASS, WORKER_ENVIRONMENT, begin, process

__all__ = [
    "DRIVER_ENVIRONMENT",
    "LESS_MEMORY",
    "MAY_PASS",
    "WORKER_ENVIRONMENT",
    "Address",
    "Board",
    "Resources",
    "SharedBoard",
    "address_of",
    "ahead",
    "alone",
    "begin",
    "check_reachable",
    "connect",
    "cpus_here",
    "has_token",
    "interruption",
    "is_local",
    "no_token",
    "on_nodes",
    "other_nodes",
    "plan",
    "process",
    "resources",
    "show_token",
    "signals",
    "stopped_by",
    "this_machine",
    "token_source",
    "watch",
    "workers",
]
