"""The law of made losses, and raylm scale on sweeps whose records were written by hand: nothing is trained."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from raylm import config, document_scores, model, tracking
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError, DataError, StorageError
from raylm.scale import scale
from raylm.scaling import law, observations, prediction, result
from raylm.scaling import settings as best_settings
from raylm.scaling.law import Estimate, Fit, Law
from raylm.sweep import SweepRecord

TRUTH = Law(E=1.8, A=480.0, alpha=0.35, B=2100.0, beta=0.37)


def grid(sizes, ratios):
    """(parameters, tokens) of each size with each number of tokens a parameter."""
    return np.array([(size, size * ratio) for size in sizes for ratio in ratios], float).T


SIZES, RATIOS = (1e6, 2e6, 4e6, 8e6), (5, 10, 20, 40)


def made(noise=0.003, seed=0, truth=TRUTH):
    parameters, tokens = grid(SIZES, RATIOS)
    departures = np.random.default_rng(seed).standard_normal(len(parameters))
    return parameters, tokens, truth.loss(parameters, tokens) * np.exp(noise * departures)


# The law -------------------------------------------------------------------------------------------------------------


def test_losses_without_noise_give_their_law():
    fit = Fit(*made(noise=0))
    assert fit.law == pytest.approx(TRUTH, rel=2e-2)
    assert fit.predict(1.6e7, 6.4e8).value == pytest.approx(TRUTH.loss(1.6e7, 6.4e8), rel=1e-4)
    assert fit.noise < 1e-4


def test_the_best_size_for_a_compute_is_where_the_loss_is_least():
    sizes = np.geomspace(1e6, 1e9, 100_001)
    best = sizes[np.argmin(TRUTH.loss(sizes, 1e18 / law.FLOPS / sizes))]
    parameters, tokens = TRUTH.optimal(1e18)
    assert parameters == pytest.approx(best, rel=1e-3)
    assert law.FLOPS * parameters * tokens == pytest.approx(1e18)
    estimate = Fit(*made()).optimal(1e18)
    assert estimate.low < parameters < estimate.high


def test_the_gradient_is_that_of_the_cost():
    from scipy.optimize import check_grad

    parameters, tokens, losses = made(noise=0.01)
    fit = Fit(parameters, tokens, losses)
    start = law._grid(losses)[7]
    found = check_grad(*(lambda at, n=n: law._summed(at, np.log(losses), fit._points)[n] for n in (0, 1)), start)
    assert found < 1e-5 * np.linalg.norm(law._summed(start, np.log(losses), fit._points)[1])


def test_many_fits_at_once_end_where_one_by_one_do():
    from scipy.optimize import minimize

    fit = Fit(*made(noise=0.005))
    generator = np.random.default_rng(0)
    targets = fit._expected + fit.noise * generator.standard_normal((100, len(fit.losses)))
    drawn = law._refit(targets, fit._points, np.tile(fit._constants, (100, 1)))
    place = np.log([1.6e7]) - fit._middle[0], np.log([6.4e8]) - fit._middle[1]
    off = []
    for target, constants in zip(targets[:10], drawn, strict=False):
        options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-10}
        one = minimize(
            law._summed, constants, args=(target, fit._points), jac=True, method="L-BFGS-B",
            bounds=list(zip(law.LOW, law.HIGH, strict=True)), options=options,
        )  # fmt: skip
        both = law._log_loss(np.stack([constants, one.x]), place)[0][:, 0]
        off.append(both[0] - both[1])
    spread = law._log_loss(drawn, place)[0].std()
    assert np.abs(off).mean() < 0.1 * spread


def test_an_interval_holds_a_new_run():
    """Rarely less than it says over a few draws; benchmarks/scaling_law.py counts over many."""
    inside = 0
    for seed in range(20):
        predicted = Fit(*made(seed=seed)).predict(1.6e7, 6.4e8)
        run = TRUTH.loss(1.6e7, 6.4e8) * math.exp(0.003 * np.random.default_rng(1000 + seed).standard_normal())
        inside += predicted.low <= run <= predicted.high
    assert inside >= 17


def test_few_points_have_wide_intervals():
    parameters, tokens, losses = made()
    few = (parameters < 8e6) & (tokens < 40 * parameters)
    wide = Fit(parameters[few], tokens[few], losses[few]).predict(1.6e7, 6.4e8)
    narrow = Fit(parameters, tokens, losses).predict(1.6e7, 6.4e8)
    assert few.sum() == 9
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_exponents_that_runs_do_not_tell_are_named():
    parameters, tokens, losses = made()
    assert Fit(parameters, tokens, losses).unknown == ()
    sizes = np.repeat([49_632, 111_936, 173_824], 3)
    horizons = np.array([199_040, 397_824, 794_112, 448_512, 895_488, 1_793_024, 696_320, 1_392_000, 2_782_208])
    measured = np.array([99.03, 74.14, 59.76, 69.93, 52.70, 41.31, 61.68, 45.23, 33.87])  # of a dictionary
    fit = Fit(sizes, horizons, np.log(measured))
    assert fit.unknown == ("alpha",), "too small a range of sizes"
    prediction._check_known(fit, 173_824, 5_896_704)
    with pytest.raises(DataError, match=r"^what more parameters bring cannot be told: alpha is .* this one 334,464"):
        prediction._check_known(fit, 334_464, 5_896_704)  # predicted as 27.7 [23.9, 32.5], and measured as 22.6


def test_constants_are_shown_with_three_digits():
    assert result._constant(Estimate(1.8172, 1.7749, 1.8536)) == "1.82 [1.77, 1.85]"
    assert result._constant(Estimate(91_000, 6e-6, 3.1528e18)) == "9.1e+04 [0, 3.15e+18]", "0: where the search ends"


def test_how_far_the_largest_is_off_is_relative_to_its_prediction():
    left_out = law.LeftOut(1e6, 1e7, math.log(15.0), Estimate(math.log(20.0), 2.0, 4.0))
    assert "it is 15, inside the interval, 25.0% below the prediction" in result.sentence_of(left_out, "perplexity")


def test_the_same_seed_gives_the_same_interval():
    assert Fit(*made()).predict(1.6e7, 6.4e8) == Fit(*made()).predict(1.6e7, 6.4e8)


def test_an_outlier_hardly_moves_the_law():
    parameters, tokens, losses = made(noise=0.001)
    spoilt = losses.copy()
    spoilt[5] *= 1.2  # every learning rate of this size and budget was far off
    plain, robust = (Fit(parameters, tokens, each).predict(1.6e7, 6.4e8).value for each in (losses, spoilt))
    assert robust == pytest.approx(plain, rel=5e-3)


def test_other_documents_add_to_an_interval():
    """All losses are 2 % higher or lower together with the text, which tells nothing of a run on the same text."""
    parameters, tokens, losses = made()
    fit = Fit(parameters, tokens, losses, covariance=np.full((16, 16), 0.02**2))
    same, others = fit.predict(1.6e7, 6.4e8), fit.predict(1.6e7, 6.4e8, on_other_documents=True)
    assert same == Fit(parameters, tokens, losses).predict(1.6e7, 6.4e8)
    half = math.log(others.high / others.value)
    assert math.sqrt(half**2 - math.log(same.high / same.value) ** 2) == pytest.approx(1.96 * 0.02, rel=0.15)


def test_the_largest_run_is_predicted_without_it():
    parameters, tokens, losses = made()
    largest = int(np.argmax(parameters * tokens))
    assert Fit(parameters, tokens, losses).without_largest().is_predicted
    spoilt = losses.copy()
    spoilt[largest] *= 1.1
    left_out = Fit(parameters, tokens, spoilt).without_largest()
    assert (left_out.parameters, left_out.tokens, left_out.loss) == (8e6, 3.2e8, spoilt[largest])
    assert not left_out.is_predicted
    assert left_out.predicted.value == pytest.approx(losses[largest], rel=0.02)


# Sweeps --------------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, TOKENS, RATE, BATCH = (
    "model.config.n_layer", "model.config.n_embd", "train.max_tokens", "train.learning_rate", "train.batch_tokens",
)  # fmt: skip
SMALL = Law(E=1.8, A=8.0, alpha=0.2, B=60.0, beta=0.3)
"""The loss of models of a million parameters at best."""
SHAPES = ((1, 64), (2, 64), (2, 128), (4, 128))
BUDGETS = (1_024_000, 2_048_000, 4_096_000)
VOCAB_SIZE = 2048


def parameters_of(layers, width, embeddings=True):
    experiment = config.load(config.BUILT_IN, {LAYERS: layers, WIDTH: width})
    return model.num_parameters(model.config_of(experiment, VOCAB_SIZE), embeddings=embeddings)


@pytest.fixture(scope="module")
def sizes():
    return {shape: parameters_of(*shape) for shape in SHAPES}


def best_rate(parameters, tokens):
    return 50 * parameters**-0.7 * tokens**0.05


def metrics(tokens, loss, budget=None, **others):
    scores = {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 4}  # four bytes a token
    best = {f"best_{name}": score for name, score in scores.items()}
    step = others.get("step", tokens // 512)
    found = {"step": step, "tokens": tokens, **scores, **best, "best_step": step, "seconds": tokens / 512, **others}
    return found if budget is None else {**found, "budget_tokens": budget}


def keep(directory, step, loss):
    """Keep the scores of 50 documents, whose mean is this loss."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(50, 90, 50).astype(float)
    hardness = generator.gamma(30, 1 / 30, 50)
    nll = tokens * hardness
    nll *= loss * tokens.sum() / nll.sum()
    rows = np.stack([nll, tokens, 4 * tokens, *np.zeros((2, 50))], axis=1)
    document_scores.write(directory, step, DocumentScores.of_ids(rows, range(50)))


