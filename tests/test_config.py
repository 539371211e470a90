import os
import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from raylm import config
from raylm.config import Experiment
from raylm.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def load(tmp_path):
    """Load an experiment from YAML text and settings."""

    def load(text, *settings):
        (tmp_path / "my.yaml").write_text(text)
        return config.load(tmp_path / "my.yaml", settings)

    return load


@pytest.fixture
def faults(load, tmp_path):
    """The lines of the error that YAML text and settings give; the file is my.yaml there."""

    def faults(text, *settings):
        with pytest.raises(ConfigError) as caught:
            load(text, *settings)
        return caught.value.message.replace(f"{tmp_path}{os.sep}", "").split("\n")

    return faults


# Layers ------------------------------------------------------------------------------------------------------------


def test_command_line_over_file_over_defaults(load):
    train = load("train: {learning_rate: 1e-3, seed: 1}", "train.seed=2").train
    assert (train.weight_decay, train.learning_rate, train.seed) == (0.01, 1e-3, 2)


def test_the_last_of_two_settings_counts(load):
    assert load("", "train.seed=1", "train.seed=2").train.seed == 2


def test_without_a_file_the_built_in_experiment():
    assert config.load() == config.load(CONFIGS / "tiny.yaml")
    assert config.load().name == "tiny"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.arguments={logging_first_step: true}", {"logging_first_step": True}),
        ("tune.space={train.seed: {randint: [0, 9]}}", {"train.seed": {"randint": [0, 9]}}),
        ("model.config={model_type: gpt2}", {"model_type": "gpt2"}),
        ("cluster.resources_per_worker={memory: 1e9}", {"memory": 1e9}),
        ("tokenizer.train={vocab_size: 300}", {"vocab_size": 300}),
        ("tune.points=[{train.seed: 1}]", [{"train.seed": 1}]),
        ("tune.prior={train.seed: 1}", {"train.seed": 1}),
        ("tune.prior.train.seed=1", 1),
        ("cluster.num_workers=[1, 4]", [1, 4]),
        ("eval.paths={a: b}", {"a": "b"}),
    ],
)
def test_a_mapping_on_the_command_line_stays_one(setting, value):
    assert config.parse_setting(setting)[1] == value


@pytest.mark.parametrize("setting", ["corpus.paths=notes", "corpus.validation_paths=[a, b]", "corpus={paths: notes}"])
def test_nothing_of_the_example_applies_to_a_corpus_of_ones_own(setting):
    found, example = config.load(None, [setting]), config.load()
    for name in ("keep_any", "max_chars", "validation_fraction"):
        assert getattr(found.corpus, name) == config.CorpusConfig.model_fields[name].default
    for name in ("name", "tokenizer", "blocks", "model", "train", "tune"):
        assert getattr(found, name) == config.Experiment.model_fields[name].get_default(call_default_factory=True)
        assert getattr(found, name) != getattr(example, name)


def test_what_nobody_has_set_is_known():
    found = config.override(config.load(None, ["corpus.paths=notes", "train.seed=3"]), {"train.weight_decay": 0.0})
    assert found.train.model_fields_set == {"seed", "weight_decay"}
    assert found.model.model_fields_set == set()


