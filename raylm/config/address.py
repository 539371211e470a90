"""The cluster that a command uses, as the settings or the environment name it."""

from __future__ import annotations

import os
from typing import NamedTuple

from raylm.config.sections import ClusterConfig


class Address(NamedTuple):
    """A cluster's address as given, and the setting or variable that gave it."""

    value: str
    setting: str

    def __str__(self) -> str:
        return f"{self.setting}={self.value}"


def address_of(section: ClusterConfig) -> Address | None:
    """The cluster that a command uses; None if it starts Ray on this machine."""
    named = (("cluster.address", section.address), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS")))
    for setting, value in named:
        if value:
            return None if value == "local" else Address(value, setting)
    return None


def is_local(section: ClusterConfig) -> bool:
    """Whether a command starts Ray on this machine."""
    return address_of(section) is None
