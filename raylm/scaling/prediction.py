"""What the law says of a training that has not been run: its score, its settings, its cost, and the command."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylm import config, console, storage
from raylm.budget import FEW_PASSES
from raylm.config import Experiment
from raylm.errors import ConfigError, DataError
from raylm.results.compared_run import pace
from raylm.results.sweep import EXPERIMENT, SweepResults
from raylm.scaling.law import FLOPS, Estimate, Fit
from raylm.scaling.observations import Observation, Observations, Sizes, manifest, of_settings, vocab_size
from raylm.scaling.settings import Trend
from raylm.sweep import ladder

WARMUP = "train.warmup_steps"

MOST_TOKENS = 1e18
"""More are no number of numpy's."""


@dataclass(frozen=True)
class Request:
    """The training that is asked about."""

    settings: Mapping[str, Any]
    """Dotted key -> value, over those of the largest trial."""
    tokens: int
    flops_per_second: float | None = None
    """Speed of the machine; None: that of the largest trial."""
    price_per_hour: float | None = None


def request(
    settings: Mapping[str, Any], tokens: float | None, flops_per_second: float | None, price_per_hour: float | None
) -> Request | None:
    """The training that is asked about; None if none is. ConfigError if something is missing or impossible."""
    for option, value in (
        ("--tokens", tokens), ("--flops-per-second", flops_per_second), ("--price-per-hour", price_per_hour)
    ):  # fmt: skip
        if value is not None and not settings:
            raise ConfigError(f"{option}={value:g}: of which model? give --to model.config.n_layer=12", option)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option} must be a number above 0, got {value:g}", option)
    if not settings:
        return None
    for key in settings:
        if key == "train.max_tokens" or key.startswith("train.num_epochs"):
            raise ConfigError(f"--to {key}: give the training tokens as --tokens", "--to")
        if key.startswith(("corpus.", "tokenizer.")):
            raise ConfigError(f"--to {key}: the law is that of the sweeps' own tokens, which it would change", "--to")
    if tokens is None:
        raise ConfigError("--to: after how many training tokens? give --tokens 1e9", "--tokens")
    if tokens > MOST_TOKENS:
        raise ConfigError(f"--tokens must be at most {MOST_TOKENS:g}, got {tokens:g}", "--tokens")
    return Request(settings, max(1, round(tokens)), flops_per_second, price_per_hour)


class Optimal(NamedTuple):
    """The training of the least loss for a compute."""

    parameters: Estimate
    tokens: float
    loss: float

    def record(self, measure: str) -> dict[str, float]:
        return {**ends("parameters", self.parameters), "tokens": self.tokens, measure: math.exp(self.loss)}

    def shown(self, score: str) -> str:
        found = console.format_number(math.exp(self.loss))
        return f"{shown(self.parameters)} parameters on {self.tokens:,.0f} tokens: {score} {found}"