def test_variables_of_mlflow_are_defaults_below_the_file(tmp_path, monkeypatch):
    file = tmp_path / "own.yaml"
    file.write_text("tracking: {experiment: from the file}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    found = config.load(file)
    assert (found.tracking.uri, found.tracking.experiment) == (f"sqlite:///{tmp_path}/mine.db", "from the file")
    assert config.from_environment(found) == {"tracking.uri": "MLFLOW_TRACKING_URI"}
    assert config.load().tracking.experiment == "from the environment"
    assert config.load(file, ["tracking.uri=null"]).tracking.uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert config.load(file).tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_an_empty_file_is_all_defaults(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = config.override(
        Experiment(), {"storage": str(tmp_path / "runs"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    )
    assert load("") == defaults


def test_a_setting_may_be_a_whole_section_or_a_part_of_one(load):
    assert load("", "train={seed: 3}").train.seed == 3
    assert load("tokenizer: {train: {vocab_size: 300}}", "tokenizer.train.min_frequency=7").tokenizer.train == (
        config.TrainedTokenizer(vocab_size=300, min_frequency=7)
    )
    assert load("model: {config: {model_type: gpt2}}", "model.config.n_layer=2").model.config == {
        "model_type": "gpt2",
        "n_layer": 2,
    }


def test_a_sampler_may_be_set_on_the_command_line(load):
    space = load("", "tune.space.train.learning_rate={uniform: [1e-3, 1e-2]}").tune.space
    assert space == {"train.learning_rate": {"uniform": [1e-3, 1e-2]}}


def test_override_leaves_the_original_alone(load):
    experiment = load("train: {learning_rate: 3e-3}\nblocks: {block_size: 128}")
    changed = config.override(experiment, {"blocks.block_size": 64, "train.learning_rate": 1e-3})
    assert (changed.blocks.block_size, changed.train.learning_rate) == (64, 1e-3)
    assert (experiment.blocks.block_size, experiment.train.learning_rate) == (128, 3e-3)


def test_override_checks_the_whole(load):
    with pytest.raises(ConfigError, match=r"train.batch_tokens: must be a multiple of .* = 100 x 1, got 2048"):
        config.override(load("train: {batch_tokens: 2048}"), {"blocks.block_size": 100})


def test_the_way_out_of_a_budget_below_one_step_is_one():
    """Without a file: of the built-in experiment, and of text whose sizes are derived where they are not given."""
    budget = ["train.max_tokens=10", "train.batch_tokens=512"]
    for text in ([], ["corpus.paths=words"]):
        with pytest.raises(ConfigError, match=r"got 10; raise it to that, or lower blocks\.block_size too: a step"):
            config.load(None, [*text, *budget])
        config.load(None, [*text, *budget, "train.max_tokens=512"])
    config.load(None, ["corpus.paths=words", *budget, "blocks.block_size=5", "train.batch_tokens=10"])


def test_nothing_changes_a_loaded_experiment():
    experiment = config.load()
    with pytest.raises(ValidationError, match="frozen"):
        experiment.train.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        experiment.train = config.TrainConfig()


def test_sections_refuse_extra_keys_in_code_too():
    with pytest.raises(ValidationError, match="extra"):
        config.TrainConfig(learning_rte=1)


# Settings that exclude each other ----------------------------------------------------------------------------------

EXCLUSIVE = {
    "train": ("max_tokens", "400_000", "num_epochs", "2"),
    "tokenizer": ("path", "some/where", "train", "{vocab_size: 300}"),
    "model": ("path", "some/where", "config", "{model_type: gpt2}"),
}


@pytest.mark.parametrize("section", EXCLUSIVE)
def test_exclusive_settings_of_one_layer_are_a_fault(faults, section):
    one, value, other, other_value = EXCLUSIVE[section]
    expected = f"{section}.{other}: excludes {one}; give one of them"
    assert faults(f"{section}:\n  {one}: {value}\n  {other}: {other_value}") == [f"my.yaml:3:3 {expected}"]
    settings = (f"{section}.{one}={value}", f"{section}.{other}={other_value}")
    assert faults("", *settings) == [f"command line: {expected}"]
    assert faults("", *reversed(settings)) == [f"command line: {expected}"]


@pytest.mark.parametrize("section", EXCLUSIVE)
def test_a_later_layer_replaces_what_its_setting_excludes(load, section):
    one, value, other, other_value = EXCLUSIVE[section]
    for first, first_value, second, second_value in (
        (one, value, other, other_value),
        (other, other_value, one, value),
    ):
        experiment = load(f"{section}: {{{first}: {first_value}}}", f"{section}.{second}={second_value}")
        assert config.get(experiment, f"{section}.{first}") is None
        assert config.get(experiment, f"{section}.{second}") is not None


@pytest.mark.parametrize("name", ["eos_token", "revision", "gguf_file"])
def test_what_chooses_of_a_loaded_tokenizer_is_refused_for_one_that_is_trained(load, name):
    """It would say nothing, and the user would believe that it did."""
    with pytest.raises(ConfigError, match=rf"tokenizer\.{name}: .* with tokenizer\.train, got nonsense; "):
        load("tokenizer: {train: {vocab_size: 300}}", f"tokenizer.{name}=nonsense")
    with pytest.raises(ConfigError, match=r"got x; name it first in tokenizer\.train\.special_tokens instead"):
        load("tokenizer: {train: {vocab_size: 300}, eos_token: x}")


@pytest.mark.parametrize("export", ["adapter", "both"])
def test_an_adapter_is_exported_of_a_base_model_that_peft_loads(load, export):
    lora = f"model.lora={{export: {export}}}"
    assert load("model: {path: gpt2}", lora).model.lora.export == export
    with pytest.raises(ConfigError, match=f"model.lora.export: must be merged with model.gguf_file, got {export}: "):
        load("model: {path: gpt2, gguf_file: a.gguf}", lora)
    with pytest.raises(ConfigError, match=f"model.lora.export: must be merged without model.path, got {export}: "):
        load("model: {config: {model_type: gpt2}}", lora)


def test_override_replaces_what_it_excludes(load):
    experiment = load("train: {max_tokens: 400_000}")
    train = config.override(experiment, {"train.num_epochs": 2.0}).train
    assert (train.num_epochs, train.max_tokens) == (2.0, None)
    with pytest.raises(ConfigError, match=r"train.num_epochs: excludes max_tokens"):
        config.override(experiment, {"train.num_epochs": 2.0, "train.max_tokens": 400_000})


# Faults ------------------------------------------------------------------------------------------------------------

TRAIN_TAKES = "section train takes: " + ", ".join(config.TrainConfig.model_fields)

FAULTS = {
    "train:\n  learning_rte: 1": f"2:3 train.learning_rte: unknown key, did you mean learning_rate? {TRAIN_TAKES}",
    "train: {zzz: 1}": f"1:9 train.zzz: unknown key; {TRAIN_TAKES}",
    "learning_rate: 1": "1:1 learning_rate: unknown key, did you mean train.learning_rate? an experiment takes: "
    + ", ".join(Experiment.model_fields),
    "tokenizer:\n  train: {vocab: 1}": "2:11 tokenizer.train.vocab: unknown key, did you mean vocab_size? "
    "section tokenizer.train takes: kind, vocab_size, min_frequency, special_tokens",
    "train: 5": "1:1 train: must be a section (key: value), got 5",
    "train:": "1:1 train: must be a section (key: value), got null",
    "train: {seed: x}": "1:9 train.seed: must be a whole number, got 'x'",
    "train: {seed: 1.5}": "1:9 train.seed: must be a whole number, got 1.5",
    "train: {seed: true}": "1:9 train.seed: must be a whole number, got true",
    "train: {seed: -1}": "1:9 train.seed: must be at least 0, got -1",
    'train: {learning_rate: "3e-4"}': "1:9 train.learning_rate: must be a number, got '3e-4'",
    "train: {learning_rate: 0}": "1:9 train.learning_rate: must be more than 0.0, got 0",
    "train: {learning_rate: .nan}": "1:9 train.learning_rate: must be a finite number, got nan",
    "train: {learning_rate: .inf}": "1:9 train.learning_rate: must be a finite number, got inf",
    "train: {arguments: 5}": "1:9 train.arguments: must be a mapping (key: value), got 5",
    "corpus: {validation_fraction: 1}": "1:10 corpus.validation_fraction: must be less than 1.0, got 1",
    "corpus: {test_fraction: 1}": "1:10 corpus.test_fraction: must be less than 1.0, got 1",
    "corpus: {test_fraction: -0.1}": "1:10 corpus.test_fraction: must be at least 0.0, got -0.1",
    "corpus: {validation_fraction: 0.4, test_fraction: 0.6}": "1:36 corpus.test_fraction: must leave text to train on: "
    "less than 1 - corpus.validation_fraction = 0.6, got 0.6",
    "corpus: {paths: 5}": "1:10 corpus.paths: must be text, a list of texts or a mapping of names to them, got 5",
    "corpus: {paths: [a, 5]}": "1:10 corpus.paths: must be text, a list of texts or a mapping of names to them, got "
    "['a', 5]",
    "corpus: {deduplicate: maybe}": "1:10 corpus.deduplicate: must be one of false, 'exact' or 'near', got 'maybe'",
    "corpus: {tokens: ids}": "1:10 corpus.tokens: must come with tokenizer.path, the directory or Hub id of the "
    "tokenizer that made them",
    "corpus: {tokens: ids, min_chars: 5}": "1:23 corpus.min_chars: is for text and cannot be given with corpus.tokens; "
    "leave it out",
    "corpus: {tokens: ids, split_by: passage}": "1:23 corpus.split_by: must be document with corpus.tokens, "
    "got passage: token ids are not cut",
    "corpus: {tokens: ids}\ntokenizer: {train: {}}": "2:13 tokenizer.train: cannot be given with corpus.tokens: the "
    "ids are of the tokenizer that made them; give its directory or Hub id as tokenizer.path",
    "cluster: {use_gpu: 1}": "1:11 cluster.use_gpu: must be true or false, got 1",
    "name: a/b": "1:1 name: must be letters, digits, dashes, dots and underscores, with a letter or digit first; got "
    "'a/b'; try a-b",
    "name: _é ö_": "1:1 name: must be letters, digits, dashes, dots and underscores, with a letter or digit first; got "
    "'_é ö_'; try e-o",
    "tune: {metric: loss}": "1:8 tune.metric: must be perplexity, bits_per_byte or weights of sources and sets, "
    "{a: 1, b: 2}; got 'loss'",
    "tune: {metric: {a: 0}}": "1:8 tune.metric: must have a weight above 0 for a, got 0",
    "tune: {space: {train.learning_rate: [1e-4, 1e-2]}}": "1:16 tune.space.train.learning_rate: must be a sampler, "
    "got [0.0001, 0.01]; {choice: [a, b]} draws one of these values, {uniform: [low, high]} or {loguniform: [low, "
    "high]} any between",
    "tune: {scheduler: foo}": "1:8 tune.scheduler.kind: must be one of 'none', 'asha', 'median', 'hyperband' or 'pbt', "
    "got 'foo'",
    "blocks: {block_size: 100}\ntrain: {batch_tokens: 1000, max_tokens: 999}": "2:29 train.max_tokens: must be at "
    "least one optimizer step, train.batch_tokens = 1000, got 999; lower train.batch_tokens too, to a multiple of 100",
    "blocks: {block_size: 100}\ntrain: {batch_tokens: 1000, max_tokens: 99}": "2:29 train.max_tokens: must be at "
    "least one optimizer step, train.batch_tokens = 1000, got 99; raise it to that, or lower blocks.block_size too: a "
    "step has at least blocks.block_size x cluster.num_workers = 100 x 1 tokens",
    "eval: {paths: 5}": "1:8 eval.paths: must be text, a list of texts or a mapping of names to them, got 5",
    "eval: {paths: [5]}": "1:8 eval.paths: must be text, a list of texts or a mapping of names to them, got [5]",
    "eval: {paths: {a b: c}}": "1:8 eval.paths: must have names of letters, digits, dots, dashes, underscores; "
    "got 'a b'",
    "eval: {paths: {a: []}}": "1:8 eval.paths: must have text or a list of texts for a, got []",
    "eval: {paths: {a: {b: c}}}": "1:8 eval.paths: must have text or a list of texts for a, got {'b': 'c'}",
    "blocks: {block_size: 100}": "1:10 train.batch_tokens: must be a multiple of blocks.block_size x "
    "cluster.num_workers = 100 x 1, got 32768; nearest: 32800",
    "- a": "1:1 an experiment is made of sections (key: value), got ['a']",
    "text": "1:1 an experiment is made of sections (key: value), got 'text'",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_says_where_and_what_is_accepted(faults, text):
    assert faults(text) == [f"my.yaml:{FAULTS[text]}"]


COMMAND_LINE_FAULTS = {
    "train.sed=1": f"command line: train.sed: unknown key, did you mean seed? {TRAIN_TAKES}",
    "train.seed=x": "command line: train.seed: must be a whole number, got 'x'",
    "train.seed=": "command line: train.seed: must be a whole number, got null",
    "train.seed.x=1": "command line: train.seed: must be a whole number, got {'x': 1}",
    "train.seed": "'train.seed' is not a setting; write section.key=value",
    "=1": "'=1' is not a setting; write section.key=value",
    "train.seed=[1": "train.seed=[1: ] is missing at its end",
    "train.seed=!!python/name:os.system": "train.seed=!!python/name:os.system: the value is not YAML: "
    "could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
}


@pytest.mark.parametrize("setting", COMMAND_LINE_FAULTS)
def test_a_fault_on_the_command_line(faults, setting):
    assert faults("train: {learning_rate: 1e-3}", setting) == [COMMAND_LINE_FAULTS[setting]]


def test_all_faults_at_once(faults):
    text = """\
trian: {}
tokenizer: {path: a, train: {vocab_size: 5}}
train:
  seed: x
  learning_rate: -1
  max_tokens: 5
  num_epochs: 3
tune:
  space:
    train.seed: {chioce: [1, 2]}
"""
    told = [
        re.match(r"(my\.yaml:\d+:\d+|command line:) (\S+): ", line).groups()
        for line in faults(text, "blocks.block_size=1")
    ]
    assert sorted(told) == [
        ("command line:", "blocks.block_size"),
        ("my.yaml:10:5", "tune.space.train.seed"),
        ("my.yaml:1:1", "trian"),
        ("my.yaml:2:22", "tokenizer.train"),
        ("my.yaml:2:30", "tokenizer.train.vocab_size"),
        ("my.yaml:4:3", "train.seed"),
        ("my.yaml:5:3", "train.learning_rate"),
        ("my.yaml:7:3", "train.num_epochs"),
    ]


def test_where_is_the_first_faulty_key(load):
    with pytest.raises(ConfigError) as caught:
        load("train: {seed: x}\nname: a/b")
    assert caught.value.where == "name"  # in the order of the sections
    with pytest.raises(ConfigError) as caught:
        load("tune: {space: {train.seed: {choice: [1]}, train.learning_rate: {choice: [x]}}}")
    assert caught.value.where == "tune.space.train.learning_rate"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*nowhere.yaml: No such file"):
        config.load(tmp_path / "nowhere.yaml")


# YAML --------------------------------------------------------------------------------------------------------------


def test_yaml_1_2(load):
    train = load("train: {learning_rate: 3e-4, max_tokens: 1e6, batch_tokens: 32_768}").train
    assert (train.learning_rate, train.max_tokens, train.batch_tokens) == (3e-4, 1_000_000, 32_768)
    assert isinstance(train.max_tokens, int)
    assert load("corpus: {keep_any: [no, on, 1:30]}").corpus.keep_any == ("no", "on", "1:30")  # texts, not YAML 1.1's


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "duplicate key": ("train:\n  seed: 1\n  seed: 2", 'my.yaml:3:3 found duplicate key "seed" with value "2"'),
    "tab": ("train:\n\tseed: 1", "my.yaml:2:1 found character '\\t' that cannot start any token"),
    "unclosed": ("train: {seed: 1", "my.yaml:1:16 expected ',' or '}'"),
    "python tag": ("name: !!python/object/apply:os.getcwd []", "my.yaml:1:7 could not determine a constructor"),
    "own tag": ("name: !env HOME", "my.yaml:1:7 could not determine a constructor for the tag '!env'"),
    "two documents": ("name: a\n---\nname: b", "my.yaml:2:1 but found another document"),
    "control character": ("name: a\x00b", "my.yaml: unacceptable character #x0000"),
    "alias bomb": (BOMB, "my.yaml: more than 100000 values; are there aliases of aliases?"),
    "alias of itself": ("model: {config: &a {b: *a}}", "my.yaml: nested too deeply; is an alias inside of its own"),
    "deep nesting": ("name: " + "[" * 800, "my.yaml: nested too deeply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_that_is_refused(faults, case):
    text, expected = REFUSED[case]
    (told,) = faults(text)
    assert told.startswith(expected)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"my.yaml: 'utf-8' codec"):
        config.load(tmp_path / "my.yaml")


def test_an_ordinary_alias_is_welcome(load):
    space = load("tune: {space: {train.seed: &s {choice: [1, 2]}, model.config.n_layer: *s}}").tune.space
    assert space["model.config.n_layer"] == {"choice": [1, 2]}


# The search space --------------------------------------------------------------------------------------------------

NOT_SWEPT = "is one for a whole sweep; sweep model, blocks, objective or train settings"
SAMPLERS = ", ".join(f"{name} {arguments}" for name, arguments in config.SAMPLERS.items())
SPACE_FAULTS = {
    "train.learning_rte: {uniform: [1e-3, 1e-2]}": "value 0.001: train.learning_rte: unknown key, "
    f"did you mean learning_rate? {TRAIN_TAKES}",
    "train.seed: {}": f"takes one sampler, got {{}}; samplers: {SAMPLERS}",
    "train.seed: {choice: [1], grid: [1]}": "takes one sampler, got {'choice': [1], 'grid': [1]}; "
    f"samplers: {SAMPLERS}",
    "train.seed: {chioce: [1]}": f"unknown sampler chioce, did you mean choice? samplers: {SAMPLERS}",
    "train.seed: {choice: []}": "choice takes [a, b, ...], drawn, got []",
    "train.seed: {grid: 3}": "grid takes [a, b, ...], all of them, got 3",
    "train.weight_decay: {uniform: [0.2, 0.1]}": "uniform takes [low, high] with low < high, got [0.2, 0.1]",
    "train.weight_decay: {uniform: [0, x]}": "uniform takes [low, high] with low < high, got [0, 'x']",
    "train.weight_decay: {quniform: [0, 1]}": "quniform takes [low, high, step] with low < high, got [0, 1]",
    "train.learning_rate: {loguniform: [0, 1]}": "loguniform needs low > 0, got 0",
    "train.learning_rate: {uniform: [-1, 1]}": "value -1: train.learning_rate: must be more than 0.0, got -1",
    "train.learning_rate: {choice: [1e-3, x]}": "value 'x': train.learning_rate: must be a number, got 'x'",
    "blocks.block_size: {grid: [64, 100]}": "value 100: train.batch_tokens: must be a multiple of blocks.block_size x "
    "cluster.num_workers = 100 x 1, got 32768; nearest: 32800",
    "train.seed: {randint: [-2, 3]}": "value -2: train.seed: must be at least 0, got -2",
    "cluster.num_workers: {choice: [1, 2]}": f"cluster {NOT_SWEPT}",
    "storage: {choice: [a, b]}": f"storage {NOT_SWEPT}",
}


@pytest.mark.parametrize("entry", SPACE_FAULTS)
def test_a_fault_in_the_space(faults, entry):
    assert faults(f"tune:\n  space:\n    {entry}") == [
        f"my.yaml:3:5 tune.space.{entry.split(':')[0]}: {SPACE_FAULTS[entry]}"
    ]


def test_every_value_of_the_space_is_tried(faults):
    told = faults("tune:\n  space:\n    blocks.block_size: {grid: [64, 1, 128, x]}\n    train.seed: {choice: [1, y]}")
    assert told == [
        "my.yaml:3:5 tune.space.blocks.block_size: value 1: blocks.block_size: must be at least 2, got 1",
        "my.yaml:3:5 tune.space.blocks.block_size: value 'x': blocks.block_size: must be a whole number, got 'x'",
        "my.yaml:4:5 tune.space.train.seed: value 'y': train.seed: must be a whole number, got 'y'",
    ]


def test_every_sampler_is_accepted(load):
    text = """\
tune:
  space:
    train.learning_rate: {loguniform: [1e-4, 1e-2]}
    train.warmup_steps: {uniform: [0.0, 0.2]}
    train.weight_decay: {quniform: [0, 0.2, 0.05]}
    train.seed: {randint: [0, 10]}
    train.micro_batch_tokens: {lograndint: [64, 8192]}
    blocks.block_size: {choice: [64, 128]}
    model.config.n_layer: {grid: [2, 4]}
"""
    space = load(text).tune.space
    assert {name for sampler in space.values() for name in sampler} == set(config.SAMPLERS)


def test_the_upper_end_of_whole_numbers_is_not_drawn(load, faults):
    """128 divides train.batch_tokens, 129 does not."""
    load("tune: {space: {blocks.block_size: {randint: [64, 129]}}}")
    (told,) = faults("tune: {space: {blocks.block_size: {randint: [64, 130]}}}")
    assert "value 129: train.batch_tokens: must be a multiple" in told


# Saving ------------------------------------------------------------------------------------------------------------

AWKWARD = """\
name: a.b-c_1
storage: "s3://bucket/#1"
corpus:
  paths: ["data/[ab]*.txt", "# not a comment", "a: b", "null", "3e-4", "yes", "é ✓", " space ", "two\\nlines", "\\t"]
  keep_any: []
model: {config: {model_type: gpt2, nested: {deep: [1, 2.5, null, true, "true"]}, empty: {}}}
train: {learning_rate: 1e-20, arguments: {lr_scheduler_kwargs: {num_cycles: 2}}}
tracking: {uri: null}
tune: {space: {train.learning_rate: {loguniform: [1e-4, 1e-2]}, train.lr_scheduler_type: {choice: [linear, cosine]}}}
"""


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("source", ["built-in", "awkward"])
def test_what_is_dumped_loads_again(load, source, comments):
    experiment = config.load() if source == "built-in" else load(AWKWARD)
    text = config.dump(experiment, comments=comments)
    assert load(text) == experiment
    assert config.dump(load(text), comments=comments) == text


def described(section):
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield from described(value) if isinstance(value, BaseModel) else [(name, field.description)]


def test_comments_explain_every_setting():
    comments = re.sub(r"\n *# ", "\n", config.dump(config.load(), comments=True))
    for name, description in described(config.load()):
        assert description, f"{name} has no docstring"
        assert f"{description}\n" in comments


def test_save_writes_what_load_reads(tmp_path):
    config.save(config.load(), tmp_path / "experiment.yaml")
    assert config.load(tmp_path / "experiment.yaml") == config.load()


# Paths -------------------------------------------------------------------------------------------------------------


def test_local_paths_become_absolute(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "here").mkdir()
    here = str(tmp_path)
    experiment = load(
        "storage: out\ncorpus: {paths: [a/*.txt, ~/b, python://stdlib, s3://c], validation_paths: d, test_paths: h}\n"
        "eval: {paths: e}\ntokenizer: {path: ./f}\nmodel: {path: here}\ntracking: {uri: sqlite:///g.db}"
    )
    assert experiment.storage == f"{here}/out"
    assert experiment.corpus.paths == (f"{here}/a/*.txt", "/home/me/b", "python://stdlib", "s3://c")
    assert experiment.corpus.validation_paths == (f"{here}/d",)
    assert experiment.corpus.test_paths == (f"{here}/h",)
    assert experiment.eval.paths == (f"{here}/e",)
    assert experiment.tokenizer.path == f"{here}/f"
    assert experiment.model.path == f"{here}/here"
    assert experiment.tracking.uri == f"sqlite:///{here}/g.db"


def test_evaluation_sets_have_names_or_are_one(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert load("").eval.sets == load("eval: {paths: {}}").eval.sets == {}
    one = load("eval: {paths: [a, s3://b]}").eval
    assert one.sets == {"eval": (f"{here}/a", "s3://b")}
    assert one.key("eval") == "eval.paths"
    several = load("eval: {paths: {books: a/*.txt, code.v2: [b, python://json]}}", "eval.paths.v1.1=c")
    expected = {"books": (f"{here}/a/*.txt",), "code.v2": (f"{here}/b", "python://json"), "v1.1": (f"{here}/c",)}
    assert several.eval.sets == expected
    assert several.eval.key("code.v2") == "eval.paths.code.v2"
    assert config.get(several, "eval.paths.code.v2") == expected["code.v2"]
    config.save(several, tmp_path / "saved.yaml")
    assert config.load(tmp_path / "saved.yaml") == several
    assert load("eval: {paths: a}", "eval.paths.b=c").eval.sets == {"b": (f"{here}/c",)}


def test_names_that_are_no_local_paths_stay(load):
    experiment = load(
        "model: {path: org/a-model}\ntracking: {uri: 'https://mlflow.example'}\nstorage: gs://bucket/runs"
    )
    assert (experiment.model.path, experiment.tracking.uri, experiment.storage) == (
        "org/a-model",
        "https://mlflow.example",
        "gs://bucket/runs",
    )


# What people rely on -----------------------------------------------------------------------------------------------

FIXED_NAMES = """
name storage
corpus.paths corpus.text corpus.validation_paths corpus.validation_fraction corpus.keep_any corpus.max_documents
tokenizer.path tokenizer.train.kind tokenizer.train.vocab_size tokenizer.train.min_frequency
tokenizer.train.special_tokens
blocks.block_size blocks.packing
model.path model.config model.config.model_type model.config.n_layer
objective.kind
train.learning_rate train.warmup_steps train.weight_decay train.lr_scheduler_type train.batch_tokens train.max_tokens
train.num_epochs train.seed train.eval_every_tokens train.save_every_tokens train.arguments
eval.paths eval.stride eval.batch_tokens eval.max_tokens
cluster.address cluster.num_workers cluster.use_gpu cluster.cpus_per_worker cluster.gpus_per_worker
cluster.resources_per_worker cluster.accelerator_type cluster.placement_strategy
tracking.uri tracking.experiment
tune.space tune.space.train.learning_rate tune.space.train.warmup_steps tune.space.blocks.block_size
tune.num_samples tune.scheduler tune.searcher tune.metric tune.max_concurrent_trials
""".split()


@pytest.mark.parametrize("name", FIXED_NAMES)
def test_names_that_scripts_rely_on(name):
    """Renaming one breaks people's files; `get` raises if it is gone, and gives None for an entry of a mapping."""
    value = config.get(config.load(), name)
    if name.startswith(("tune.space.", "model.config.")):
        assert value is not None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path):
    """Its tune.space with it: load tries every value."""
    assert config.load(path).name == path.stem


def test_the_built_in_experiment_is_a_file_of_configs():
    assert config.BUILT_IN.read_text() == (CONFIGS / "tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("corpus.text={weird}", "{weird}"),
        ("tokenizer.eos_token=[SEP]", "[SEP]"),
        ("corpus.text='{a}: {b}'", "{a}: {b}"),
        ('corpus.separator="\\n"', "\n"),
        ("corpus.separator=\n\n", "\n\n"),
        ("corpus.separator= ", " "),
        ("corpus.separator=", None),
        ("corpus.separator=null", None),
        ("corpus.join=", ""),
        ("name=2024", "2024"),
        ("corpus.keep_matching=a: [b", "a: [b"),
        ("corpus.paths=[a.txt, b.txt]", ["a.txt", "b.txt"]),
        ("corpus.paths={a,b}/*.txt", "{a,b}/*.txt"),
        ("corpus.paths=*.txt", "*.txt"),
        ("corpus.paths=2024-99-99", "2024-99-99"),
        ("corpus.paths=caf\udce9.txt", "caf\udce9.txt"),
        ("eval.paths={books: a.txt}", {"books": "a.txt"}),
        ("eval.paths={a,b}.txt", "{a,b}.txt"),
        ("eval.paths.books={a,b}.txt", "{a,b}.txt"),
        ("tokenizer.train.special_tokens=[SEP]", ["SEP"]),
        ("tokenizer.train={}", {}),
        ("train.seed=5", 5),
        ("model.config={model_type: gpt2}", {"model_type": "gpt2"}),
    ],
)
def test_where_a_text_is_wanted_it_stays_as_it_was_typed(setting, value):
    assert config.parse_setting(setting) == (setting.partition("=")[0], value)


@pytest.mark.parametrize(
    ("setting", "missing"),
    [
        ("corpus.paths=[a.txt,b.txt", "]"),
        ("corpus.paths={a,b/*.txt", "}"),
        ("eval.paths.books=[a.txt", "]"),
        ("eval.paths={books: [a.txt", "]}"),
        ("tokenizer.train.special_tokens=[<eos>, '<[mask]>'", "]"),
        ("tune.space.train.seed={randint: [0, 9]", "}"),
        ("cluster.num_workers=[1, 4", "]"),
        ("train.seed=[1", "]"),
        ("corpus={paths: [a.txt]", "}"),
    ],
)
def test_a_bracket_that_is_not_closed_is_no_part_of_a_name(setting, missing):
    with pytest.raises(ConfigError) as caught:
        config.parse_setting(setting)
    assert caught.value.message.startswith(f"{setting}: {missing} is missing at its end")
    assert caught.value.where == setting.partition("=")[0]


def test_a_name_may_begin_with_a_bracket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[draft.txt", "{a.txt"):
        (tmp_path / name).touch()
        assert config.parse_setting(f"corpus.paths={name}")[1] == name
        assert config.parse_setting(f"corpus.paths='{name[:3]}*'")[1] == f"{name[:3]}*"
    for setting in ("corpus.paths=[ab]*.txt", "corpus.text=[{question", "name=[1", "tokenizer.eos_token=[EOS"):
        assert config.parse_setting(setting)[1] == setting.partition("=")[2]


def test_escapes_are_understood_however_they_are_quoted(load):
    for setting in ("corpus.separator=\\n\\n", "corpus.separator='\\n\\n'", 'corpus.separator="\\n\\n"'):
        assert load("", setting).corpus.separator == "\n\n"
    assert load("corpus: {separator: '\\n'}").corpus.separator == "\n"
    assert load("", "corpus.text=Q: {q}\\nA: {a}").corpus.text == "Q: {q}\nA: {a}"
    assert load("", "corpus.keep_matching=\\n\\d").corpus.keep_matching == "\\n\\d"  # re has its own


def test_a_file_to_start_from_has_the_default_places_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = config.load({})
    assert experiment.storage == f"{tmp_path}/runs"
    text = config.dump(experiment, comments=True)
    assert "storage: runs\n" in text
    assert "uri: sqlite:///mlflow.db\n" in text
    (tmp_path / "printed.yaml").write_text(text)
    assert config.load(tmp_path / "printed.yaml") == experiment
    assert f"storage: {tmp_path}/runs\n" in config.dump(experiment), "beside a checkpoint it is where the run was"
    elsewhere = config.load({"storage": "/data/runs"})
    assert "storage: /data/runs\n" in config.dump(elsewhere, comments=True)


def test_a_file_in_the_place_of_a_setting_is_told_how_to_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.yaml").touch()
    Path("notes").mkdir()
    for file, way_out in (("notes.yaml", "--config notes.yaml"), ("notes", "corpus.paths=notes")):
        with pytest.raises(ConfigError, match=f"did you mean {way_out}?"):
            config.parse_setting(file)
    with pytest.raises(ConfigError, match="write section.key=value$"):
        config.parse_setting("nothing")


def test_a_trial_has_no_settings_that_say_how_settings_are_drawn():
    """Or it would be refused: its points and its prior have keys that its space does not have."""
    drawn = {
        "tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "tune.points": [{"train.learning_rate": 2e-3}],
        "tune.prior": {"train.learning_rate": 1e-3},
    }
    trial = config.of_trial(config.load(None, drawn), {"train.learning_rate": 5e-3})
    assert trial.train.learning_rate == 5e-3
    assert (trial.tune.space, trial.tune.points, trial.tune.prior) == ({}, (), {})
