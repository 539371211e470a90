"""train.callbacks: classes of transformers.TrainerCallback of the user's own, by dotted name."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from collections.abc import Iterable

import cloudpickle
from transformers import TrainerCallback

from raylm.errors import ConfigError


def load(names: Iterable[str]) -> tuple[type[TrainerCallback], ...]:
    """The classes, looked up in the working directory and in what is installed; ConfigError naming the one that fails.

    A class whose package is not installed is pickled by value, so workers on other nodes need no copy of its file.
    """
    return tuple(map(_load, names))


def _load(name: str) -> type[TrainerCallback]:
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script has its own directory there instead
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # of the user's module, too
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"train.callbacks: {name} cannot be imported: {why}", "train.callbacks") from error
    if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
        raise ConfigError(
            f"train.callbacks: {name} must be a subclass of transformers.TrainerCallback, got {found!r}",
            "train.callbacks",
        )
    package = sys.modules[found.__module__.partition(".")[0]]
    installed = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    if not str(getattr(package, "__file__", None) or "").startswith(installed):
        from ray import cloudpickle as of_ray  # a copy with a list of its own; 0.5 s if nothing has imported Ray

        cloudpickle.register_pickle_by_value(package)  # for a local_worker
        of_ray.register_pickle_by_value(package)
    return found