@dataclass(frozen=True)
class Prediction:
    """What is to be expected of a training."""

    parameters: int
    without_embeddings: int
    tokens: int
    loss: Estimate
    """Nats per token, with the interval of a new run on the documents that the trials were scored on."""
    on_other_documents: Estimate
    """The same on other documents of this kind."""
    by_parameters_without_embeddings: Estimate
    """The loss by the other count of parameters."""
    tokens_per_byte: float
    flops: float
    """Floating-point operations of the training, with attention and without embeddings that are looked up."""
    settings: Mapping[str, Estimate | float]
    """Dotted key -> value, with its interval if it follows from a power law."""
    times_the_largest: float
    """Its floating-point operations, relative to those of the largest trial."""
    seconds: float | None
    """None if no speed is known."""
    price: float | None
    optimal: Optimal | None
    """Of the compute of this training as the law counts it, 6 N D; None if the runs do not tell it."""
    command: str
    warnings: tuple[str, ...]

    @property
    def compute(self) -> float:
        """6 N D, what a law takes for the floating-point operations of a training."""
        return float(FLOPS) * self.parameters * self.tokens

    @property
    def bits_per_byte(self) -> Estimate:
        return Estimate(*(each * self.tokens_per_byte / math.log(2) for each in self.loss))

    def record(self, measure: str) -> dict[str, Any]:
        """The prediction for --json; the key of the score is its name."""
        return {
            "parameters": self.parameters,
            "parameters_without_embeddings": self.without_embeddings,
            "tokens": self.tokens,
            **ends(measure, perplexity(self.loss)),
            **ends("bits_per_byte", self.bits_per_byte),
            "on_other_documents": ends(measure, perplexity(self.on_other_documents)),
            "by_parameters_without_embeddings": ends(measure, perplexity(self.by_parameters_without_embeddings)),
            "settings": {
                key: ends("value", value) if isinstance(value, Estimate) else {"value": value}
                for key, value in self.settings.items()
            },
            "flops": self.flops,
            "times_the_largest": self.times_the_largest,
            "seconds": self.seconds,
            "price": self.price,
            "compute_optimal": None if self.optimal is None else self.optimal.record(measure),
            "command": self.command,
            "warnings": list(self.warnings),
        }

    def facts(self, measure: str) -> dict[str, Any]:
        """The prediction for the screen: name -> value."""
        cost = [f"{self.flops:.3g} FLOPs, {self.times_the_largest:.3g} times the largest trial's"]
        cost += [console.format_duration(self.seconds)] if self.seconds is not None else []
        cost += [f"{self.price:,.2f} at the price given"] if self.price is not None else []
        score, others = console.label(measure), shown(perplexity(self.on_other_documents))
        by_other_count = shown(perplexity(self.by_parameters_without_embeddings))
        return {
            "parameters": f"{self.parameters:,}, {self.without_embeddings:,} without embeddings",
            "training tokens": self.tokens,
            score: f"{shown(perplexity(self.loss))} of a run; {others} on other documents",
            "bits per byte": shown(self.bits_per_byte),
            f"{score} by the other law": f"{by_other_count}, of parameters without embeddings",
            **{
                key.partition(".")[2].replace("_", " "): shown(value) if isinstance(value, Estimate) else value
                for key, value in self.settings.items()
            },
            "cost": ", ".join(cost),
            **({} if self.optimal is None else {"best for this cost": self.optimal.shown(score)}),
            "train it": self.command,
        }


def perplexity(loss: Estimate) -> Estimate:
    """The perplexity of a loss in nats per token."""
    return Estimate(*map(math.exp, loss))


