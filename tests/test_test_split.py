"""The best model alone is scored on the test split, once, and it is said what that tells of its validation score."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from raylm import budget, cost, document_scores, model, perplexity, tokens
from raylm import plan as plans
from raylm.config import CorpusConfig
from raylm.document_scores import DocumentScores
from raylm.perplexity import MaskedTokens
from raylm.pipeline import stores
from raylm.pipeline import sweep as sweeping
from raylm.pipeline import training as pipeline
from raylm.results import test_split

MASKED = (
    "objective.kind=masked",
    "tokenizer.train.special_tokens=['<|endoftext|>', '<mask>']",
    "model.config={model_type: bert, num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, "
    "intermediate_size: 32}",
)


def scored(count, worse, seed, spread=0.1):
    """The score of a split of documents that take 4 + worse nats a token on average."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(50, 400, count)
    nll = lengths * (4 + worse + generator.normal(0, spread, count))
    value = math.exp(nll.sum() / lengths.sum())
    return test_split.SplitScore(value, 1.5, f"the {seed} split", DocumentScores(nll, lengths, 4 * lengths, "hash"))


def judged(test, validation, corpus=None):
    corpus = corpus or CorpusConfig(paths="a", split_by="document", test_fraction=0.1)
    return test_split.TestScore.of(test, validation, measure="perplexity", num_tokens=1234, corpus=corpus)


def test_the_sentence_says_whether_the_validation_score_is_too_good():
    validation = scored(40, 0, 1)
    alike = judged(scored(40, 0, 2), validation)
    assert alike.difference_percent_low < 0 < alike.difference_percent_high
    assert alike.difference_percent == pytest.approx(100 * (alike.perplexity / alike.validation_perplexity - 1))
    assert alike.sentence.endswith("no more than other documents alone would give")
    assert "on the 2 split, by which nothing was chosen (40 documents, 1,234 tokens), and " in alike.sentence
    assert " on the 1 split: " in alike.sentence
    flattered = judged(scored(40, 0.3, 2), validation)
    assert flattered.difference_percent_low > 0
    assert flattered.sentence.endswith(": the latter is too good, because the model was chosen by it")
    harder = judged(scored(40, -0.3, 2), validation)
    assert harder.sentence.endswith(": the latter is not too good, and its documents are harder")
    other = CorpusConfig(paths="a", test_paths="b", split_by="passage")
    assert judged(scored(40, 0.3, 2), validation, other).sentence.endswith(
        "more than other documents alone would give; they are different texts, of which one may be harder"
    )
    passages = CorpusConfig(paths="a", split_by="passage", test_fraction=0.1)
    assert "(40 passages, " in judged(scored(40, 0, 2), validation, passages).sentence


def test_too_few_or_unknown_documents_tell_nothing():
    few = judged(scored(5, 0.3, 2), scored(40, 0, 1))
    assert (few.perplexity_low, few.difference_percent_low) == (None, None)
    assert few.sentence.endswith("too few documents to tell whether the latter is too good")
    assert few.metrics == {"test/perplexity": few.perplexity, "test/bits_per_byte": 1.5}
    unknown = judged(scored(40, 0.3, 2), scored(40, 0, 1)._replace(documents=None))
    assert unknown.perplexity_low is not None
    assert unknown.sentence.endswith("because the scores of single documents were not kept")


def test_no_number_has_more_digits_than_its_interval():
    wide = judged(scored(40, 0, 2, spread=1.0), scored(40, 0, 1, spread=1.0))
    assert wide.perplexity_high - wide.perplexity_low > 20
    words = wide.sentence.split()
    assert words[:2] == ["perplexity", f"{wide.perplexity:.0f}"]


def test_a_score_is_kept_with_those_of_its_documents(tmp_path):
    test = scored(40, 0, 2)
    found = judged(test, scored(40, 0, 1))
    assert test_split.read(str(tmp_path), 7) is None
    test_split.write(str(tmp_path), 7, found, test.documents)
    assert test_split.read(str(tmp_path), 7) == found
    assert document_scores.read(str(tmp_path), 7) is None, "of the validation split"
    assert document_scores.read(str(tmp_path), 7, "test").nll.tolist() == test.documents.nll.tolist()


@pytest.fixture(scope="module")
def runs(ray_cluster, tiny, tmp_path_factory):
    """masked or not -> (experiment, the result of its training)"""
    found = {}

    def run(masked):
        if masked not in found:
            place = tmp_path_factory.mktemp("test_split")
            settings = [f"storage={place}", f"tracking.uri=sqlite:///{place}/mlflow.db", "corpus.test_fraction=0.3"]
            experiment = tiny(*settings, *(MASKED if masked else ()))
            found[masked] = experiment, pipeline.run(plans.resolve(experiment))
        return found[masked]

    return run


