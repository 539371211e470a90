"""raylm from Python.

    from raylm import api

    experiment = api.load("sweep.yaml", train={"max_tokens": 1_000_000})
    result = api.tune(experiment)
    result.best.checkpoint, result.to_pandas()

Each function does what the command of its name does, and returns a typed result. What a user can cause is raised as an
error of raylm.errors. Messages go to the logger "raylm"; `show_messages` shows them, as commands do. Ray is started on
this machine, or used as it is if the program has initialised it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import config
from raylm.config import Experiment
from raylm.console import show_messages

if TYPE_CHECKING:  # a program that only loads an experiment waits for neither torch nor Ray
    from raylm.pipeline.evaluation import Evaluation
    from raylm.pipeline.sweep import SweepResult
    from raylm.pipeline.training import TrainResult
    from raylm.results.compare import Comparison
    from raylm.results.inspection import Inspection
    from raylm.results.sweep import SweepResults
    from raylm.runs import Resume
    from raylm.scaling.result import Scaling
    from raylm.tokens import Store

__all__ = [
    "Experiment",
    "compare",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "open_store",
    "open_sweep",
    "prepare",
    "scale",
    "show_messages",
    "train",
    "tune",
]

Source = str | os.PathLike | Mapping[str, Any] | None


def load(source: Source = None, /, **overrides: Any) -> Experiment:
    """The experiment of a YAML file or of a mapping, with sections or dotted settings on top.

    `load("own.yaml", train={"learning_rate": 1e-3})` or `load("own.yaml", **{"train.learning_rate": 1e-3})`. Without a
    source but with text of one's own, `load(corpus={"paths": "notes/"})`, all other sizes follow from the text; without
    either it is the built-in example. ConfigError names every setting that is wrong.
    """
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        inner = value.items() if isinstance(value, Mapping) and key in Experiment.model_fields else None
        flat |= {f"{key}.{name}": each for name, each in inner} if inner is not None else {key: value}
    return config.load(_plain(source), {key: _plain(value) for key, value in flat.items()})


def prepare(experiment: Experiment) -> Store:
    """The token store of the experiment's corpus, written unless it exists; DataError if no document is left."""
    from raylm import plan
    from raylm.pipeline import stores

    return stores.open_or_prepare(plan.resolve_tokens(experiment))[0]


def inspect(experiment: Experiment, examples: int = 2) -> Inspection:
    """The data as a model will see it: documents, tokens, blocks, a batch."""
    from raylm import plan
    from raylm.pipeline import stores
    from raylm.results import inspection

    resolved = plan.resolve_tokens(experiment)
    store, _ = stores.open_or_prepare(resolved)
    return inspection.Inspection(inspection.inspect(resolved.experiment, store, examples))


def train(experiment: Experiment, *, resume: Resume = "auto") -> TrainResult:
    """Train one model. Resumes an unfinished run of the same settings unless `resume` is "never"; "must" fails if there
    is none. TrainingError if it cannot be trained, KeyboardInterrupt after a checkpoint if it is interrupted."""
    from raylm import plan
    from raylm.pipeline import training

    return training.run(plan.resolve(experiment, starts="train"), resume)


def tune(experiment: Experiment, *, resume: Resume = "auto") -> SweepResult:
    """Sweep the settings of tune.space, and rank the trials on the same validation tokens. Errors as of `train`."""
    from raylm.pipeline import sweep

    return sweep.run(sweep.resolve(experiment, starts=True), resume)


def evaluate(
    model: str | os.PathLike,
    text: str | os.PathLike | Sequence[str | os.PathLike] = (),
    *,
    tasks: str | Sequence[str] = (),
    **overrides: Any,
) -> Evaluation:
    """The score of a run's or sweep's model, a checkpoint or any Hugging Face model on files, directories or globs of
    text; without text, on the validation split that it was trained with. `tasks` are names that lm-evaluation-harness
    knows, and paths of task files: their metrics are `tasks` of the result. `overrides` as of `load`."""
    from raylm import checkpoint
    from raylm.pipeline import evaluated_model, evaluation

    place, directory = evaluated_model.locate(os.fspath(model))
    own = evaluation.settings_of(directory, None)
    paths = [text] if isinstance(text, str | os.PathLike) else text
    experiment = config.load(checkpoint.experiment_file(directory), own)
    experiment = config.override(experiment, {key: _plain(value) for key, value in overrides.items()})
    asked = [tasks] if isinstance(tasks, str) else tasks
    plan = evaluation.resolve(place, directory, experiment, [os.fspath(path) for path in paths], asked)
    return evaluation.run(plan)


def generate(
    model: str | os.PathLike, prompts: str | Sequence[str], *, seed: int = 0, batch_size: int = 16, **settings: Any
) -> list[str]:
    """The text of each prompt, which begins with it. `settings` are fields of transformers' GenerationConfig, such as
    max_new_tokens; a masked model fills its mask tokens."""
    from raylm import generation

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    typed = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    plan = generation.resolve(os.fspath(model), typed, texts, batch_size=batch_size, seed=seed)
    return generation.texts(plan)


def compare(*runs: str | os.PathLike, where: bool = False, keywords: Sequence[str] = ()) -> Comparison:
    """Two or more trainings, trials, sweeps, models or files of evaluations side by side: which is better, whether that
    is real, and what of them cannot be compared. `where`, of two: in which parts of the text they differ, and on these
    keywords; both models are scored again."""
    from raylm.results import compare

    comparison = compare.compare([os.fspath(run) for run in runs])
    if not where:
        return comparison
    from raylm.pipeline.where import explain

    return explain(comparison, keywords)


def scale(
    *sweeps: str | os.PathLike,
    to: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    flops_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> Scaling:
    """The law of size and training tokens that the trials of sweeps follow; with `to`, dotted settings over those of
    the largest trial, and `tokens`, what a training with them will score and cost. DataError if the trials are too few
    for a law, or if it does not predict the largest one without having seen it."""
    from raylm.results import runs, sweep
    from raylm.scaling import prediction, result

    found = [sweep.read(runs.find_sweep(os.fspath(each))) for each in sweeps]
    request = prediction.request(
        {key: _plain(value) for key, value in (to or {}).items()}, tokens, flops_per_second, price_per_hour
    )
    return result.scale(found, request)


def open_store(path: str | os.PathLike) -> Store:
    """A token store by its directory. DataError if it is damaged or missing."""
    from raylm import tokens

    return tokens.open_store(os.fspath(path))


def open_sweep(directory: str | os.PathLike) -> SweepResults:
    """A sweep read back from its directory, whatever its state. StorageError if it is none."""
    from raylm.results import sweep

    return sweep.read(os.fspath(directory))


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths as text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
