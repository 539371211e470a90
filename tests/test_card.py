"""What is published of a model, its card, and the plain directory that a training leaves for others."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import PLAIN, TOKEN, copied, one_by_one
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, pipeline

from raylm import checkpoint, config, evaluate, export, perplexity, tokens
from raylm.config import CorpusConfig, TokenizerConfig, TrainedTokenizer
from raylm.corpus import list_sources
from raylm.errors import ConfigError, StorageError
from raylm.tokens import write


def changed(file, **settings):
    """Settings of a JSON file changed; all of them."""
    settings = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps(settings))
    return settings


# What is published ---------------------------------------------------------------------------------------------------


def test_the_experiment_that_is_published_can_be_run(trained_directory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = checkpoint.read_experiment(trained_directory)
    config.save(export.published(given), tmp_path / "experiment.yaml")
    found = config.load(tmp_path / "experiment.yaml")
    assert found.corpus.paths == (f"{tmp_path}/notes/**/*.md", "hub://stories?split=train")
    assert found.eval.paths == (f"{tmp_path}/out.txt",)
    assert found.storage == f"{tmp_path}/runs"
    assert found.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.train.arguments == {"logging_first_step": True, "deepspeed": "./zero.json"}
    assert (found.model, found.blocks, found.tune) == (given.model, given.blocks, given.tune)
    assert export.published(found) == export.published(given)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/me/notes/**/*.md", "notes/**/*.md"),
        ("/home/me/books", "books"),
        ("~/books/a.txt.gz", "a.txt.gz"),
        ("/books", "books"),
        ("s3://key:secret@bucket/dir/*.jsonl", "dir/*.jsonl"),
        ("s3://key:sec/ret@bucket/*.jsonl", "bucket/*.jsonl"),
        ("gs://bucket", "bucket"),
        ("/home/me@work/a@b.txt", "a@b.txt"),
        ("./books", "books"),
        ("/", "/"),
        ("s3://key:secret@bucket", "bucket"),
        ("https://host/a.parquet?signature=secret", "a.parquet"),
        ("hub://org/stories?split=train[:5000]", "hub://org/stories?split=train[:5000]"),
        ("hub:///home/me/stories?split=train", "stories"),
        ("python://stdlib", "python://stdlib"),
        ("distilbert/distilgpt2", "distilbert/distilgpt2"),
    ],
)
def test_a_place_is_told_by_its_name(place, name):
    assert export.name_of(place) == name


def test_settings_that_are_no_places_stay_as_they_are():
    kept = {
        "corpus": {"keep_matching": "/usr/.*", "text": "{a}/{b}"},
        "keywords": ("/usr/bin", "~", "://"),
        "rate": 0.5,
    }
    assert export.named(kept) == kept
    assert export.named({"space": {"model.path": {"choice": ["/home/me/base", "gpt2"]}}}) == {
        "space": {"model.path": {"choice": ["./base", "gpt2"]}}
    }
    assert export.named({"config": {"any": "/home/me/x"}}) == {"config": {"any": "./x"}}
    assert export.named({"text": "http://me:secret@host/x"}) == {"text": "http://host/x"}


def test_a_configuration_that_tells_where_it_was_loaded_from(trained_directory, tmp_path):
    directory = copied(trained_directory, tmp_path / "model", PLAIN)
    told = changed(directory / "config.json", _name_or_path="/home/me/base")
    assert json.loads(export.model_files(directory)["config.json"]) == {**told, "_name_or_path": "./base"}


def test_weights_in_several_files_are_published_with_their_index(trained_directory, tmp_path):
    directory = copied(trained_directory, tmp_path / "model", PLAIN)
    AutoModelForCausalLM.from_pretrained(trained_directory).save_pretrained(directory, max_shard_size="5KB")
    (directory / "model.safetensors").unlink()
    files = export.model_files(directory)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1
    assert "model.safetensors.index.json" in files
    whole = export.model_files(trained_directory)
    assert export.num_parameters(files) == export.num_parameters(whole)
    (directory / shards[0]).unlink()
    with pytest.raises(StorageError, match=shards[0]):
        export.model_files(directory)


def test_what_is_no_whole_model_is_named(trained_directory, tmp_path):
    def refused(directory):
        with pytest.raises(StorageError) as raised:
            export.num_parameters(export.model_files(directory))
        return str(raised.value)

    untold = copied(trained_directory, tmp_path / "a", ("config.json", "model.safetensors"))
    assert "holds no tokenizer" in refused(untold)
    pickled = copied(trained_directory, tmp_path / "b", ("config.json", "tokenizer.json"))
    (pickled / "pytorch_model.bin").write_text("a pickle")
    assert "holds no model.safetensors (pytorch_model.bin is pickled" in refused(pickled)
    torn = copied(trained_directory, tmp_path / "c", PLAIN)
    (torn / "model.safetensors").write_bytes((trained_directory / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors cannot be loaded" in refused(torn)
    damaged = copied(trained_directory, tmp_path / "d", PLAIN)
    (damaged / "config.json").write_text("[1]")
    assert "has a configuration that is damaged" in refused(damaged)


# The card ------------------------------------------------------------------------------------------------------------


def card_of(directory, repo="someone/tiny"):
    experiment = checkpoint.read_experiment(directory)
    published = None if experiment is None else export.published(experiment)
    return ModelCard(export.build_card(directory, repo, published, export.model_files(directory)).decode())


def test_the_card_says_what_the_model_is(trained_directory):
    made = card_of(trained_directory)
    assert made.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raylm", "gpt2"],
        "datasets": ["stories"],
        "metrics": ["perplexity"],
        "model-index": [
            {
                "name": "tiny",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "name": "notes/**/*.md, hub://stories?split=train",
                            "type": "text",
                            "split": "validation",
                        },
                        "metrics": [
                            {"type": "perplexity", "value": 12.25},
                            {"type": "bits_per_byte", "value": 1.5},
                        ],
                    }
                ],
            }
        ],
    }
    for line in (
        "A gpt2 model of 3,096 parameters, trained from scratch on 3,584 tokens with raylm.",
        'pipeline("text-generation", model="someone/tiny")',
        "| perplexity | 12.2500 |",
        "| bits per byte | 1.5000 |",
        "On the whole validation split (1 document, 100 tokens, 200 bytes)",
        "| `notes/**/*.md` | 2 | 400 | 800 |",
        "| `hub://stories?split=train` | 1 | 200 | 400 |",
        "| train | 2 | 500 | 1,000 |",
        "**75.00% of data after filtering**: 3 of 4 documents",
        "| filtered: min_chars | 1 |",
        "| `train.learning_rate` |",
        "| `model.config.n_embd` | `8` |",
    ):
        assert line in made.text


def test_the_card_says_what_it_counts_where_passages_were_held_out(trained_directory, tmp_path):
    manifest = json.loads((trained_directory.parent / "tokens" / "f" / "manifest.json").read_text())
    manifest["ledger"]["passages"] = 9
    store = tmp_path / "f"
    store.mkdir()
    (store / "manifest.json").write_text(json.dumps(manifest))
    directory = tmp_path / "model"
    shutil.copytree(trained_directory, directory)
    changed(directory / "raylm.json", store=str(store))
    made = card_of(directory).text
    assert "On the whole validation split (1 passage, 100 tokens, 200 bytes)" in made
    assert made.count("a held-out document is one passage") == 1
    assert "a held-out document is one passage" not in card_of(trained_directory).text


def test_the_card_says_when_a_score_does_not_compare(trained_directory, tmp_path):
    """Of 100 tokens of the validation split 3 are unknown."""
    manifest = json.loads((trained_directory.parent / "tokens" / "f" / "manifest.json").read_text())
    manifest["validation"]["shards"] = [
        {"file": "validation/shard-00000.arrow", "size": 0, "documents": 1, "tokens": 100, "bytes": 200}
        | {"unknown_tokens": 3}
    ]
    (tmp_path / "f" / "validation").mkdir(parents=True)
    (tmp_path / "f" / "validation" / "shard-00000.arrow").touch()
    (tmp_path / "f" / "manifest.json").write_text(json.dumps(manifest))
    directory = copied(trained_directory, tmp_path / "model")
    record = {**checkpoint.read_record(trained_directory), "store": str(tmp_path / "f")}
    checkpoint.describe(directory, checkpoint.read_experiment(trained_directory), record)
    made = card_of(directory).text
    assert "**Not to be compared with other models**: 3 of 100 tokens are unknown to the tokenizer" in made
    assert "bits per byte compares models" not in made
    assert "Not to be compared" not in card_of(trained_directory).text


def test_the_parameters_are_those_of_the_weights(trained_directory):
    files = export.model_files(trained_directory)
    assert export.num_parameters(files) == 3096


def test_the_card_says_when_the_score_is_of_a_part(trained_directory, tmp_path):
    directory = copied(trained_directory, tmp_path / "model")
    experiment = config.override(
        checkpoint.read_experiment(trained_directory), {"eval.max_tokens": 64, "eval.stride": 8}
    )
    record = {**checkpoint.read_record(trained_directory), "store": str(tmp_path / "gone")}
    checkpoint.describe(directory, experiment, record)
    made = card_of(directory).text
    assert "On the first 64 validation tokens" in made
    assert "with 8 new tokens in each" in made
    assert "## Data" not in made


def test_a_masked_model_is_told_to_be_one(trained_directory, tmp_path):
    directory = copied(trained_directory, tmp_path / "model")
    changed(directory / "config.json", architectures=["BertForMaskedLM"])
    experiment = config.override(checkpoint.read_experiment(directory), {"objective.kind": "masked"})
    checkpoint.describe(directory, experiment, checkpoint.read_record(directory))
    made = card_of(directory)
    assert made.data.pipeline_tag == "fill-mask"
    assert "AutoModelForMaskedLM.from_pretrained" in made.text
    assert "| masked-perplexity | 12.2500 |" in made.text


# A plain directory ---------------------------------------------------------------------------------------------------

EXPORTED = sorted([*PLAIN, "README.md", "experiment.yaml", "raylm.json"])


@pytest.fixture
def exported(trained_directory, tmp_path):
    return Path(export.export(trained_directory, tmp_path / "best"))


def test_card_and_raylm_json_tell_the_score_that_the_export_is_given(trained_directory, tmp_path):
    """That of the whole split, where evaluations during training were of less."""
    score = {"perplexity": 8.6, "bits_per_byte": 1.5, "scored_on": config.WHOLE_SPLIT}
    target = Path(export.export(trained_directory, tmp_path / "best", score))
    before = checkpoint.read_record(trained_directory)
    assert before["perplexity"] != 8.6
    assert checkpoint.read_record(target) == {**before, **score}
    told = (target / "README.md").read_text()
    assert "| perplexity | 8.6000 |" in told
    assert "On the whole validation split" in told


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_an_exported_model_is_a_plain_directory_that_scores_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "_each", one_by_one)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says hello " * 4)
    corpus = CorpusConfig(paths=f"{tmp_path}/*.txt", validation_fraction=0.5)
    tokenizer = TokenizerConfig(train=TrainedTokenizer(vocab_size=260))
    store, _ = tokens.prepare(corpus, tokenizer, storage=str(tmp_path), sources=list_sources(corpus))
    sizes = {"vocab_size": 260, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    how = {"frame": store.frame("auto"), "context": 64, "stride": None, "batch_tokens": 256}
    score = perplexity.score(network, store.validation, **how)
    trained = tmp_path / "step_00000010"
    network.save_pretrained(trained)
    store.tokenizer.save_pretrained(trained)
    (trained / "optimizer.pt").write_text("of the training")
    experiment = config.override(config.load(), {"name": "words", "storage": str(tmp_path)})
    checkpoint.describe(trained, experiment, {"perplexity": score.perplexity, "store": store.path})

    found = tmp_path / "runs" / "best"
    assert export.export(trained, found) == str(found)
    assert sorted(contents(found)) == EXPORTED
    told = evaluate.evaluate(str(found)).record
    assert told["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
    assert told == {**evaluate.evaluate(str(trained)).record, "model": str(found)}
    assert checkpoint.read_experiment(found) == experiment
    weights = AutoModelForCausalLM.from_pretrained(found).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    generate = pipeline("text-generation", model=str(found))
    assert generate("hello", max_new_tokens=3)[0]["generated_text"].startswith("hello")
    monkeypatch.chdir(found)
    exec(re.search(r"```python\n(.*?)```", (found / "README.md").read_text(), re.DOTALL)[1], {})
    assert "Once upon a time" in capsys.readouterr().out, "the card's own words on how to load it"


ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]


def test_an_adapter_is_exported_without_its_base_model(
    trained_directory, lora_directory, tmp_path, monkeypatch, capsys
):
    found = Path(export.export(lora_directory, tmp_path / "best"))
    own = ["README.md", "experiment.yaml", "raylm.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(contents(found)) == sorted([*ADAPTER, *own])
    described = json.loads((found / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(trained_directory)
    expected = AutoModelForCausalLM.from_pretrained(lora_directory)(torch.arange(8)[None]).logits
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained_directory), found)
    for network in (plain, checkpoint.load(found).model):
        torch.testing.assert_close(network.eval()(torch.arange(8)[None]).logits, expected, rtol=1e-4, atol=1e-5)
    assert export.model_files(found) == {name: found / name for name in contents(found) if name not in own[:3]}
    card = ModelCard.load(found / "README.md")
    assert tuple(map(card.data.to_dict().get, ("library_name", "base_model"))) == ("peft", None), (
        "others cannot load a local directory"
    )
    assert f"# tiny\n\nA LoRA adapter of {2 * 8 * 4 + 16} parameters, trained from `checkpoint`" in card.text


def test_a_merged_model_and_its_adapter_are_exported_side_by_side(lora_directory, tmp_path):
    both = copied(lora_directory, tmp_path / "checkpoint")
    experiment = config.override(checkpoint.read_experiment(both), {"model.lora.export": "both"})
    checkpoint.describe(both, experiment, checkpoint.read_record(both))
    for target in (tmp_path / "best", f"file://{tmp_path}/remote"):
        for _ in range(2):  # an older one is replaced
            export.export(both, target)
        found = Path(str(target).removeprefix("file://"))
        files = sorted(file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file())
        inner = [*ADAPTER, "tokenizer.json", "tokenizer_config.json"]
        assert files == sorted([*EXPORTED, *(f"adapter/{name}" for name in inner)])
        assert sorted(export.model_files(found, "both")) == sorted(
            {*files} - {"README.md", "experiment.yaml", "raylm.json"}
        )
        for place in (found, found / "adapter"):
            network = checkpoint.load(place).model
            expected = AutoModelForCausalLM.from_pretrained(lora_directory).state_dict()
            assert all(torch.equal(weight, expected[name]) for name, weight in network.state_dict().items())
    assert "The directory [adapter](adapter) has" in (found / "README.md").read_text()
    merged = config.override(experiment, {"model.lora.export": "merged"})
    checkpoint.describe(both, merged, checkpoint.read_record(both))
    assert sorted(contents(Path(export.export(both, tmp_path / "merged")))) == EXPORTED


def test_an_adapter_is_exported_where_its_base_model_is_not(lora_directory, tmp_path):
    """The base model is on the Hub alone, which is not asked."""
    directory = copied(lora_directory, tmp_path / "checkpoint")
    experiment = config.override(checkpoint.read_experiment(directory), {"model.path": "someone/base"})
    checkpoint.describe(directory, experiment, checkpoint.read_record(directory))
    changed(directory / "lora.json", base_model_name_or_path="someone/base")
    found = Path(export.export(directory, tmp_path / "best"))
    assert ModelCard.load(found / "README.md").data.base_model == "someone/base"
    with pytest.raises(ConfigError, match="its base model cannot be loaded: someone/base: there is no such directory"):
        evaluate.evaluate(str(found))


def test_the_card_of_an_export_tells_no_places(trained_directory, exported):
    made = ModelCard.load(exported / "README.md")
    assert made.text.startswith("\n# tiny\n")
    assert "## Data" in made.text
    assert "local paths are reduced to names" not in made.text
    for private in (TOKEN, str(trained_directory.parent), "mlflow.example", "bucket"):
        assert private not in str(made)


def test_weights_are_links_and_the_rest_may_be_edited(trained_directory, exported):
    assert (exported / "model.safetensors").samefile(trained_directory / "model.safetensors")
    before = contents(trained_directory)
    for name in set(EXPORTED) - {"model.safetensors"}:
        (exported / name).write_text("edited")
    assert contents(trained_directory) == before


def test_weights_are_copied_where_they_cannot_be_linked(trained_directory, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    found = Path(export.export(trained_directory, tmp_path / "best"), "model.safetensors")
    assert not found.samefile(trained_directory / "model.safetensors")
    assert found.read_bytes() == (trained_directory / "model.safetensors").read_bytes()


def test_an_older_export_is_replaced_whole(trained_directory, exported):
    (exported / "model.safetensors").unlink()
    (exported / "of_before.txt").write_text("of before")
    assert export.export(trained_directory, exported) == str(exported)
    assert sorted(contents(exported)) == EXPORTED
    assert list(exported.parent.iterdir()) == [exported], "nothing is left of the way there"


def test_an_older_export_stays_where_the_new_one_fails(trained_directory, exported):
    """No file may be longer than 2,000 bytes, as on a disk that is full; tokenizer.json is."""
    before = contents(exported)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StorageError, match=r"best: the model cannot be exported there: File too large"):
            export.export(trained_directory, exported)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(exported) == before
    assert list(exported.parent.iterdir()) == [exported]


def test_only_an_export_is_replaced(trained_directory, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(StorageError, match="exists already and holds no exported model"):
        export.export(trained_directory, tmp_path)
    with pytest.raises(StorageError, match="exists already and holds no exported model"):
        export.export(trained_directory, trained_directory)
    with pytest.raises(StorageError, match="exists already and holds no exported model"):
        export.export(trained_directory, tmp_path / "kept")


def test_a_model_that_raylm_did_not_train_is_not_exported(trained_directory, tmp_path):
    shutil.copytree(trained_directory, tmp_path / "model", ignore=lambda *_: ["experiment.yaml"])
    with pytest.raises(StorageError, match="model was not trained by raylm: it holds no experiment.yaml"):
        export.export(tmp_path / "model", tmp_path / "best")
