"""What raylm gives must not change by accident: numbers, words and shapes beside files that were made before.

    tests/golden/losses.json            the training loss of ten steps, for each objective and packing
                 perplexity.json        the scores of fixed models on a fixed text
                 help/VERB.txt          `raylm VERB --help`
                 print-config.yaml      `raylm train --print-config`: the built-in experiment
                 json/VERB.json         the shape of each verb's --json: keys, and types in the place of values
                 manifest.json          a token store's manifest
                 events.json            the kinds of lines of a sweep's record
                 files.json             the other files of a sweep, of a trial and of a checkpoint: their shapes

To make the files again where a change is meant:

    UPDATE_GOLDEN=1 pytest tests/test_golden.py

Every file that has become another one then fails its test once, naming it; the commit that has it says why.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raylm.__main__ import VERBS

GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 1e-5
"""Relative, of numbers. The same code on CPUs with other vector instructions differs by less."""


def check(name, found, same=None):
    """That what was found is in the golden file: text as it stands, all else as JSON, in which `same` compares."""
    file = GOLDEN / name
    text = found if isinstance(found, str) else json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    known = file.read_text(encoding="utf-8") if file.exists() else None
    if known is not None and (text == known or (same is not None and same(json.loads(known), found))):
        return
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        pytest.fail(f"tests/golden/{name} was made again; look at its diff", pytrace=False)
    assert known is not None, f"tests/golden/{name} is missing; see the top of this file"
    if isinstance(found, str):
        assert text == known
    assert found == json.loads(known)


def near(known, found):
    """Whether two trees are the same, but for the last digits of their numbers."""
    if isinstance(known, dict) and isinstance(found, dict):
        return known.keys() == found.keys() and all(near(known[key], found[key]) for key in known)
    if isinstance(known, list) and isinstance(found, list):
        return len(known) == len(found) and all(map(near, known, found))
    if isinstance(known, float) and isinstance(found, float):
        return math.isclose(known, found, rel_tol=TOLERANCE)
    return known == found


# Losses --------------------------------------------------------------------------------------------------------------

SPECIAL = "tokenizer.train.special_tokens=['<|endoftext|>', '<mask>', '<fim_prefix>', '<fim_middle>', '<fim_suffix>']"
BERT = (
    "model.config={model_type: bert, num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, "
    "intermediate_size: 32}"
)

TRAININGS = {
    "causal": ["objective.kind=causal"],
    "causal, chunked": ["objective.kind=causal", "blocks.packing=chunked"],
    "causal, padded": ["objective.kind=causal", "blocks.packing=padded"],
    "causal, isolated documents": ["objective.kind=causal", "blocks.isolate_documents=true"],
    "causal, accumulated": ["objective.kind=causal", "train.micro_batch_tokens=64"],
    "causal, smoothed labels": ["objective.kind=causal", "train.arguments.label_smoothing_factor=0.1"],
    "causal, low-rank updates": ["objective.kind=causal", "model.lora={r: 2}"],
    "keyword_weighted": ["objective={kind: keyword_weighted, keywords: [cat, far]}"],
    "keyword_weighted, not normalized": ["objective={kind: keyword_weighted, keywords: [cat], normalize: false}"],
    "masked": ["objective.kind=masked", BERT, SPECIAL],
    "fill_in_middle": ["objective.kind=fill_in_middle", "blocks.packing=padded", SPECIAL],
}


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_the_losses_of_ten_steps(train_run, tiny, tracking_uri):
    # A rate at which rounding, which CPUs do differently, stays small over ten steps; one evaluation, in the end.
    common = [f"tracking.uri={tracking_uri}", "train.learning_rate=1e-3", "train.eval_every_tokens=2560"]
    common += ["train.lr_scheduler_type=cosine"]  # the default when the losses were recorded
    found = {}
    for name, settings in TRAININGS.items():
        outcome, job = train_run(tiny(*common, *settings))
        assert outcome.step == 10
        assert job.run.upload(60)
        history = MlflowClient(tracking_uri).get_metric_history(job.run.run_id, "train/loss")
        found[name] = [point.value for point in sorted(history, key=lambda point: point.step)]
        assert len(found[name]) == 10
    check("losses.json", found, near)


# Perplexity ----------------------------------------------------------------------------------------------------------

TEXT = "".join(f"{number} times the cat, Grüße und 漢字: {number * number}\n" for number in range(12))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a causal and of a masked model of random weights, large enough that tokens differ in likelihood,
    with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    known = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<|endoftext|>", mask_token="<mask>", pad_token="<|endoftext|>"
    )
    common = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
    gpt2 = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, **common)
    bert = BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        **common,
    )
    found = {}
    for name, kind, configuration in [("causal", GPT2LMHeadModel, gpt2), ("masked", BertForMaskedLM, bert)]:
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("model") / name
        kind(configuration).save_pretrained(found[name])
        known.save_pretrained(found[name])
    (found["causal"].parent / "text.txt").write_text(TEXT, encoding="utf-8")
    return found


SCORES = {
    "causal": [],
    "causal, stride 8": ["eval.stride=8"],
    "causal, context 16": ["eval.context=16"],
    "causal, no prefix": ["tokenizer.prefix=none"],
    "masked": [],
    "masked, each token by itself": ["eval.pseudo_perplexity=true"],
}


def test_the_perplexity_of_a_fixed_model(models, command):
    text = models["causal"].parent / "text.txt"
    found = {}
    for name, settings in SCORES.items():
        record = result(command, "evaluate", models[name.split(",")[0]], "--text", text, *settings, cwd=text.parent)
        found[name] = {key: value for key, value in record.items() if isinstance(value, int | float)}
    check("perplexity.json", found, near)


# Words ---------------------------------------------------------------------------------------------------------------

PLAIN = {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1"}
"""As on a terminal of 100 columns without colours, wherever the test runs."""


def printed(*arguments, cwd):
    colours = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TYPER_", "_TYPER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(colours)}
    command = [sys.executable, "-m", "raylm", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**kept, **PLAIN}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.replace(str(cwd), "DIRECTORY").splitlines())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_the_help_of_each_verb(verb, tmp_path):
    check(f"help/{verb or 'raylm'}.txt", printed(*filter(None, [verb]), "--help", cwd=tmp_path))


def test_the_built_in_experiment(tmp_path):
    check("print-config.yaml", printed("train", "--print-config", cwd=tmp_path))


# Shapes --------------------------------------------------------------------------------------------------------------


def shape(value):
    """The keys of a tree, and the types of its values: those of the elements of a list are one shape."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [merged([shape(inner) for inner in value])] if value else []
    return "null" if value is None else type(value).__name__


