"""Names and paths of tasks -> those that lm-eval knows, and those of one's own files."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from raylm import console
from raylm.errors import ConfigError, DataError, first_line, first_of

MOST_NAMES = 5
"""Most names that an error suggests."""


@dataclass(frozen=True)
class ChosenTasks:
    """Tasks and groups of tasks that were asked for; their data is not loaded yet."""

    names: tuple[str, ...]
    manager: Any
    """lm-eval's TaskManager, which knows them."""

    def load(self) -> dict[str, dict[str, Any]]:
        """The tasks with their data, and the groups, by name, as lm-eval's `evaluate` takes them; DataError if one
        cannot be loaded."""
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells each default of a task file
        _seed()
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
        for name in self.names:
            try:
                found = self.manager.load([name])
            except Exception as error:  # of the network, of datasets, of a task's own code
                file = getattr(self.manager.task_index.get(name), "yaml_path", None)
                raise DataError(
                    f"--tasks {name}{f' ({file})' if file else ''}: it cannot be loaded: {type(error).__name__}: "
                    f"{first_line(error)}",
                    "--tasks",
                ) from error
            for kind in loaded:
                loaded[kind] |= found.get(kind, {})
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"--tasks {task.task_name}: it runs code that the model has written; use lm-eval itself, where "
                    "nothing can be harmed",
                    "--tasks",
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded


FEWSHOT_SEED, RANDOM_SEED = 1234, 0
"""lm-eval's own seeds, by which its examples are chosen."""


def _seed() -> None:
    """Seed everything by which a task may choose its examples, as lm-eval does."""
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)


def choose(given: Sequence[str]) -> ChosenTasks:
    """The tasks of names that lm-eval knows, and of paths: a directory of task files, or one such file. Several stand
    between commas. ConfigError if one is unknown, or if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval: pip install raylm[tasks]", "--tasks")
    from lm_eval.tasks import TaskManager

    items = [name.strip() for each in given for name in each.split(",") if name.strip()]
    if not items:
        raise ConfigError("--tasks: give names of tasks of lm-eval, or paths of task files, between commas", "--tasks")
    paths = {item: _path(item) for item in items if _is_path(item)}
    folders = {path if path.is_dir() else path.parent for path in paths.values()}
    knows_all = len(paths) < len(items)
    if knows_all:  # 14,683 names in lm-eval 0.4.13, 10 s
        with console.task("Reading the names of tasks"):
            manager = TaskManager(include_path=sorted(folders))
    else:
        manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    names: list[str] = []
    for item in items:
        if item in paths:
            names += _names_in(paths[item], manager, item)
        elif item in manager.task_index:
            names.append(item)
        else:
            raise ConfigError(f"--tasks {item}: lm-eval knows no such task; {_nearest(item, manager)}", "--tasks")
    return ChosenTasks(tuple(dict.fromkeys(names)), manager)


def _is_path(item: str) -> bool:
    return "/" in item or item.endswith(".yaml")


def _path(item: str) -> Path:
    path = Path(item).expanduser().resolve()
    if not path.exists():
        raise ConfigError(f"--tasks {item}: there is no such file or directory", "--tasks")
    _check_yaml(path, item)
    return path


def _check_yaml(path: Path, item: str) -> None:
    """ConfigError if a file is no YAML: lm-eval would leave it out without a word."""
    for file in sorted(path.rglob("*.yaml")) if path.is_dir() else [path]:
        try:
            yaml.compose(file.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or first_line(error)
            raise ConfigError(f"--tasks {item}: {file}{line} is no YAML: {problem}", "--tasks") from None


def _names_in(path: Path, manager: Any, item: str) -> list[str]:
    """The tasks and groups of a file, or of a directory, in the order of their files; those inside a group are the
    group's."""
    own = {
        name: entry
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and path in (entry.yaml_path.resolve(), *entry.yaml_path.resolve().parents)
    }
    if (
        not own
        and path.is_file()
        and (found := re.search(r"^task:\s*(\S+)\s*$", path.read_text("utf-8"), re.MULTILINE))
    ):
        other = getattr(manager.task_index.get(found[1]), "yaml_path", None)
        raise ConfigError(
            f"--tasks {item}: its task {found[1]} has the name of that in {other}; rename one of both", "--tasks"
        )
    if not own:
        what = "there is none in it" if path.is_dir() else "it is none"
        raise ConfigError(
            f"--tasks {item}: a task of lm-eval is a file *.yaml with the field task or group; {what}", "--tasks"
        )
    inside = {name for entry in own.values() for name in _members((entry.cfg or {}).get("task"))}
    return [name for name in own if name not in inside]


def _members(given: Any) -> list[str]:
    """The names in the field task: that of a task, or those of a group."""
    if isinstance(given, str):
        return []
    return [each if isinstance(each, str) else each.get("task") or each.get("group") for each in given or ()]


def _nearest(name: str, manager: Any) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=MOST_NAMES)
    near += [known for known in manager.all_tasks if name in known and known not in near]
    if near:
        return f"did you mean {first_of(near, MOST_NAMES)}?"
    return "`lm-eval ls tasks` lists them; a path has a / in it, or ends with .yaml"