@pytest.mark.parametrize("masked", [False, True])
def test_the_best_model_of_a_training_is_scored_on_the_test_split(runs, masked):
    experiment, result = runs(masked)
    planned = plans.resolve(experiment)
    prepared, store = planned.prepared, planned.prepared.store
    assert planned.record()["test_documents"] == len(store.test)
    limit = cost.test_limit(prepared.experiment, store, prepared.budget, store.test)
    assert (limit is not None) is masked, "the whole split would cost more than a tenth of so short a training"
    network = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(result.checkpoint)
    frame = store.frame("auto")
    by_hand = perplexity.score(
        network,
        store.test,
        frame=frame,
        context=model.context(network.config),
        max_tokens=limit,
        masked=MaskedTokens.of(store.tokenizer, frame) if masked else None,
    )
    test, measure = result.test, experiment.measure
    assert test.perplexity == pytest.approx(by_hand.perplexity, rel=1e-6)
    assert test.bits_per_byte == pytest.approx(by_hand.bits_per_byte, rel=1e-6)
    documents = perplexity.first_documents(store.test, limit)
    assert (test.documents, test.tokens) == (documents, sum(len(store.test[index]) for index in range(documents)))
    assert test.scored_on == (f"the first {limit:,} tokens of the test split" if masked else "the test split")
    assert test.validation_perplexity == result.score
    assert test.validation_scored_on == result.scored_on
    record = result.record()["test"]
    assert record[measure] == test.perplexity
    assert record[f"validation_{measure}"] == result.score
    directory = Path(result.checkpoint).parent
    assert json.loads((directory / "result.json").read_text())["test"] == record
    assert json.loads((directory / "model" / "raylm.json").read_text())["test"] == record
    card = (directory / "model" / "README.md").read_text()
    assert f"\n{test.sentence[0].upper()}{test.sentence[1:]}.\n" in card
    assert "split: test" in card
    kept = document_scores.read(str(directory), result.best_step, "test")
    assert (len(kept), kept.nll.sum()) == (documents, pytest.approx(by_hand.nll, rel=1e-6))
    logged = MlflowClient(experiment.tracking.uri).get_run(result.mlflow_run_id)
    assert {name: logged.data.metrics[name] for name in test.metrics} == test.metrics
    assert (f"test/{measure}_high" in test.metrics) is (documents >= 6)
    assert "tiny test" in {each.dataset.name for each in logged.inputs.dataset_inputs}


def test_a_command_that_resumes_does_not_score_again(runs):
    """The command was killed after the score, before it wrote its result."""
    experiment, result = runs(False)
    directory = Path(result.checkpoint).parent
    (file,) = (directory / "scores").glob("test_step_*.json")
    written = file.stat()
    (directory / "result.json").unlink()
    resumed = pipeline.run(plans.resolve(experiment), resume="must")
    assert Path(resumed.checkpoint).parent == directory
    assert resumed.test == result.test
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    log = (directory / "run.log").read_text()
    assert log.count("Scoring the best model on the test split …") == 1


@pytest.mark.slow  # 20 s
def test_the_best_trial_alone_is_scored_and_the_sweep_says_so(ray_cluster, tiny, tmp_path):
    experiment = tiny(
        f"storage={tmp_path}",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "corpus.test_fraction=0.3",
        "tune.space={train.learning_rate: {grid: [2e-2, 1e-3]}}",
        "tune.num_samples=1",
        "tune.scheduler=none",
    )
    result = sweeping.run(sweeping.resolve(experiment))
    directory = tmp_path / "tiny" / result.sweep
    (file,) = directory.glob("*/scores/test_step_*.json")
    assert file.parents[1].name == result.best.trial_id
    assert result.test.validation_perplexity == result.best.perplexity
    assert result.record()["test"] == json.loads((directory / "result.json").read_text())["test"]
    client = MlflowClient(experiment.tracking.uri)
    parent = client.get_run(result.mlflow_run_id)
    assert {name: parent.data.metrics[name] for name in result.test.metrics} == result.test.metrics
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    trials = {run.data.tags["raylm.trial"]: run for run in children}
    assert trials.keys() == {row.trial_id for row in result.trials}
    assert {name for name, run in trials.items() if "test/perplexity" in run.data.metrics} == {result.best.trial_id}
    best = trials[result.best.trial_id]
    assert best.data.metrics["test/perplexity"] == result.test.perplexity
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    assert result.test.sentence in parent.data.tags["mlflow.note.content"]
    page = Path(result.report).read_text()
    assert result.test.sentence in page.replace("&#x27;", "'")
    assert "test tokens" in page


def test_a_test_split_that_is_too_expensive_is_scored_in_part(ray_cluster, tiny):
    """Of a masked model of which each token is masked by itself; as many tokens as in an evaluation."""
    settings = [*MASKED, "eval.pseudo_perplexity=true", "corpus.test_fraction=0.3", "train.max_tokens=256"]
    prepared = plans.resolve(tiny(*settings))
    store = prepared.prepared.store if prepared.prepared else stores.prepare(prepared.tokens)[0]
    experiment = cost.with_eval_limit(prepared.experiment, store)
    planned = budget.for_store(experiment, store)
    assert cost.test_limit(experiment, store, planned, store.test) == experiment.eval.max_tokens
    assert experiment.eval.max_tokens < tokens.open_store(store.path).test.num_tokens
    causal = tiny("corpus.test_fraction=0.3")
    store, _ = stores.prepare(plans.resolve_tokens(causal))
    planned = budget.for_store(causal, store)
    assert cost.test_limit(causal, store, planned, store.test) is None
    lengths = [len(store.test[index]) for index in range(len(store.test))]
    read = sum(length if length <= 32 else 32 * (1 + -(-(length - 32) // 32)) for length in lengths)
    share = cost.evaluation_share(causal, store, planned)
    store.test = None
    without = cost.evaluation_share(causal, store, planned)
    assert share / (1 - share) - without / (1 - without) == pytest.approx(read / (3 * planned.tokens))