def merged(shapes):
    if all(isinstance(each, dict) for each in shapes):
        keys = {key: [each.get(key, "missing") for each in shapes] for each in shapes for key in each}
        return {key: merged(inner) for key, inner in keys.items()}
    if all(isinstance(each, list) for each in shapes):
        inner = [element for each in shapes for element in each]
        return [merged(inner)] if inner else []
    texts = {each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in shapes}
    return " | ".join(sorted({text for each in texts for text in each.split(" | ")}))


def result(command, verb, *arguments, cwd, exit_codes=(0,)):
    """The JSON object of a command that ends with one of these exit codes; of paths, those inside of cwd."""
    done = command(verb, *arguments, "--json", cwd=cwd)
    assert done.returncode in exit_codes, done.stderr
    return json.loads(done.stdout.replace(f"{cwd}/", ""))


@pytest.fixture(scope="module")
def project(text_directory, tmp_path_factory, command):
    """A directory in which a sweep of two trials was run, one of them to its end; and the command's result."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "text").symlink_to(text_directory)
    (directory / "words.yaml").write_text(
        """
name: words
corpus: {paths: text, validation_fraction: 0.2}
tokenizer: {train: {vocab_size: 300}}
blocks: {block_size: 32}
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}
objective: {keywords: [cat]}
train: {batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 512}
eval: {paths: {first: text/00.txt}}
tune:
  num_samples: 1
  max_concurrent_trials: 1
  scheduler: {kind: asha, grace_tokens: 512}
  space:
    train.learning_rate: {grid: [2e-2, 1e-5]}