def write_sweep(storage, name, trials, *settings, store="f00d", scored=True):
    """A sweep's directory. Each trial: its settings, its results, its cooldowns, how it ended."""
    (storage / "tokens" / store).mkdir(parents=True, exist_ok=True)
    manifest = {"tokenizer": {"vocab_size": VOCAB_SIZE}, "train": {"tokens": 5_000_000}}
    (storage / "tokens" / store / "manifest.json").write_text(json.dumps(manifest))
    directory = f"{storage}/words/{name}"
    experiment = config.load(
        config.BUILT_IN, [f"storage={storage}", "name=words", "tracking.uri=null", "tune.space={}", *settings]
    )
    parent = tracking.start(experiment.tracking, experiment="words", name=name, tags={}, directory=directory)
    parent.log_parameters({"store": store, "scored_documents": 50, "scored_tokens": 3500})
    parent.log_text(config.dump(experiment), "experiment.yaml")
    record = SweepRecord(directory)
    for number, (swept, results, cooldowns, status) in enumerate(trials):
        trial_id = f"trial_{number:05}"
        record.add(trial_id, swept)
        record.start(trial_id)
        for each in results:
            record.result(trial_id, each)
            if scored:
                keep(f"{directory}/{trial_id}", each["step"], math.log(each["perplexity"]))
        for each in cooldowns:
            record.cool(trial_id, each)
        record.finish(trial_id, status, None, dropped=status == "stopped early")
    return directory


