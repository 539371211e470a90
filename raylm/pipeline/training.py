"""One training, from its tokens to an exported and scored model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm import (
    cluster,
    console,
    corpus,
    cost,
    document_scores,
    estimate,
    export,
    runs,
    summary,
    tokens,
    tracking,
)
from raylm.config import WHOLE_SPLIT, Experiment, dump
from raylm.document_scores import DocumentScores
from raylm.errors import Diverged, OutOfMemory
from raylm.local_worker import is_alone
from raylm.perplexity import Score
from raylm.pipeline import arithmetic, lifecycle, stores
from raylm.plan import Plan, Prepared
from raylm.results import test_split
from raylm.results.compared_run import pace
from raylm.results.test_split import SplitScore, TestScore
from raylm.results.training_progress import TrainingProgress
from raylm.training import TrainTask, callbacks, launch

if TYPE_CHECKING:
    from raylm.cluster import Resources
    from raylm.runs import ActiveRun
    from raylm.tokens import Split
    from raylm.tracking import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished training."""

    run: str
    """The name of the run and of its directory."""
    checkpoint: str
    """The directory of the best model: a plain Hugging Face directory."""
    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    score: float
    """The score of the best model, per token; smaller is better."""
    bits_per_byte: float
    score_low: float | None
    """The lower end of the 95 % interval of the score; None for fewer than six documents."""
    score_high: float | None
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    keyword_score: float | None
    """The score on the tokens of objective.keywords; None without keywords, or if the scored text has none."""
    kept_fraction: float
    """Fraction of the documents that the filters of the corpus kept."""
    prefix: str | None
    """The token in front of every document."""
    unknown_tokens: int
    """Unknown tokens in the validation split."""
    incomparable: str | None
    """Why the score does not compare with others, if it does not."""
    scored_on: str
    """The scored part of the validation split, in words."""
    scored_in: str
    """The arithmetic of the score, such as float32."""
    tokens: int
    """Training tokens."""
    steps: int
    best_step: int
    best_tokens: int
    """Tokens that the best model was trained on."""
    untrained_score: float | None
    """The score of the model before its first step, on the tokens of an evaluation; None in runs of older versions."""
    best_perplexity: float | None
    """The score of the best evaluation, on the documents of evaluations (eval.max_tokens)."""
    last_perplexity: float | None
    """The score of the last evaluation, on the same."""
    resumed_from: int | None
    """The step of the checkpoint that this command resumed from."""
    tokens_per_second: int | None
    """Median speed between two logged steps, as in `raylm compare`; None without two steps."""
    mlflow_run_id: str | None
    tokens_per_parameter: float | None = None
    """The budget in tokens for each parameter of the model."""
    tokens_per_parameter_without_embeddings: float | None = None
    """For each parameter outside of embeddings and output head."""
    weight_decay_timescale: float | None = None
    """Tokens of a batch / (learning rate x weight decay x budget in tokens): the fraction of the run over which weights
    average their updates; None without weight decay, or with optimizers other than AdamW and Muon."""
    training_flops: float | None = None
    """Floating-point operations of the budget."""
    evaluation_seconds: float | None = None
    """Seconds of its evaluations."""
    saving_seconds: float | None = None
    """Seconds of saving its checkpoints."""
    peak_memory_bytes: float | None = None
    """The most memory at a time: of tensors on a GPU, else of the process; of several workers that with the most."""
    mfu: float | None = None
    """Model FLOPs utilization: the fraction of the devices' floating-point operations that training steps used."""
    test: TestScore | None = None
    """The score of the best model on the test split; None if the corpus has none."""
    mlflow_path: str | None = None
    """The path of the run's page, below the address of MLflow."""

    def record(self) -> dict[str, Any]:
        """The result for --json; the key of a score is its name."""
        record = {key: value for key, value in vars(self).items() if key not in ("mlflow_path", "test")}
        if self.test is not None:
            record["test"] = self.test.record()
        measure = record["measure"]
        own = {
            "measure": (measure, record.pop("score")),
            "score_low": (f"{measure}_low", record["score_low"]),
            "score_high": (f"{measure}_high", record["score_high"]),
            "untrained_score": (f"untrained_{measure}", record["untrained_score"]),
            "keyword_score": (f"keyword_{measure}", record["keyword_score"]),
        }
        return dict(own.get(key, (key, value)) for key, value in record.items())

    def _repr_html_(self) -> str:
        return console.as_html(console.key_values({console.label(key): value for key, value in self.record().items()}))


