"""A model and tasks -> the metrics of each task.

lm-eval makes the requests and computes the metrics, in this process; raylm answers them, on its workers. It reads a
request as it reads a document: behind the model's own prefix. lm-eval puts one there only if the tokenizer does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm import console, generation, tokens
from raylm.cluster import Resources
from raylm.config import Experiment
from raylm.errors import ConfigError
from raylm.tasks import answers
from raylm.tasks.catalog import ChosenTasks
from raylm.tasks.requests import Requests
from raylm.tokenizer import Frame
from raylm.training import ScoreTask, launch

BOOTSTRAP_DRAWS = 1000
"""Of a standard error that has no formula."""

NEW_TOKENS = 256
"""Most tokens of a text, unless the task says how many; lm-eval's own number."""


@dataclass(frozen=True)
class TaskScore:
    """The metrics of a task, or of a group of tasks."""

    name: str
    metrics: dict[str, float]
    """Metric -> value, such as acc; metric/filter for one that lm-eval computes of a filtered answer."""
    errors: dict[str, float]
    """Metric -> its standard error; only of those that have one."""
    documents: int
    shots: int | None
    """Examples in front of each document; None for a group whose tasks differ."""

    def record(self) -> dict[str, Any]:
        """For --json: acc, acc_stderr, ..., documents, shots."""
        errors = {f"{metric}_stderr": error for metric, error in self.errors.items()}
        return {**self.metrics, **errors, "documents": self.documents, "shots": self.shots}


@dataclass(frozen=True)
class Scored:
    """The model whose answers are scored."""

    place: str
    """Its directory, for the workers."""
    directory: Path
    """Its directory on this machine."""
    experiment: Experiment
    encode: Callable[[str], list[int]]
    """A text -> its tokens, with nothing around them."""
    frame: Frame
    context: int
    resources: Resources | None
    """Ray's workers; None for this process."""


def run(chosen: ChosenTasks, model: Scored) -> dict[str, TaskScore]:
    """The metrics of each task and group, by name. DataError if the data of one cannot be loaded."""
    with console.task("Loading the tasks"):
        loaded = chosen.load()
    from lm_eval.evaluator import evaluate  # raylm[tasks], without which none can be chosen

    with _only_messages():
        found = evaluate(_Answering(model), loaded, log_samples=False, bootstrap_iters=BOOTSTRAP_DRAWS)
    counts = {name: each["effective"] for name, each in found["n-samples"].items()}
    for name, group in loaded["groups"].items():
        counts[name] = sum(counts[task.task_name] for task in group.get_all_tasks())
    values = {**found["results"], **found.get("groups", {})}
    return {
        name: _score(name, values[name], counts[name], found["n-shot"].get(name)) for name in counts if name in values
    }


def _score(name: str, values: Mapping[str, Any], documents: int, shots: int | None) -> TaskScore:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        is_error = metric.endswith("_stderr")
        called = metric.removesuffix("_stderr") + ("" if kind == "none" else f"/{kind}")
        (errors if is_error else metrics)[called] = float(value)
    return TaskScore(name, metrics, errors, documents, shots)


@contextlib.contextmanager
def _only_messages() -> Iterator[None]:
    """Keep what lm-eval prints from stdout, which is that of the command's result; and its pool of processes from being
    forked off this one, which has threads."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


class _Answering:
    """What lm-eval asks: an lm_eval.api.model.LM by its methods, one of a single process."""

    rank, world_size, device = 0, 1, "cpu"

    def __init__(self, model: Scored):
        self.model = model

    def loglikelihood(self, asked: Sequence[Any]) -> list[tuple[float, bool]]:
        requests = self._requests()
        for each in asked:
            requests.add_continuation(*each.args)
        return self._scored(requests)

    def loglikelihood_rolling(self, asked: Sequence[Any]) -> list[float]:
        requests = self._requests()
        for each in asked:
            requests.add_text(*each.args)
        return [likelihood for likelihood, _ in self._scored(requests)]

    def generate_until(self, asked: Sequence[Any]) -> list[str]:
        found: dict[int, str] = {}
        numbered = sorted(enumerate(asked), key=lambda pair: json.dumps(pair[1].args[1], sort_keys=True))
        for _, group in itertools.groupby(numbered, key=lambda pair: pair[1].args[1]):
            some = list(group)
            found |= zip((number for number, _ in some), self._texts([each for _, each in some]), strict=True)
        return [found[number] for number in range(len(asked))]

    def _requests(self) -> Requests:
        model = self.model
        return Requests(model.encode, model.frame, model.context, model.experiment.eval.stride)

    def _scored(self, requests: Requests) -> list[tuple[float, bool]]:
        windows = requests.windows()
        work = functools.partial(answers.likelihoods, windows, len(requests.request_of_slot))
        return requests.totals(self._on_workers("Scoring the answers", "tokens", work))

    def _texts(self, asked: Sequence[Any]) -> list[str]:
        """The texts of requests that have the same settings."""
        given = dict(asked[0].args[1])
        stops = given.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        stops = [stop for stop in stops if stop]
        most = [given.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
        given.pop("max_length", None)
        temperature = given.get("temperature") or 0.0
        draws = given.pop("do_sample", temperature > 0)
        if not draws:
            given.pop("temperature", None)
        settings = {
            **given,
            "max_new_tokens": next(filter(None, most), NEW_TOKENS),
            "do_sample": draws,
            "stop_strings": stops or None,
        }
        try:
            resolved = generation.resolve_settings(
                self.model.directory, settings, trusted=self.model.experiment.model.trust_remote_code
            )
        except ConfigError as error:
            raise ConfigError(f"--tasks {asked[0].task_name}: generation_kwargs: {error.message}", "--tasks") from None
        work = functools.partial(answers.texts, [each.args[0] for each in asked], resolved)
        texts = self._on_workers("Generating the answers", "texts", work)
        return [text[: min([len(text), *(at for stop in stops if (at := text.find(stop)) >= 0)])] for text in texts]

    def _on_workers(self, what: str, unit: str, work: Callable[[ScoreTask], Any]) -> Any:
        model = self.model
        task = launch.score_task(model.place, tokens.Encoded(), model.experiment, model.resources, as_given=True)
        with console.task(what, unit) as progress:
            return launch.on_workers(work, task, model.experiment, model.resources, progress)