def ladder(sizes, noise=0.003, seed=0, budgets=BUDGETS):
    """Trials of every size and budget, each at three learning rates of which the middle one is best."""
    generator = np.random.default_rng(seed)
    trials = []
    for (layers, width), parameters in sizes.items():
        for budget in budgets:
            departure, of_rate = generator.standard_normal(2)
            for factor in (0.5, 1, 2):
                rate = best_rate(parameters, budget) * math.exp(0.05 * of_rate) * factor
                loss = SMALL.loss(parameters, budget) * math.exp(noise * departure) + 0.05 * math.log(factor) ** 2
                swept = {LAYERS: layers, WIDTH: width, TOKENS: budget, RATE: rate}
                results = [metrics(budget // 2, loss + 0.5, budget), metrics(budget, loss, budget)]
                trials.append((swept, results, [], "completed"))
    return trials


@pytest.fixture(scope="module")
def swept(sizes, tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("scaling"), "tune-20260101-000000-aaaa", ladder(sizes))


def read(*directories):
    from raylm.results import sweep

    return observations.read([sweep.read(each) for each in directories])


def test_the_best_trial_of_each_size_and_budget_counts(swept, sizes):
    observed = read(swept)
    assert (len(observed.every), len(observed.best)) == (36, 12)
    first = observed.best[0]
    assert (first.parameters, first.tokens, first.draws) == (sizes[1, 64], BUDGETS[0], 3)
    assert first.without_embeddings == parameters_of(1, 64, embeddings=False)
    assert first.trial.settings[RATE] == pytest.approx(best_rate(sizes[1, 64], BUDGETS[0]), rel=0.2)
    assert observed.tokens_per_byte == pytest.approx(0.25)
    assert observed.covariance.shape == (12, 12)


def test_only_ends_of_schedules_count(sizes, tmp_path):
    """A trial that was stopped in the middle counts where it was cooled down; a failed one and a repeat do not."""
    swept = {LAYERS: 1, WIDTH: 64, TOKENS: 4096}
    cooled = metrics(1024, 4.0, 4096, cooldown_step=2, cooldown_tokens=512, step=3, best_cooldown=2)
    trials = [
        (swept, [metrics(1024, 5.0, 4096), metrics(2048, 4.5, 4096)], [cooled], "stopped early"),
        (swept, [metrics(1024, 5.0, 4096), metrics(4096, 3.5, 4096)], [], "completed"),
        (swept, [metrics(2048, 3.0, 4096)], [], "completed"),  # train.patience ended it
        (swept, [metrics(4096, 2.0, 4096)], [], "failed"),
    ]
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials, "train.batch_tokens=512")
    record = SweepRecord(directory)
    record.add_repeat("trial_00009", "trial_00001", {"train.seed": 1})
    record.result("trial_00009", metrics(4096, 1.0, 4096))
    record.finish("trial_00009", "completed", None)
    found = read(directory)
    assert [(each.tokens, round(each.loss, 9)) for each in found.every] == [(1536, 4.0), (4096, 3.5)]
    assert found.every[0].place == (f"{directory}/trial_00000/cooldowns/step_00000002", 3)


def test_blocks_and_batches_make_no_other_sizes_and_budgets(tmp_path):
    trials = [
        (
            {LAYERS: 1, WIDTH: 64, "blocks.block_size": size, BATCH: batch},
            [metrics(tokens, loss, tokens)],
            [],
            "completed",
        )
        for size, batch, tokens, loss in ((64, 512, 102_400, 4.0), (128, 1024, 101_376, 3.9), (64, 512, 204_800, 3.5))
    ]
    found = read(write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials))
    assert len({each.parameters for each in found.every}) == 2, "the positions of a block of 128"
    assert [(each.tokens, each.draws) for each in found.best] == [(101_376, 2), (204_800, 1)]


