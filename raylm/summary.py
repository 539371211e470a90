"""What a run of an experiment logs to MLflow: the same for a training, a sweep and each of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raylm import model, perplexity, tracking
from raylm.budget import Budget
from raylm.config import WHOLE_SPLIT, Experiment, TrainConfig, get
from raylm.tokens import Store, incomparable
from raylm.tracking import PARAMETERS_TAG, PASSES_TAG, TOKENS_TAG, Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


LOGGED = (
    "blocks.block_size",
    "blocks.packing",
    "objective.kind",
    "train.learning_rate",
    "train.warmup_steps",
    "train.weight_decay",
    "train.lr_scheduler_type",
    "train.batch_tokens",
    "train.seed",
    "train.data_seed",
    "train.precision",
    "cluster.num_workers",
)
"""Settings that become parameters of every MLflow run, and rows of every model card, if they are given. The runs of a
sweep have the swept settings too."""


def start(experiment: Experiment, directory: str, name: str, verb: str, *, waits: bool = True) -> Run:
    """Start the MLflow run of a run's directory, or resume the one that it has; `waits` as in tracking.start."""
    return tracking.start(
        experiment.tracking,
        experiment=experiment.name,
        name=name,
        tags={"raylm.command": verb},
        directory=directory,
        metric=f"best/eval_{experiment.measure}",
        waits=waits,
    )


def parameters(experiment: Experiment, store: Store) -> dict[str, Any]:
    """The parameters of an MLflow run: the same keys for every run of an experiment."""
    settings = {key: get(experiment, key) for key in LOGGED}
    return {
        **{key: value for key, value in settings.items() if value is not None},
        "model": experiment.model.path or _model_config(experiment, store).model_type,
        "store": store.fingerprint,
        "prefix": prefix(experiment, store),
        "scored_in": experiment.eval.precision,
        **scored(experiment, store),
        "unknown_tokens": store.validation.unknown_tokens,
    }


def log_size(run: Run, experiment: Experiment, store: Store, budget: Budget) -> None:
    """Log what follows from the settings: the model's parameters, the training tokens and steps of the budget, of a
    mixture how often each source is repeated, and what the settings mean.

    Counts are tags, because MLflow compares runs by the parameters that differ. What settings mean is to be compared.
    """
    counts = model.parameters(_model_config(experiment, store), masked=experiment.objective.is_masked)
    passes = {f"{PASSES_TAG}{name}": f"{number:.3g}" for name, number in budget.passes_over.items()}
    run.set_tags({PARAMETERS_TAG: counts.all, TOKENS_TAG: budget.tokens, "raylm.steps": budget.steps, **passes})
    run.log_parameters({name: f"{value:.4g}" for name, value in _meaning(experiment, store, budget, counts).items()})


def _meaning(experiment: Experiment, store: Store, budget: Budget, counts: model.Parameters) -> dict[str, float]:
    """What the settings of a run mean, by figures that compare with those of runs of other sizes (tracking.MEANING).

    Training tokens of the budget for each parameter, of all and of those outside embeddings and head; the
    floating-point operations of the budget; and the timescale of weight decay, if there is some and the optimizer
    decouples it from the gradient, as AdamW and Muon do.
    """
    section = experiment.train
    a_token = model.flops_of_experiment(experiment, _model_config(experiment, store), counts)
    found = {
        "tokens_per_parameter": budget.tokens / counts.all,
        "tokens_per_parameter_without_embeddings": budget.tokens / counts.without_embeddings,
        "training_flops": float(a_token * budget.tokens),
    }
    if section.weight_decay and (section.optimizer == "muon" or "adamw" in section.optimizer):
        found["weight_decay_timescale"] = timescale(section, budget)
    return found


def timescale(section: TrainConfig, budget: Budget) -> float:
    """The timescale of weight decay, B / (eta lambda D): tokens of a batch over peak learning rate, weight decay and
    tokens of the budget.

    The weights of AdamW and Muon are a moving average of their updates over about this fraction of the run (Wang and
    Aitchison 2024, arXiv:2405.13698, with a run of one epoch). Far above 1 weight decay does nothing; the best value
    falls with the tokens for each parameter (Bergsma et al. 2025, arXiv:2505.13738).
    """
    return section.batch_tokens / (section.learning_rate * section.weight_decay * budget.tokens)


def _model_config(experiment: Experiment, store: Store) -> PreTrainedConfig:
    return model.config_of(experiment, tokenizer=store.tokenizer)


def log_comparison(run: Run, experiment: Experiment, swept: Sequence[str]) -> None:
    """Log that MLflow's page of a sweep compares the trials by the score that ranks them and the swept settings."""
    ranked_by = experiment.tune.ranked_by
    name = experiment.measure if ranked_by == "perplexity" else ranked_by
    run.log_comparison(score=f"best/eval_{name}", history=f"eval/{name}", settings=swept)
    run.describe(f"[Compare the trials]({tracking.COMPARISON})")


def prefix(experiment: Experiment, store: Store) -> str | None:
    """The token in front of every document, in training and when it is scored."""
    token = store.frame(experiment.tokenizer.prefix).prefix
    return None if token is None else store.tokenizer.convert_ids_to_tokens(token)


def scored(experiment: Experiment, store: Store) -> dict[str, Any]:
    """What an evaluation during training scores, and the number of its documents and tokens."""
    split = store.validation
    documents = perplexity.first_documents(split, experiment.eval.max_tokens)
    return {
        "scored_on": WHOLE_SPLIT if documents == len(split) else experiment.eval.scored_on,
        "scored_documents": documents,
        "scored_tokens": split.scored_tokens(documents),
    }


def log_data(run: Run, experiment: Experiment, store: Store) -> None:
    """Log the splits of the token store as data sets, and a tag if scores on them do not compare with others."""
    if (why := incomparable(store.validation.unknown_tokens, store.validation.num_tokens)) is not None:
        run.set_tags({"raylm.incomparable": why})
    contexts = {"train": "training"}  # as MLflow calls it
    for split in store.splits:
        profile = store.counts(split)
        name, context = f"{experiment.name} {split}", contexts.get(split, split)
        run.log_dataset(name, digest=store.fingerprint, source=store.path, profile=profile, context=context)


def log_best(run: Run, experiment: Experiment, best: Mapping[str, Any]) -> None:
    """Log the scores of the best model, at step 0: at any other step MLflow shows a dot, not a bar."""
    run.log_metrics(best_metrics(experiment.measure, best), 0)


def log_test(run: Run, metrics: Mapping[str, float]) -> None:
    """Log the metrics of the best model on the test split, at step 0 as of `log_best`, to a run that may have ended."""
    run.log_metrics(metrics, 0)
    run.flush()


def best_metrics(measure: str, best: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the best evaluation, by which runs are compared."""
    return _scores("best", measure, best)


def cooldown_metrics(measure: str, score: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a cooldown's evaluation."""
    return _scores("cooldown", measure, score)


def _scores(of: str, measure: str, score: Mapping[str, Any]) -> dict[str, float]:
    names = {"perplexity": measure, "bits_per_byte": "bits_per_byte", "weighted_nll": "weighted_nll"}
    return {f"{of}/eval_{name}": score[key] for key, name in names.items() if score.get(key) is not None}
