"""Documents of a corpus -> their texts, by workers of Ray Data.

Batches are cut by the files alone: any number of workers gives the same texts.
"""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from raylm.config import CorpusConfig
from raylm.corpus import Ledger, Shard, documents
from raylm.errors import ConfigError, RaylmError, TrainingError, first_line
from raylm.generation.text_generator import TextGenerator
from raylm.tokens import set_up_ray_data

if TYPE_CHECKING:
    from raylm.cluster import Resources


class GeneratedText(NamedTuple):
    """A document as a prompt, and its text."""

    prompt: str
    text: str
    tokens: int
    hash: int
    """The `hash` of corpus.Document."""
    source: int
    """The entry of corpus.paths that the document is from."""


class _Worker:
    """An actor that generates texts for batches with one model."""

    def __init__(self, load: Callable[[], TextGenerator]):
        self._load = load

    @cached_property
    def _generator(self) -> TextGenerator:
        return self._load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = pickle.loads(row["batch"])
        # A user's error is returned as a value, because Ray would wrap it in a traceback.
        try:
            texts = self._generator.texts([document.prompt for document in batch])
        except RaylmError as error:
            return {"texts": pickle.dumps(error)}
        except torch.OutOfMemoryError as error:
            problem = f"--batch-size is more than the GPU's memory holds: {first_line(error)}"
            return {"texts": pickle.dumps(ConfigError(problem, "--batch-size"))}
        each = zip(batch, texts, strict=True)
        generated = [GeneratedText(document.prompt, *text, document.hash, document.source) for document, text in each]
        return {"texts": pickle.dumps(generated)}


def generate_texts(
    plan: list[Shard],
    corpus: CorpusConfig,
    load: Callable[[], TextGenerator],
    *,
    batch_size: int,
    resources: Resources,
    max_failures: int,
) -> Iterator[list[GeneratedText]]:
    """The texts of the kept documents of shards, in order, a batch at a time; Ray must be connected.

    A few batches for each worker are in memory, however many documents there are.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    shards = [{"shard": pickle.dumps(shard)} for shard in plan]
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards))
    set_up_ray_data(dataset.context)
    # Each row is a batch and a block of its own, or one worker would get all batches of a file.
    dataset.context.target_max_block_size = 1

    def read(items: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rows = documents(pickle.loads(items["shard"][0]), corpus, Ledger())
        while batch := list(itertools.islice(rows, batch_size)):
            yield {"batch": [pickle.dumps(batch)]}

    batches = dataset.map_batches(
        read,
        batch_size=1,
        # Workers may take every CPU, and a reading task that needed one would wait for ever.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=1),
    )
    with warnings.catch_warnings():
        # Without these two, a worker that dies of a batch is restarted for ever. Ray 2.64 will have another option.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        generated = batches.map(
            _Worker,
            fn_constructor_args=(load,),
            **resources.options,
            max_restarts=max_failures,
            max_task_retries=max_failures,
            compute=ray.data.ActorPoolStrategy(
                min_size=resources.num_workers, max_size=resources.most_workers, max_tasks_in_flight_per_actor=2
            ),
        )
    try:
        for row in generated.iter_rows():
            texts = pickle.loads(row["texts"])
            if isinstance(texts, RaylmError):
                raise texts
            yield texts
    except ray.exceptions.RayActorError as error:
        raise TrainingError(
            f"a worker died {max_failures + 1} times, probably because of too little memory: lower --batch-size, or "
            "cluster.num_workers for fewer on a machine",
            "cluster.num_workers",
        ) from error