def test_what_is_asked_for_is_not_replaced(swept):
    answer = scale([swept], to=["model.config.n_layer=8", "train.learning_rate=0.001"], tokens=8e6)
    assert answer.record["prediction"]["settings"][RATE] == {"value": 0.001}
    assert "train.learning_rate=0.001 " in answer.record["prediction"]["command"]


def test_scale_predicts_a_larger_training(swept, sizes):
    bigger = parameters_of(8, 128)
    answer = scale([swept], to=["model.config.n_layer=8"], tokens=8e6, flops_per_second=1e12, price_per_hour=2)
    predicted = answer.record["prediction"]
    assert (predicted["parameters"], predicted["tokens"]) == (bigger, 8_000_000)
    loss = SMALL.loss(bigger, 8e6)
    assert predicted["perplexity_low"] < math.exp(loss) < predicted["perplexity_high"]
    assert predicted["perplexity"] == pytest.approx(math.exp(loss), rel=0.05)
    assert predicted["bits_per_byte"] == pytest.approx(math.log2(predicted["perplexity"]) / 4)
    wider = predicted["on_other_documents"]
    assert wider["perplexity_low"] < predicted["perplexity_low"]
    experiment = config.load(config.BUILT_IN, {LAYERS: 8, WIDTH: 128})
    of_model = model.config_of(experiment, VOCAB_SIZE)
    a_token = model.flops_per_token(of_model, model.parameters(of_model), block_size=experiment.blocks.block_size)
    assert predicted["flops"] == a_token * 8_000_000, "with attention, without embeddings of positions"
    assert predicted["times_the_largest"] == pytest.approx(predicted["flops"] / answer.record["points"][-1]["flops"])
    assert predicted["seconds"] == pytest.approx(predicted["flops"] / 1e12)
    assert predicted["price"] == pytest.approx(predicted["seconds"] / 1800)
    rate = predicted["settings"][RATE]
    assert rate["value_low"] < best_rate(bigger, 8e6) < rate["value_high"]
    assert rate["value_high"] < 1.5 * rate["value_low"]
    assert predicted["settings"]["train.warmup_steps"] == {"value": 0.1}
    optimal = predicted["compute_optimal"]
    assert optimal["parameters"] * optimal["tokens"] == pytest.approx(bigger * 8e6), "of a law compute is 6 N D"
    assert optimal["perplexity"] <= predicted["perplexity"]
    json.dumps(answer.record, allow_nan=False)