def ends(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate by its names in records: perplexity, perplexity_low, perplexity_high."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def shown(estimate: Estimate) -> str:
    """An estimate for the screen: 31.2 [30.4, 32.1]."""
    return console.format_estimate(*estimate)


def predict(
    request: Request, observations: Observations, fits: Mapping[str, Fit], trends: Mapping[str, Trend | str]
) -> Prediction:
    """What is to be expected of a training; ConfigError if its settings are wrong."""
    largest = observations.best[-1]
    asked = _asked(request, largest)
    experiment = of_settings(largest.sweep.experiment, asked)
    parameters, without_embeddings, flops_per_token = Sizes(vocab_size(observations.store)).of(experiment)
    fit = fits["parameters"]
    _check_known(fit, parameters, request.tokens)
    settings = _settings(request, experiment, observations.best, trends, parameters)
    typed = {**asked, **{key: _rounded(key, value, experiment) for key, value in settings.items()}}
    config.override(experiment, typed)  # which checks that the command will run
    flops = float(flops_per_token) * request.tokens
    seconds = _seconds(flops, request, largest)
    compute = float(FLOPS) * parameters * request.tokens
    return Prediction(
        parameters=parameters,
        without_embeddings=without_embeddings,
        tokens=request.tokens,
        loss=fit.predict(parameters, request.tokens),
        on_other_documents=fit.predict(parameters, request.tokens, on_other_documents=True),
        by_parameters_without_embeddings=fits["parameters_without_embeddings"].predict(
            without_embeddings, request.tokens
        ),
        tokens_per_byte=observations.tokens_per_byte,
        flops=flops,
        settings=settings,
        times_the_largest=flops / largest.flops,
        seconds=seconds,
        price=None if seconds is None or request.price_per_hour is None else seconds / 3600 * request.price_per_hour,
        optimal=None if fit.unknown else _optimal(fit, compute),
        command=console.command(
            "train",
            "--config",
            _config_file(largest.sweep),
            *(f"{key}={json.dumps(value)}" for key, value in typed.items()),
        ),
        warnings=tuple(_warnings(request, observations)),
    )


def _check_known(fit: Fit, parameters: float, tokens: float) -> None:
    """DataError if the training is larger than all others in what their losses do not tell."""
    beyond = {"alpha": ("more parameters", parameters, fit.parameters), "beta": ("more tokens", tokens, fit.tokens)}
    for name in fit.unknown:
        more, asked, trained = beyond[name]
        if asked > trained.max():
            raise DataError(
                f"what {more} bring cannot be told: {name} is {shown(fit.intervals[name])}, the largest training has "
                f"{trained.max():,.0f}, and this one {asked:,.0f}; train sizes and budgets that are further apart",
                "--to" if name == "alpha" else "--tokens",
            )


def _optimal(fit: Fit, compute: float) -> Optimal:
    parameters = fit.optimal(compute)
    tokens = compute / FLOPS / parameters.value
    return Optimal(parameters, tokens, float(fit.law.loss(parameters.value, tokens)))


def _asked(request: Request, largest: Observation) -> dict[str, Any]:
    """The settings over those of the sweep: the largest trial's, what is asked for, and the budget.

    Of a ladder it has the batch for this budget, and the shape that goes with its depth, if the ladder's sizes have.
    """
    of_ladder = ladder.settings(largest.sweep.experiment, largest.trial.settings, request.settings, request.tokens)
    asked = {**largest.trial.settings, **of_ladder, **request.settings, "train.max_tokens": request.tokens}
    if largest.experiment.train.num_epochs is not None:
        asked["train.num_epochs"] = None  # a training has one budget
    return asked


def _settings(
    request: Request,
    experiment: Experiment,
    best: list[Observation],
    trends: Mapping[str, Trend | str],
    parameters: int,
) -> dict[str, Estimate | float]:
    """Learning rate, batch and warmup: as asked for, else by their power laws, else as the largest trial has them.

    The warmup is the median fraction of the steps among the best trials.
    """
    expected: dict[str, Estimate | float] = {
        key: trend.at(parameters, request.tokens) for key, trend in trends.items() if isinstance(trend, Trend)
    }
    expected[WARMUP] = statistics.median(map(_warmup, best))
    return {
        key: expected[key] if key in expected and key not in request.settings else config.get(experiment, key)
        for key in (*trends, WARMUP)
    }


def _warmup(observation: Observation) -> float:
    """The fraction of the steps in which the learning rate rises."""
    section = observation.experiment.train
    if section.warmup_steps < 1:
        return float(section.warmup_steps)
    return section.warmup_steps * section.batch_tokens / observation.tokens


def _rounded(key: str, value: Estimate | float, experiment: Experiment) -> Any:
    """The value of a setting as it is typed: the batch in whole blocks of all workers."""
    number = value.value if isinstance(value, Estimate) else value
    if key != "train.batch_tokens":
        return float(f"{number:.3g}")
    workers = range(experiment.cluster.fewest_workers, experiment.cluster.most_workers + 1)
    step = experiment.blocks.block_size * math.lcm(*workers)
    return max(1, round(number / step)) * step


def _config_file(results: SweepResults) -> str:
    """The file of a sweep's experiment, which is written with its report; a sweep that was stopped has none yet."""
    path = f"{results.directory}/{EXPERIMENT}"
    if storage.read(path) is None:
        storage.write(path, results.state.artifacts[EXPERIMENT]["text"].encode())
    return path


def _seconds(flops: float, request: Request, largest: Observation) -> float | None:
    """How long a training takes, at the given speed or at the largest trial's."""
    if request.flops_per_second is not None:
        return flops / request.flops_per_second
    speed = pace(f"{largest.sweep.directory}/{largest.trial.trial_id}")["tokens_per_second"]
    return flops / (largest.flops_per_token * speed) if speed else None


def _warnings(request: Request, observations: Observations) -> list[str]:
    """What the law does not know of."""
    text = manifest(observations.store).get("train", {}).get("tokens")
    if not text or request.tokens <= FEW_PASSES * text:
        return []
    return [
        f"{request.tokens:,} tokens are {request.tokens / text:.0f} passes over the {text:,} tokens of training text: "
        f"the law is of new text, and more than {FEW_PASSES} passes teach less than it says"
    ]
