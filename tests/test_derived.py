"""Settings that follow from the text and the machine; the speed of training is really measured, in a second or two."""

import json
from pathlib import Path

import pytest

from raylm import budget, config, corpus, derived, tokenizer, tokens
from raylm import plan as plans
from raylm.derived import decisions, sizes
from raylm.derived.text import vocabulary
from raylm.errors import ConfigError

NOTES = "Note {}. The harbour was quiet, and {} boats came in before noon.\n\nNobody wrote down why.\n\n" * 8


@pytest.fixture
def notes(tmp_path):
    """12 files of some 800 characters."""
    directory = tmp_path / "notes"
    directory.mkdir()
    for number in range(12):
        numbers = [number * 31 + each for each in range(16)]
        (directory / f"{number:02}.txt").write_text(NOTES.format(*numbers), encoding="utf-8")
    return directory


@pytest.fixture
def load(tmp_path, notes):
    decisions._pending.clear()

    def make(*settings, file=None):
        return config.load(file, [f"corpus.paths={notes}", f"storage={tmp_path}/runs", "tracking.uri=null", *settings])

    return make


def complete(experiment, what):
    return plans.derive(experiment, with_sizes=what == "training")[0].experiment


def decided(tmp_path):
    return sorted(path.name.partition("-")[0] for path in tmp_path.glob("runs/decided/*"))


def test_a_corpus_of_few_documents_is_split_by_passages_with_or_without_a_config(load, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\n")
    for given in (None, file):
        found = complete(load(file=given), "text")
        assert found.corpus.split_by == "passage"
        assert found.corpus.validation_fraction >= load().corpus.validation_fraction
        assert (found.tokenizer.train is not None) == (given is None)


def test_what_was_decided_stays_when_the_corpus_has_grown(load, notes, tmp_path):
    first = complete(load(), "text")
    derived.keep()
    for number in range(200):
        (notes / f"more-{number}.txt").write_text(f"Another note, the {number}th of them.\n" * 40, encoding="utf-8")
    assert complete(load(), "text") == first
    anew = complete(load("corpus.min_chars=2"), "text")
    assert (first.corpus.split_by, anew.corpus.split_by) == ("passage", "document")
    derived.keep()
    assert decided(tmp_path) == ["split", "split"]


def test_nothing_is_written_before_it_is_kept(load, tmp_path):
    complete(load(), "training")
    assert decided(tmp_path) == []


def test_the_split_that_was_given_is_kept(load):
    settings = ["corpus.split_by=document", "corpus.validation_fraction=0.5"]
    found = complete(load(*settings), "text")
    assert (found.corpus.split_by, found.corpus.validation_fraction) == ("document", 0.5)
    assert complete(load("corpus.validation_fraction=0"), "text").corpus.split_by


def test_the_validation_split_of_two_documents_is_not_empty(load, notes):
    for file in sorted(notes.iterdir())[2:]:
        file.unlink()
    found = complete(load("corpus.split_by=document"), "text")
    assert found.corpus.validation_fraction > 0.05


def test_sizes_are_a_few_passes_and_one_experiment(load, tmp_path):
    found = complete(load(), "training")
    size = sum(file.stat().st_size for file in (tmp_path / "notes").iterdir())
    assert found.train.max_tokens <= budget.FEW_PASSES * size
    assert found.train.max_tokens % (sizes.EVALUATIONS * found.train.batch_tokens) == 0
    assert found.train.eval_every_tokens * sizes.EVALUATIONS == found.train.max_tokens
    assert found.model.config["n_embd"] == 64, "the smallest: there is little text"
    for size in found.tune.space["blocks.block_size"]["choice"]:
        config.override(found, {"blocks.block_size": size})
    derived.keep()
    assert decided(tmp_path) == ["experiment", "split"]
    assert complete(load(), "training") == found, "it is read again, not measured again"


def test_the_tokens_of_a_small_text_are_measured_for_its_few_passes(load, monkeypatch):
    """Not estimated: 512 entries make 2.1 bytes of a token of some texts, and 3.6 of those that repeat themselves."""
    monkeypatch.setattr("raylm.derived.speed.tokens_per_second", lambda *_, **__: 1e6)
    found = complete(load(), "training")
    sources, chosen = corpus.list_sources(found.corpus), tokenizer.choose(found.tokenizer, found.model)
    bytes_of_one = tokens.bytes_per_token(sources, found.corpus, chosen, 10**6)
    texts = [file.read_text(encoding="utf-8") for file in map(Path, found.corpus.paths[0:1]) for file in file.iterdir()]
    own = tokenizer.train(texts, chosen.train)
    number = sum(len(own(text, add_special_tokens=False)["input_ids"]) for text in texts)
    whole = sum(len(text.encode()) for text in texts)
    assert bytes_of_one == pytest.approx(whole / number, rel=0.1), "without the text that is held out"
    passes = found.train.max_tokens / ((1 - found.corpus.validation_fraction) * whole / bytes_of_one)
    assert budget.FEW_PASSES - 1 < passes <= budget.FEW_PASSES, "in nine whole evaluations"


def test_a_sweep_that_is_given_more_trials_keeps_its_sizes(load):
    first = complete(load(), "training")
    derived.keep()
    settings = ["tune.num_samples=20", "train.keep_checkpoints=5", "cluster.max_failures=1", "tune.stop.seconds=9"]
    again = complete(load(*settings), "training")
    assert (again.train.max_tokens, again.model) == (first.train.max_tokens, first.model)
    assert again.tune.num_samples == 20


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("train.max_tokens=40960", "train.max_tokens", 40_960),
        ("train.num_epochs=2", "train.max_tokens", None),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("train.batch_tokens=1024", "train.batch_tokens", 1024),
        ("blocks.block_size=32", "blocks.block_size", 32),
        ("tokenizer.train.vocab_size=300", "tokenizer.train.vocab_size", 300),
        ("tune.space={train.seed: {randint: [0, 9]}}", "tune.space", {"train.seed": {"randint": [0, 9]}}),
        ("model.config={model_type: llama, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, "
         "num_attention_heads: 2, num_key_value_heads: 2}", "model.config.model_type", "llama"),
        ("model.config.n_layer=1", "model.config.n_embd", 64),
    ],
)  # fmt: skip
def test_what_is_given_stays(load, setting, key, value):
    found = complete(load(setting), "training")
    assert config.get(found, key) == value
    assert config.override(found, {}) == found