HEADS = "model.config.n_head"


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    """A sweep of tune.ladder, whose widths and heads follow the depth."""
    of_depth = {(layers, 64 * layers): parameters_of(layers, 64 * layers) for layers in (1, 2, 3, 4)}
    trials = ladder(of_depth)
    for trained, *_ in trials:
        trained[HEADS] = trained[LAYERS]
    grid = [{LAYERS: layers, WIDTH: width, HEADS: layers, TOKENS: 1_024_000} for layers, width in of_depth]
    space = f"tune.space={json.dumps({'ladder': {'grid': grid}})}"
    return write_sweep(tmp_path_factory.mktemp("rungs"), "tune-20260101-000000-aaaa", trials, space)


def test_another_depth_of_a_ladder_has_the_shape_that_goes_with_it(rungs, swept):
    def asked(directory, *to):
        command = scale([directory], to=list(to), tokens=8e6).record["prediction"]
        settings = dict(each.split("=") for each in shlex.split(command["command"]) if each.startswith("model."))
        return command["parameters"], [int(settings.get(key, 0)) for key in (LAYERS, WIDTH, HEADS)]

    assert asked(rungs, f"{LAYERS}=6") == (parameters_of(6, 384), [6, 384, 6])
    assert asked(rungs, f"{LAYERS}=6", f"{WIDTH}=256") == (parameters_of(6, 256), [6, 256, 4]), "as the largest has"
    assert asked(rungs, f"{LAYERS}=6", f"{HEADS}=3") == (parameters_of(6, 384), [6, 384, 3])
    assert asked(rungs, "train.learning_rate=0.001")[1] == [4, 256, 4]
    assert asked(swept, f"{LAYERS}=6")[1] == [6, 128, 0], "no ladder"


def test_the_command_is_one_that_runs(swept):
    answer = scale([swept], to=["model.config.n_layer=8", "blocks.block_size=128"], tokens=8e6)
    _, *verb, file, layers, width, tokens, rate, size, batch, warmup = shlex.split(
        answer.record["prediction"]["command"]
    )
    assert verb == ["-m", "raylm.train", "--config"]
    experiment = config.load(file, [layers, width, tokens, rate, size, batch, warmup])
    assert (config.get(experiment, LAYERS), config.get(experiment, WIDTH)) == (8, 128), "over the largest trial's"
    assert experiment.train.max_tokens == 8_000_000
    assert experiment.blocks.block_size == 128