"""
    )
    return directory, result(command, "tune", "--config", "words.yaml", cwd=directory)


def test_the_shape_of_a_sweep(project):
    check("json/tune.json", shape(project[1]))


CALLS = {
    "init": ("init", "text", "--output", "proposal.yaml"),
    "prepare": ("prepare", "--config", "words.yaml"),
    "prepare --dry-run": ("prepare", "--config", "words.yaml", "--dry-run"),
    "prepare --verify": ("prepare", "--config", "words.yaml", "--verify"),
    "inspect": ("inspect", "--config", "words.yaml", "--examples", "2"),
    "train": ("train", "--config", "words.yaml"),
    "train --dry-run": ("train", "--config", "words.yaml", "--dry-run"),
    "tune --dry-run": ("tune", "--config", "words.yaml", "--dry-run"),
    "evaluate": ("evaluate", "BEST", "eval.paths=[]"),
    "evaluate, sets": ("evaluate", "BEST"),
    "evaluate --dry-run": ("evaluate", "BEST", "--dry-run"),
    "generate": ("generate", "BEST", "--prompt", "the cat", "max_new_tokens=4"),
    "push --dry-run": ("push", "BEST", "me/words", "--dry-run", "--out", "pushed"),
    "report": ("report", "SWEEP"),
    "compare": ("compare", "TRIAL", "SWEEP"),
    "sync": ("sync", "SWEEP"),
    "doctor": ("doctor",),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_shape_of_each_result(call, project, command):
    directory, swept = project
    sweep = Path(swept["report"]).parents[1]
    places = {"BEST": swept["best"]["checkpoint"], "SWEEP": sweep, "TRIAL": sweep / swept["trials"][1]["trial_id"]}
    verb, *arguments = (places.get(argument, argument) for argument in CALLS[call])
    exit_codes = (0, 2) if verb == "doctor" else (0,)  # which may find what is bad of the machine
    found = shape(result(command, verb, *arguments, cwd=directory, exit_codes=exit_codes))
    check(f"json/{re.sub('[^a-z]+', '-', call)}.json", found)


def test_the_shape_of_an_error(project, command):
    error = result(
        command, "train", "--config", "words.yaml", "train.learning_rate=fast", cwd=project[0], exit_codes=[2]
    )
    check("json/error.json", error)


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_manifest_of_a_token_store(project):
    """As it stands, but for what depends on where and when its text was written, and by which encoder."""
    stores = [json.loads(file.read_text(encoding="utf-8")) for file in project[0].glob("runs/tokens/*/manifest.json")]
    (store,) = [each for each in stores if each["ledger"]["documents"] == 60]  # the other one is of the evaluation set
    text = json.dumps(store).replace(str(project[0]), "DIRECTORY").replace(store["fingerprint"], "FINGERPRINT")
    found = json.loads(text)
    for source in found["sources"]:
        source["files"] = [[path, size, "TIME"] for path, size, _ in source["files"][:2]]
    found["tokenizer"]["encoder"] = shape(found["tokenizer"]["encoder"])
    check("manifest.json", found)


def test_the_record_of_a_sweep(project):
    (file,) = project[0].glob("runs/words/*/events.jsonl")
    kinds = {json.dumps(shape(json.loads(line))) for line in file.read_text(encoding="utf-8").splitlines()}
    check("events.json", [json.loads(kind) for kind in sorted(kinds)])


OTHERS = re.compile(r"(config|tokenizer|trainer_state|generation_config|tokenizer_config)\.json$|metrics\.jsonl$")
"""Files of transformers, and one whose keys depend on the machine."""


def test_the_shape_of_the_files_of_a_sweep(project):
    (sweep,) = (file.parent for file in project[0].glob("runs/words/*/events.jsonl"))
    found = {}
    for file in sorted([*sweep.rglob("*.json"), *sweep.rglob("*.jsonl")]):
        # A trial does not wait for MLflow: whether it has an id there yet is a matter of time.
        lines = file.read_text(encoding="utf-8").replace('"mlflow_run_id": null', '"mlflow_run_id": ""').splitlines()
        name = str(file.relative_to(sweep))
        if OTHERS.search(name) or name.startswith("trial_00000") or name == "events.jsonl":
            continue  # the first trial's are as the second's, but as many as it has waited
        if file.suffix == ".json":
            found[name] = shape(json.loads("\n".join(lines)))
        else:
            found[name] = [json.loads(kind) for kind in sorted({json.dumps(shape(json.loads(line))) for line in lines})]
    check("files.json", found)
