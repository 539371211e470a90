"""The JSON schema accepts what raylm accepts, and refuses the mistakes that it can know of."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from ruamel.yaml import YAML

from raylm import config
from raylm.errors import ConfigError

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "tests" / "golden" / "print-config.yaml"]
SCHEMA = config.json_schema()
VALIDATOR = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)


def faults(tree):
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(tree)]


def is_accepted(tree):
    try:
        config.load(tree)
    except ConfigError:
        return False
    return True


def test_the_schema_is_one():
    VALIDATOR.check_schema(SCHEMA)


@pytest.mark.parametrize("read", [YAML(typ="safe", pure=True).load, yaml.safe_load], ids=["YAML 1.2", "YAML 1.1"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_file_fits_the_schema(file, read):
    assert faults(read(file.read_text(encoding="utf-8"))) == []


def test_every_setting_has_its_help():
    assert SCHEMA["properties"].keys() == config.Experiment.model_fields.keys()
    section = SCHEMA["$defs"]["TrainConfig"]
    assert section["properties"]["learning_rate"] == {
        "type": ["number", "string"],
        "pattern": section["properties"]["learning_rate"]["pattern"],
        "patternErrorMessage": "must be a number",
        "exclusiveMinimum": 0,
        "default": 5e-4,
        "description": "Peak learning rate of the schedule.",
    }


SAMPLER = {"uniform": [0.1, 0.2]}

ACCEPTED = """
    {}
    {corpus: {paths: a.txt, keep_any: import, deduplicate: true, split_by: null}}
    {corpus: {paths: {books: a.txt, code: [b, c]}}, blocks: {mixture: {books: 2, code: 1}}}
    {corpus: {paths: []}, eval: {paths: {books: a}}}
    {train: {max_tokens: 1e6, learning_rate: 1, compile: true}}
    {train: {max_tokens: null, num_epochs: 2.5, compile: "off"}}
    {train: {arguments: {adam_beta1: 0.8}}, model: {config: {model_type: gpt2}, lora: null}}
    {model: {path: gpt2, config: null, lora: {}}}
    {tokenizer: {train: {}}}
    {cluster: {num_workers: [2, 2.0], cpus_per_worker: auto, resources_per_worker: {memory: 1e9}}}
    {objective: {sentinels: [a, b, c]}}
    {tune: {scheduler: none}}
    {tune: {scheduler: {kind: asha, reduction_factor: 3}}}
    {tune: {metric: bits_per_byte, stop: {seconds: 60}}}
    {tune: {space: {train.learning_rate: {loguniform: [0.0001, 1]}, blocks.block_size: {choice: [64, 128]}}}}
    {tune: {space: {train.seed: {quniform: [1, 9, 2]}, train.arguments.adam_beta1: {grid: [0.8, 0.9]}}}}
    {tune: {space: {sizes: {choice: [{blocks.block_size: 64}, {blocks.block_size: {randint: [2, 9]}}]}}}}
    {tune: {space: {model.config: {choice: [{model_type: gpt2}, {model_type: gpt2, n_layer: 2}]}}}}
"""

REFUSED = """
    {trian: {}}
    {train: {learning_rte: 1}}
    {train: null}
    {name: a b}
    {train: {max_tokens: 0}}
    {train: {max_tokens: 1M}}
    {train: {max_tokens: 1.5}}
    {train: {seed: "7"}}
    {train: {learning_rate: null}}
    {train: {learning_rate: 0}}
    {train: {precision: bf16}}
    {train: {compile: yes please}}
    {train: {max_tokens: 1000000, num_epochs: 1}}
    {model: {path: gpt2, config: {model_type: gpt2}}}
    {corpus: {paths: 7}}
    {corpus: {paths: {a b: c.txt}}}
    {corpus: {validation_fraction: 1}}
    {corpus: {deduplicate: almost}}
    {objective: {sentinels: [a, b]}}
    {cluster: {num_workers: 0}}
    {cluster: {num_workers: [1, 2, 3]}}
    {cluster: {cpus_per_worker: 0}}
    {tune: {scheduler: ash}}
    {tune: {scheduler: {grace_tokens: 0}}}
    {tune: {metric: loss}}
    {tune: {space: {train.learning_rate: [0.1, 0.2]}}}
    {tune: {space: {train.learning_rate: 0.1}}}
    {tune: {space: {train.learning_rate: {normal: [0.1, 0.2]}}}}
    {tune: {space: {train.learning_rate: {uniform: [0.1, 0.2], choice: [1]}}}}
    {tune: {space: {train.learning_rate: {choice: [0, 1]}}}}
    {tune: {space: {train.learning_rate: {uniform: [0.1]}}}}
    {tune: {space: {train.learning_rte: {uniform: [0.1, 0.2]}}}}
    {tune: {space: {corpus.max_documents: {choice: [1, 2]}}}}
"""


def trees(text):
    read = YAML(typ="safe", pure=True).load
    return [pytest.param(read(line), id=line) for line in text.strip().splitlines() for line in [line.strip()]]


@pytest.mark.parametrize("tree", trees(ACCEPTED))
def test_what_raylm_accepts_fits_the_schema(tree):
    tree = json.loads(json.dumps(tree))
    assert is_accepted(tree)
    assert faults(tree) == []


@pytest.mark.parametrize("tree", trees(REFUSED))
def test_a_typical_mistake_does_not_fit_the_schema(tree):
    assert not is_accepted(tree)
    assert faults(tree)


@pytest.mark.parametrize("number", ["81_920", "1_0.5", "1e-3", "2.5e6"])
def test_a_number_that_a_reader_of_yaml_leaves_as_text_fits_the_schema(number, tmp_path):
    """An editor may read YAML otherwise than raylm does."""
    (tmp_path / "a.yaml").write_text(f"train: {{learning_rate: {number}}}\n")
    assert config.load(tmp_path / "a.yaml").train.learning_rate == float(number)
    assert faults({"train": {"learning_rate": number}}) == []