def test_the_screen_says_how_the_largest_was_predicted(swept, sizes):
    answer = scale([swept])
    text = "\n".join(str(each) for each in answer.view)
    assert f"without the largest training ({sizes[4, 128]:,} parameters, 4,096,000 tokens) its perplexity is" in text
    assert text.count("inside the interval") == 2, "by both counts of parameters"
    powers = r"the best train.learning_rate goes as parameters\^-0\.[67]\d* \[-0\.\d+, -0\.\d+\] tokens\^"
    assert re.search(powers, text)
    assert "no power law of the best train.batch_tokens: not swept" in text
    assert answer.record["prediction"] is None
    checked = answer.record["laws"]["parameters"]["largest_left_out"]
    assert checked["is_predicted"]
    assert checked["predicted_perplexity_low"] < checked["perplexity"] < checked["predicted_perplexity_high"]


def test_the_plot_stands_beside_the_report(swept):
    answer = scale([swept], to=["model.config.n_layer=8"], tokens=8e6)
    assert answer.record["report"] == f"{swept}/report/scaling.html"
    assert Path(answer.record["picture"]).read_bytes()[1:4] == b"PNG"
    page = Path(answer.record["report"]).read_text(encoding="utf-8")
    assert "inside the interval" in page
    assert "frontier" in page


def test_many_tokens_of_little_text_are_warned_of(swept):
    answer = scale([swept], to=["model.config.n_layer=8"], tokens=1e9)
    (warning,) = answer.record["prediction"]["warnings"]
    assert warning.startswith("1,000,000,000 tokens are 200 passes over the 5,000,000 tokens of training text")


def test_two_sweeps_count_together(sizes, tmp_path):
    trials = ladder(sizes)
    one = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials[:18])
    two = write_sweep(tmp_path, "tune-20260102-000000-bbbb", trials[18:])
    with pytest.raises(DataError, match=r"2 sizes and 3 budgets in 6 combinations that came to the end of a schedule"):
        scale([one])
    assert len(scale([one, two]).record["points"]) == 12


@pytest.mark.parametrize(
    ("settings", "store", "differs"),
    [
        ([], "beef", "token store beef, and tune-20260101-000000-aaaa has f00d"),
        (["eval.max_tokens=640"], "f00d", "eval.max_tokens 640, and tune-20260101-000000-aaaa has None"),
        (["eval.precision=bfloat16"], "f00d", "eval.precision bfloat16"),
    ],
)
def test_sweeps_that_were_scored_otherwise_are_refused(settings, store, differs, sizes, tmp_path):
    one = write_sweep(tmp_path, "tune-20260101-000000-aaaa", ladder(sizes)[:2])
    two = write_sweep(tmp_path, "tune-20260102-000000-bbbb", ladder(sizes)[:2], *settings, store=store)
    with pytest.raises(ConfigError, match=f"tune-20260102-000000-bbbb has {differs}"):
        scale([one, two])


def test_a_law_is_of_one_architecture(sizes, tmp_path):
    one = write_sweep(tmp_path, "tune-20260101-000000-aaaa", ladder(sizes)[:2])
    other = "model.config={model_type: gpt_bigcode, n_layer: 1, n_embd: 64, n_head: 1}"
    two = write_sweep(tmp_path, "tune-20260102-000000-bbbb", ladder(sizes)[:2], other)
    with pytest.raises(ConfigError, match="a law is of one architecture, and these are trainings of gpt2 and gpt_bigc"):
        scale([one, two])


def test_sizes_that_grow_with_their_tokens_tell_nothing(tmp_path):
    """One budget for each size, in proportion: eight sizes by eight budgets."""
    shapes = [(layers, 128) for layers in range(1, 9)]
    trials = []
    for layers, width in shapes:
        budget = 20 * parameters_of(layers, width)
        loss = SMALL.loss(budget / 20, budget)
        trials.append(
            ({LAYERS: layers, WIDTH: width, TOKENS: budget}, [metrics(budget, loss, budget)], [], "completed")
        )
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials)
    with pytest.raises(DataError, match="sizes and training tokens grow together"):
        scale([directory])