def run(plan: Plan, resume: runs.Resume = "auto") -> TrainResult:
    """Train to the end of the budget, score the best model and export it.

    Resumes the newest unfinished run of the experiment, unless `resume` is never. Interrupted or KeyboardInterrupt if
    the process is asked to stop; the same call then resumes.
    """
    with lifecycle.started(plan.experiment, "train", plan.tokens.fingerprint, resume) as (active, tracked):
        try:
            result = _run(plan, active, tracked)
        except (Diverged, OutOfMemory) as error:
            if error.where not in runs.MUTABLE_ON_RESUME:  # else the run can resume with another value
                active.end({"error": error.message})  # the same settings would fail again
            raise
        active.end(result.record())
        return result


def _run(plan: Plan, active: ActiveRun, tracked: Run) -> TrainResult:
    section = plan.experiment.cluster
    with contextlib.ExitStack() as connection:
        decided = active.decided.get("cluster.cpus_per_worker")
        alone = is_alone(section)
        if alone and stores.exist(plan):
            resources = cluster.resources(section, cluster.this_machine(), decided=decided)
        else:
            resources = connection.enter_context(cluster.connect(section, decided=decided))
            stores.check_nodes(plan.experiment)
        prepared = plan.prepared or plan.with_store(stores.prepare(plan.tokens)[0])
        for warning in prepared.warnings:
            logger.warning(warning)
        sets = stores.prepare_evaluation_sets(plan, prepared.store)
        prepared = arithmetic.settled(prepared, active, resources)
        is_asked = plan.experiment.train.compile == "auto" and "train.compile" not in active.decided
        whole = dataclasses.replace(plan, prepared=prepared)
        expected = estimate.training(whole, prepared.budget, measures=is_asked)
        estimate.say(expected)
        if alone:
            connection.close()  # the worker gets the whole machine
        decided = {
            "cluster.cpus_per_worker": resources.cpus_per_worker,
            "train.compile": active.decided.get("train.compile") or _compile(plan.experiment, expected.seconds),
        }
        experiment = active.settled(prepared.experiment, decided)
        return _train(prepared, experiment, sets, active, tracked, resources)


COMPILE_SECONDS = 300.0
"""A training that takes at least so long is worth compiling: on two CPUs torch.compile saved a tenth of each step of
GPT-2 of 4 x 256 and took 19 s, which is even after 3 minutes. Not measured on a GPU."""


def _compile(experiment: Experiment, expected_seconds: float | None) -> str:
    """The value for train.compile=auto."""
    if experiment.train.arguments.get("fsdp"):  # it would be refused
        return "off"
    return "on" if expected_seconds is not None and expected_seconds >= COMPILE_SECONDS else "off"


def _train(
    prepared: Prepared,
    experiment: Experiment,
    sets: dict[str, str],
    active: ActiveRun,
    tracked: Run,
    resources: Resources,
) -> TrainResult:
    store, budget = prepared.store, prepared.budget
    tracked.log_parameters(summary.parameters(experiment, store))
    summary.log_size(tracked, experiment, store, budget)
    tracked.log_text(dump(experiment), "experiment.yaml")
    summary.log_data(tracked, experiment, store)
    if active.step is not None:
        logger.info(f"{active.directory}: the newest checkpoint is of step {active.step:,} of {budget.steps:,}")
    own = callbacks.load(experiment.train.callbacks)
    task = TrainTask(
        experiment,
        store.path,
        budget,
        tracked,
        active.directory,
        sets=sets,
        callbacks=own,
        is_scored_untrained=True,
    )
    with console.task("Training", "tokens") as advance:
        view = TrainingProgress(advance, budget.tokens, experiment.measure)
        with (
            cluster.handle_signals(logger.info),
            cluster.progress_channel(
                view.show, logger.info, view.report, lambda: tracking.problem_of(tracked) is not None
            ) as channel,
        ):
            outcome = launch.fit(dataclasses.replace(task, channel=channel), resources)
            tracking.wait_until_open(tracked)
            if outcome.stopped or cluster.stop_signal() is not None:  # also after its last check
                raise cluster.interruption(active.directory, f"stopped after step {outcome.step:,}, which is saved")
    best = dict(outcome.best)
    checkpoint = task.checkpoints.path(best["step"])
    exported = export_best(prepared, checkpoint, best, active.directory, resources)
    summary.log_best(tracked, experiment, {**best, **exported.score})
    if exported.test is not None:
        summary.log_test(tracked, exported.test.metrics)
    tracked.set_tags({"raylm.checkpoint": exported.directory})
    tracked.log_model(exported.directory, experiment.tracking, best["step"])
    history = tracked.metric_history()
    keyword_scores = dict(history.get(f"eval/keyword_{experiment.measure}", ()))
    unknown = store.validation.unknown_tokens
    return TrainResult(
        run=active.name,
        checkpoint=exported.directory,
        measure=experiment.measure,
        score=exported.score["perplexity"],
        bits_per_byte=exported.score["bits_per_byte"],
        **document_scores.intervals(exported.scores, "score"),
        keyword_score=exported.keyword_score
        if exported.keyword_score is not None
        else keyword_scores.get(best["step"]),
        kept_fraction=corpus.kept_fraction(store.manifest["ledger"]),
        prefix=summary.prefix(experiment, store),
        unknown_tokens=unknown,
        incomparable=tokens.incomparable(unknown, store.validation.num_tokens),
        scored_on=exported.scored_on,
        scored_in=experiment.eval.precision,
        tokens=outcome.step * budget.batch_tokens,
        steps=outcome.step,
        best_step=best["step"],
        best_tokens=best["tokens"],
        untrained_score=dict(history.get(f"eval/{experiment.measure}", ())).get(0),
        best_perplexity=best.get("perplexity"),
        last_perplexity=outcome.last.get("perplexity"),
        resumed_from=active.step,
        tokens_per_second=pace(active.directory)["tokens_per_second"],
        mlflow_run_id=tracked.run_id,
        **tracked.figures(),
        test=exported.test,
        mlflow_path=tracked.path,
    )