@pytest.mark.parametrize(
    "settings",
    [
        ["train.max_tokens=10000"],
        ["train.max_tokens=100"],
        ["blocks.block_size=100"],
        ["cluster.num_workers=3"],
        ["train.max_tokens=10000", "blocks.block_size=96", "cluster.num_workers=2"],
    ],
)
def test_the_batch_goes_with_what_was_given_unless_it_was_given_itself(load, settings):
    found = complete(load(*settings), "training")
    assert "batch_tokens" in found.train.model_fields_set
    for size in [found.blocks.block_size, *found.tune.space.get("blocks.block_size", {"choice": []})["choice"]]:
        assert found.train.batch_tokens % (size * found.cluster.most_workers) == 0
        assert config.override(found, {"blocks.block_size": size}).train == found.train, "so are trials made"
    assert found.train.batch_tokens <= found.train.max_tokens
    derived.keep()
    assert complete(load(*settings), "training") == found, "the same when it is resumed"
    with pytest.raises(ConfigError, match=r"train.batch_tokens|train.max_tokens"):
        load(*settings, "train.batch_tokens=32768")


@pytest.mark.parametrize("kind", ["masked", "fill_in_middle"])
def test_every_objective_has_a_model_and_the_tokens_that_it_needs(load, kind):
    found = complete(load(f"objective.kind={kind}"), "training")
    assert found.model.config["model_type"] == ("bert" if kind == "masked" else "gpt2")
    needed = ["<mask>"] if kind == "masked" else found.objective.sentinels
    assert {*needed} < {*found.tokenizer.train.special_tokens}


def test_a_config_decides_all_but_the_split(load, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("model: {config: {model_type: gpt2}}\ntokenizer: {train: {}}\n")
    given = load(file=file)
    found = complete(given, "training")
    assert found.model_dump(exclude={"corpus"}) == given.model_dump(exclude={"corpus"})


@pytest.mark.parametrize(("size", "entries"), [(0, 512), (50_000, 512), (1_000_000, 2048), (3_000_000_000, 8192)])
def test_the_vocabulary_grows_with_the_text(size, entries):
    assert vocabulary(size) == entries


@pytest.mark.parametrize(("together", "rounds"), [(1, 18), (2, 12), (8, 9)])
def test_trials_that_run_side_by_side_take_less_time(together, rounds):
    """8 trials to the first evaluation, 2 of them two evaluations more, 1 of those the other six."""
    assert sizes._rounds(together) == rounds


@pytest.mark.slow  # 60 s
@pytest.mark.timeout(900)
def test_a_sweep_over_own_notes_without_a_config(command, notes, tmp_path):
    for number in range(60):
        (notes / f"more-{number}.md").write_text(NOTES.format(*range(number, number + 16)), encoding="utf-8")
    arguments = [f"corpus.paths={notes}", "name=notes", "--json"]
    planned = json.loads(command("tune", *arguments, "--dry-run", cwd=tmp_path).stdout)
    ended = command("tune", *arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    best = found["best"]
    assert best["perplexity"] < 300, "512 tokens: an untrained model is at 512"
    (trial,) = [trial for trial in found["trials"] if trial["trial_id"] == best["trial_id"]]
    assert trial["status"] == "completed"
    assert trial["tokens"] <= 1.5 * planned["tokens"]
    told = json.loads(command("tune", *arguments, "--dry-run", cwd=tmp_path).stdout)
    assert told["scored_documents"] >= 10
    assert told["passes"] <= budget.FEW_PASSES


def test_what_was_decided_is_a_config_file_of_the_same_experiment(load, tmp_path):
    found = complete(load(), "training")
    derived.keep()
    (file,) = tmp_path.glob("runs/decided/*.yaml")
    again = complete(config.load(file, [f"storage={tmp_path}/runs", "tracking.uri=null"]), "training")
    assert again.model_dump() == found.model_dump()


def test_the_learning_rate_and_batch_are_those_of_the_published_formula():
    """Table 1 of arXiv:2503.04715 gives the constants; 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 by hand."""
    rate, batch = sizes.step_law(10**9, 10**11)
    assert rate == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11), rel=1e-12) == pytest.approx(1.63e-3, rel=0.01)
    assert batch == pytest.approx(0.58 * 10 ** (0.571 * 11), rel=1e-12) == pytest.approx(1.11e6, rel=0.01)


@pytest.mark.parametrize(("memory", "lora"), [(1e12, False), (1e4, True)])
def test_a_model_whose_weights_do_not_fit_is_finetuned_with_lora(load, trained_directory, monkeypatch, memory, lora):
    monkeypatch.setattr(sizes, "_memory", lambda machine: memory)
    found = complete(load(f"model.path={trained_directory}"), "training")
    assert (found.model.lora is not None) == lora
    assert found.train.learning_rate == sizes.PRETRAINED_RATES[lora][1]
    assert found.model.config is None
    assert found.tokenizer.train is None