def test_a_law_that_does_not_predict_the_largest_is_not_told(sizes, tmp_path):
    trials = ladder(sizes)
    for swept, results, _, _ in trials[-3:]:
        results[-1] |= metrics(swept[TOKENS], 1.2 * math.log(results[-1]["perplexity"]), swept[TOKENS])
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials)
    with pytest.raises(DataError, match=r"no law that can be believed: without the largest .* outside of the interval"):
        scale([directory], to=["model.config.n_layer=8"], tokens=8e6)
    assert not Path(f"{directory}/report").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 1e9}, "--tokens=1e.09: of which model"),
        ({"price_per_hour": 2.0}, "--price-per-hour=2: of which model"),
        ({"to": ["model.config.n_layer=8"]}, "--to: after how many training tokens"),
        ({"to": ["model.config.n_layer=8"], "tokens": -1.0}, "--tokens must be a number above 0, got -1"),
        (
            {"to": ["tokenizer.train.vocab_size=512"], "tokens": 1e6},
            "--to tokenizer.train.vocab_size: the law is that of",
        ),
        (
            {"to": ["train.max_tokens=5e6"], "tokens": 1e6},
            "--to train.max_tokens: give the training tokens as --tokens",
        ),
        ({"to": ["model.config.n_layer=8"], "tokens": 1e30}, r"--tokens must be at most 1e\+18, got 1e\+30"),
        ({"to": ["model.config.n_layer=8"], "tokens": math.nan}, "--tokens must be a number above 0, got nan"),
        ({"to": ["model.config.n_layer=8"], "tokens": math.inf}, "--tokens must be a number above 0, got inf"),
        ({"to": ["n_layer"], "tokens": 1e9}, "'n_layer' is not a setting"),
        ({"to": ["model.config.n_lyer=8"], "tokens": 1e9}, "model.config.n_lyer: unknown field of gpt2"),
    ],
)
def test_a_question_that_cannot_be_answered_says_so(options, said, swept):
    with pytest.raises(ConfigError, match=said):
        scale([swept], **options)


def test_a_sweep_without_its_token_store_says_so(sizes, tmp_path):
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", ladder(sizes)[:2])
    (tmp_path / "tokens" / "f00d" / "manifest.json").unlink()
    with pytest.raises(StorageError, match="the token store of the sweep is gone"):
        scale([directory])


def test_scores_without_documents_have_no_other_documents(sizes, tmp_path):
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", ladder(sizes), scored=False)
    assert read(directory).covariance is None


# The best settings ---------------------------------------------------------------------------------------------------


def test_the_best_rate_follows_size_and_tokens(swept, sizes):
    trend = best_settings.trends(read(swept).best)[RATE]
    for name, exponent in (("parameters", -0.7), ("tokens", 0.05)):
        found = trend.exponents[name]
        assert found.low < exponent < found.high
        assert found.high - found.low < 0.3
    assert trend.at(1e6, 1e7).value == pytest.approx(best_rate(1e6, 1e7), rel=0.1)


def test_a_rate_of_two_values_has_no_law(sizes, tmp_path):
    trials = [
        ({**swept, RATE: 1e-3 if number % 3 else 2e-3}, results, cooldowns, status)
        for number, (swept, results, cooldowns, status) in enumerate(ladder(sizes))
    ]
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials)
    assert best_settings.trends(read(directory).best)[RATE] == "1 different best values, and a power law takes 3"


# From Python ---------------------------------------------------------------------------------------------------------


def test_the_same_from_python(swept):
    from raylm import api

    found = api.scale(swept, to={"model.config.n_layer": 8}, tokens=8_000_000)
    assert isinstance(found, result.Scaling)
    assert isinstance(found.prediction, prediction.Prediction)
    assert len(found.observed.best) == 12