@dataclass(frozen=True)
class Exported:
    """The best model of a run or sweep."""

    directory: str
    score: dict[str, float]
    """perplexity and bits_per_byte."""
    scored_on: str
    """The scored part of the validation split, in words."""
    keyword_score: float | None = None
    """The score on the tokens of keywords, if the model was scored again."""
    scores: DocumentScores | None = None
    """The score of each document, if they were kept."""
    test: TestScore | None = None
    """The score on the test split; None if the corpus has none."""


def export_best(
    prepared: Prepared, checkpoint: str, best: Mapping[str, Any], directory: str, resources: Resources
) -> Exported:
    """The model of a checkpoint as a plain Hugging Face directory, `directory`/model, with its score on the whole
    validation split if that is affordable, else the score of its evaluation; and with its score on the test split."""
    experiment, store = prepared.experiment, prepared.store
    run, step = _run_and_step(checkpoint)
    found = SplitScore(
        best["perplexity"], best["bits_per_byte"], experiment.eval.scored_on, document_scores.read(run, step)
    )
    keyword_score = None
    if experiment.eval.max_tokens is not None and cost.whole_is_affordable(
        experiment, store, prepared.budget, store.validation
    ):
        with console.task("Scoring the best model on the whole validation split", "tokens") as advance:
            rows = launch.score(checkpoint, store.validation, experiment, resources, advance)
        found, scored = SplitScore.of(rows, store.validation, WHOLE_SPLIT), Score.of(rows)
        document_scores.write(directory, "whole", DocumentScores.of(rows, store.validation))
        keyword_score = scored.keyword_perplexity if scored.keyword_tokens else None
    test = None
    if store.test is not None:
        test = test_split.read(run, step) or _score_test(prepared, store.test, checkpoint, found, resources)
    score = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    record = {**score, "scored_on": found.scored_on, **({} if test is None else {"test": test.record()})}
    target = export.export(checkpoint, f"{directory}/model", record)
    return Exported(target, score, found.scored_on, keyword_score, found.documents, test)


def _score_test(
    prepared: Prepared, split: Split, checkpoint: str, validation: SplitScore, resources: Resources
) -> TestScore | None:
    """The score of a model on the test split, which is kept, so that a resumed command does not score it again; None if
    it is not finite."""
    experiment = prepared.experiment
    limit = cost.test_limit(experiment, prepared.store, prepared.budget, split)
    with console.task("Scoring the best model on the test split", "tokens") as advance:
        rows = launch.score(checkpoint, split, experiment, resources, advance, max_tokens=limit)
    scored_on = "the test split" if len(rows) == len(split) else f"the first {limit:,} tokens of the test split"
    found = SplitScore.of(rows, split, scored_on)
    if not math.isfinite(found.perplexity):
        logger.warning(f"{checkpoint}: the likelihood of the test split is not a finite number")
        return None
    num_tokens = split.scored_tokens(len(rows))
    score = TestScore.of(found, validation, measure=experiment.measure, num_tokens=num_tokens, corpus=experiment.corpus)
    test_split.write(*_run_and_step(checkpoint), score, found.documents)
    return score


def _run_and_step(checkpoint: str) -> tuple[str, int]:
    """The directory of the run that has a checkpoint, and the checkpoint's step."""
    checkpoints, _, name = checkpoint.rpartition("/")
    return checkpoints.rpartition("/")[0], int(name.removeprefix("step_"))
