"""The verb in this process, on a model of one layer that was never trained; its numbers against perplexity.score."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from raylm import checkpoint, console, perplexity, tokenizer, tokens
from raylm import plan as plans
from raylm.config import Experiment, TrainedTokenizer
from raylm.errors import ConfigError, DataError, StorageError
from raylm.evaluate import evaluate
from raylm.generate import generate
from raylm.pipeline import stores

SPECIAL = ("<|endoftext|>", "<mask>")
TEXTS = {
    "books/a.txt": "the cat sat on a mat",
    "books/b.txt": "and saw one dog run far to sea, naïve as it was",
    "code/x.txt": "x = fit(y)\n" * 5,
    "code/y.txt": "plt.fit(x)",
    "empty/a.txt": " \n",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def saved(network, directory):
    """A model with a tokenizer of bytes beside it."""
    network.save_pretrained(directory)
    tokenizer.train(TEXTS.values(), TrainedTokenizer(vocab_size=270, special_tokens=SPECIAL)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 270, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16, "initializer_range": 0.3}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return saved(network, tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = BertForMaskedLM(BertConfig(vocab_size=270, max_position_embeddings=16, **sizes))
    return saved(network, tmp_path_factory.mktemp("masked"))


def sets(texts):
    return f"eval.paths={{books: {texts}/books, code: [{texts}/code/y.txt, {texts}/code/x.txt]}}"


def score(model, *names, every=False):
    """perplexity.score of these texts, in this order."""
    trained = checkpoint.load(model)
    documents = tokens.Encoded()
    for name in names:
        ids = np.array(trained.tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"])
        documents.append(ids, len(TEXTS[name].encode()), 0, name)
    how = {"frame": trained.frame(), "context": trained.context, "masked": trained.masked(every=every)}
    return perplexity.score(trained.model, documents, **how)


def shown(answer):
    screen = Console(file=io.StringIO(), width=200)
    for part in answer.view if isinstance(answer.view, tuple) else (answer.view,):
        screen.print(part)
    return screen.file.getvalue()


def test_each_set_is_told_under_its_name_and_all_together(causal, texts):
    answer = evaluate(causal, [sets(texts)])
    found = answer.record["sets"]
    books, code = score(causal, "books/a.txt", "books/b.txt"), score(causal, "code/x.txt", "code/y.txt")
    for record, expected, documents in ((found["books"], books, 2), (found["code"], code, 2)):
        assert record["nll"] == pytest.approx(expected.nll, rel=1e-6)
        assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert record["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert (record["tokens"], record["bytes"]) == (expected.tokens, expected.bytes)
        assert record["documents"] == documents
    assert answer.record["nll"] == pytest.approx((books + code).nll, rel=1e-6)
    assert answer.record["perplexity"] == pytest.approx((books + code).perplexity, rel=1e-6)
    assert list(found["books"]["sources"]) == [f"{texts}/books"]
    assert list(found["code"]["sources"]) == [f"{texts}/code/y.txt", f"{texts}/code/x.txt"]
    alone = score(causal, "code/y.txt")
    assert found["code"]["sources"][f"{texts}/code/y.txt"]["nll"] == pytest.approx(alone.nll, rel=1e-6)
    table = shown(answer).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == [
        "text", "books", "code", f"{texts}/code/y.txt", f"{texts}/code/x.txt", "total",
    ]  # fmt: skip
    assert f"{books.perplexity:.2f}" in table[1]


def test_every_score_has_its_interval_from_the_spread_of_documents(causal, texts, tmp_path):
    words = (*TEXTS["books/a.txt"].split()[:4], *TEXTS["books/b.txt"].split())
    (tmp_path / "words.txt").write_text("\n".join(words))
    settings = ['corpus.separator="\\n"', "objective.keywords=[cat]"]
    answer = evaluate(causal, settings, text=[f"{tmp_path}/words.txt", f"{texts}/code/y.txt"])
    record = answer.record
    assert record["perplexity_low"] < record["perplexity"] < record["perplexity_high"]
    assert record["bits_per_byte_low"] < record["bits_per_byte"] < record["bits_per_byte_high"]
    several, single = record["sets"]["text"]["sources"].values()
    assert several["perplexity_low"] < several["perplexity"] < several["perplexity_high"]
    assert single["perplexity_low"] is single["bits_per_byte_high"] is None, "of one document"
    assert record["keywords"]["perplexity_low"] is None, "one document has the keyword"
    facts, table = shown(answer).split("\n\n")
    assert re.search(r"^perplexity +\d+ \[\d+, \d+\]$", facts, re.MULTILINE)
    assert re.search(r"^bits_per_byte +[\d.]+ \[[\d.]+, [\d.]+\]$", facts, re.MULTILINE)
    assert re.search(r"^documents +17; in brackets 95 % intervals", facts, re.MULTILINE)
    assert table.splitlines()[1].count("[") == 2
    assert re.fullmatch("[0-9a-f]{16}", record["document_ids"])
    assert evaluate(causal, text=[f"{texts}/code/y.txt"]).record["document_ids"] != record["document_ids"]
    few = shown(evaluate(causal, text=[f"{texts}/books"]))
    assert "documents       2, too few for an interval, which takes 6; give more text, or cut it into documents" in few


def test_a_score_over_unknown_tokens_says_that_it_does_not_compare(causal, texts, tmp_path):
    """A character that the vocabulary does not know costs next to nothing, and less the more of them there are."""
    network = checkpoint.load(causal).model
    network.save_pretrained(tmp_path / "model")
    words = TrainedTokenizer(kind="wordpiece", vocab_size=270)
    tokenizer.train(TEXTS.values(), words).save_pretrained(tmp_path / "model")
    (tmp_path / "known.txt").write_text("the cat sat")
    (tmp_path / "unknown.txt").write_text("the 東 京")
    answer = evaluate(str(tmp_path / "model"), text=[f"{tmp_path}/known.txt", f"{tmp_path}/unknown.txt"])
    assert (answer.record["unknown_tokens"], answer.record["tokens"]) == (2, 12)
    assert answer.record["incomparable"].startswith("2 of 12 tokens are unknown to the tokenizer, so neither")
    sources = answer.record["sets"]["text"]["sources"]
    assert [found["unknown_tokens"] for found in sources.values()] == [0, 2]
    facts, table = shown(answer).split("\n\n")
    assert "incomparable    2 of 12 tokens" in facts
    assert "unknown tokens" in table.splitlines()[0]
    alone = evaluate(str(tmp_path / "model"), text=[f"{tmp_path}/known.txt"])
    assert (alone.record["unknown_tokens"], alone.record["incomparable"]) == (0, None)
    assert "unknown tokens" not in shown(alone)


def test_the_numbers_do_not_depend_on_the_batch(causal, texts):
    expected = evaluate(causal, [sets(texts)]).record
    found = evaluate(causal, [sets(texts), "eval.batch_tokens=16"]).record
    for name in ("books", "code"):
        assert found["sets"][name]["nll"] == pytest.approx(expected["sets"][name]["nll"], rel=1e-6)


def test_text_goes_before_the_sets_and_is_read_as_the_corpus_is(causal, texts, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"said": "the cat"}\n{"said": "sat"}\n')
    settings = [sets(texts), "corpus.text=said", "corpus.keep_any=zebra"]
    found = evaluate(causal, settings, text=[f"{tmp_path}/rows.jsonl"]).record
    assert list(found["sets"]) == ["text"]
    assert (found["bytes"], found["sets"]["text"]["documents"]) == (10, 2), "and nothing of it is filtered out"


def test_every_document_is_a_line_of_json(causal, texts, tmp_path):
    (tmp_path / "found.jsonl").write_text("of another day")
    settings = [sets(texts), "objective.keywords=[fit]"]
    record = evaluate(causal, settings, documents=tmp_path / "found.jsonl").record
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(line["set"], line["source"]) for line in lines] == [
        ("books", f"{texts}/books"),
        ("books", f"{texts}/books"),
        ("code", f"{texts}/code/y.txt"),
        ("code", f"{texts}/code/x.txt"),
    ]
    named = {hashlib.blake2b(text.encode(), digest_size=8).hexdigest(): name for name, text in TEXTS.items()}
    assert {(line["model"], line["scored_in"]) for line in lines} == {(causal, "float32")}
    assert [named[line["document"]] for line in lines] == ["books/a.txt", "books/b.txt", "code/y.txt", "code/x.txt"]
    for line in lines:
        expected = score(causal, named[line["document"]])
        assert line["nll"] == pytest.approx(expected.nll, rel=1e-6)
        assert (line["tokens"], line["bytes"]) == (expected.tokens, expected.bytes)
        assert line["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert line["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert sum(line["nll"] for line in lines) == pytest.approx(record["nll"], rel=1e-9)
    assert [line["keywords"]["tokens"] > 0 for line in lines] == [False, False, True, True]
    assert os.listdir(tmp_path) == ["found.jsonl"], "nothing half written stays"


def test_a_place_for_documents_that_cannot_be_written_is_told_before_anything_is_scored(texts, tmp_path):
    """The model has no weights: to load it would be another error."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for path, why in {
        tmp_path / "nowhere" / "found.jsonl": "No such file or directory",
        tmp_path / "model": "it is a directory",
        tmp_path / "file" / "found.jsonl": "Not a directory",
    }.items():
        with pytest.raises(StorageError, match=rf"--documents {path}: {why}; give a file in a directory"):
            evaluate(str(tmp_path / "model"), [sets(texts)], documents=path)


def test_keywords_have_a_perplexity_of_their_own(causal, texts, tmp_path):
    answer = evaluate(causal, [sets(texts), "objective.keywords=[fit, zebra]"])
    spelled = len(checkpoint.load(causal).tokenizer("fit")["input_ids"])
    keywords = answer.record["sets"]["code"]["keywords"]
    assert keywords["tokens"] == 6 * spelled
    assert keywords["perplexity"] == pytest.approx(math.exp(keywords["nll"] / keywords["tokens"]))
    assert answer.record["keywords"] == keywords
    assert answer.record["sets"]["books"]["keywords"] == {
        "perplexity": None, "nll": 0.0, "tokens": 0, "perplexity_low": None, "perplexity_high": None,
    }  # fmt: skip
    assert json.dumps(answer.record, allow_nan=False)
    assert "perplexity_of_keywords" in shown(answer)
    assert "keywords" not in evaluate(causal, [sets(texts)]).record


@pytest.mark.parametrize(
    ("settings", "measure"),
    [([], "masked_perplexity"), (["eval.pseudo_perplexity=true"], "pseudo_perplexity")],
)
def test_the_score_of_a_masked_model_is_called_what_it_is(masked, texts, settings, measure):
    answer = evaluate(masked, [sets(texts), *settings])
    names = "books/a.txt", "books/b.txt", "code/x.txt", "code/y.txt"
    expected = score(masked, *names, every=measure == "pseudo_perplexity")
    assert answer.record[measure] == pytest.approx(expected.perplexity, rel=1e-6)
    for record in (answer.record, *answer.record["sets"].values()):
        assert "perplexity" not in record
    text = shown(answer)
    assert measure in text.split("\n\n")[0]
    assert measure.replace("_", "-") in text.split("\n\n")[1].splitlines()[0]


@pytest.fixture(scope="module")
def plain_bert(tmp_path_factory):
    """As the Hub has them: [CLS] and [SEP] around a text, and no end-of-text token."""
    directory = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXTS["books/a.txt"].split()))]
    known = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(directory)
    known.save_pretrained(directory)
    return str(directory)


def test_a_pretrained_bert_is_scored_with_the_setting_that_it_needs(plain_bert, texts, tmp_path):
    text = [str(texts / "books/a.txt")]
    with pytest.raises(DataError, match=r"no end-of-text token.*name one with tokenizer.eos_token, of:.*\[SEP\]"):
        evaluate(plain_bert, text=text)
    answer = evaluate(plain_bert, ["tokenizer.eos_token='[SEP]'"], text=text)
    assert (answer.record["tokens"], answer.record["prefix"]) == (6, "[CLS]")
    assert answer.record["masked_perplexity"] < 20
    file = tmp_path / "bert.yaml"
    file.write_text("tokenizer: {eos_token: '[SEP]'}\nmodel: {config: {model_type: bert}}\n")
    assert evaluate(plain_bert, text=text, config=file).record == answer.record, "of a file, what is about documents"
    changed = json.loads((Path(plain_bert) / "config.json").read_text()) | {"architectures": ["BertModel"]}
    other = tmp_path / "other"
    shutil.copytree(plain_bert, other)
    (other / "config.json").write_text(json.dumps(changed))
    settings = ["tokenizer.eos_token='[SEP]'", "objective.kind=masked"]
    assert evaluate(str(other), settings, text=text).record == {**answer.record, "model": str(other)}


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("eval.context=17", "eval.context must be at most 16, the positions of the model, got 17"),
        ("tokenizer.eos_token=zzz", "tokenizer.eos_token=zzz: it is not among the 267 tokens"),
        ("tokenizer.prefix=bos", "tokenizer.prefix=bos: the tokenizer has no begin-of-text token"),
    ],
)
def test_a_setting_that_the_model_cannot_keep_is_told_before_any_work(causal, texts, tmp_path, capsys, setting, error):
    own = tmp_path / "model"
    shutil.copytree(causal, own)
    known = tokenizer.load(own)
    known.bos_token = None
    known.save_pretrained(own)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=f"^{error}"):
            evaluate(str(own), [sets(texts), setting], dry_run=dry_run)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_from_elsewhere(causal, texts, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(causal, alone, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    expected = evaluate(causal, [sets(texts)]).record
    assert evaluate(str(alone), [sets(texts), f"tokenizer.path={causal}"]).record == {**expected, "model": str(alone)}
    with pytest.raises(ConfigError, match=r"model.path=.*alone: there is no tokenizer in it.*give tokenizer.path"):
        evaluate(str(alone), [sets(texts)])


def test_a_gguf_file_is_scored(tmp_path, texts):
    import gguf

    made = tokenizer.train(TEXTS.values(), TrainedTokenizer(vocab_size=270))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(made), max_position_embeddings=16, **sizes))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(made))
    vocabulary = sorted(made.get_vocab(), key=made.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(made.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(made.eos_token_id)
    writer.add_bos_token_id(made.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in network.state_dict().items():
        place = names.get_name(name, try_suffixes=(".weight",))
        rows = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp wants them rotated
            rows = rows.reshape(1, 2, 16, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(place, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StorageError, match=r"has no config.json; give model.gguf_file=model.gguf"):
        evaluate(str(tmp_path), [sets(texts)])
    found = evaluate(str(tmp_path), [sets(texts), "model.gguf_file=model.gguf"]).record

    plain = tmp_path / "plain"
    network.save_pretrained(plain)
    made.save_pretrained(plain)
    expected = evaluate(str(plain), [sets(texts)]).record
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


@pytest.mark.parametrize("setting", ["model.path=/elsewhere", "model.config={model_type: gpt2}", "tokenizer.train={}"])
def test_settings_that_say_what_the_argument_says(causal, texts, setting):
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        evaluate(causal, [sets(texts), setting])


def test_a_set_without_text_is_named(causal, texts):
    several = f"eval.paths={{books: {texts}/books, none: {texts}/empty}}"
    with pytest.raises(DataError, match=r"^eval.paths.none: there is nothing to score in .*empty: no document has any"):
        evaluate(causal, [several])
    with pytest.raises(DataError, match=r"^eval.paths: there is nothing to score"):
        evaluate(causal, [f"eval.paths={texts}/empty"])
    with pytest.raises(DataError, match=r"^--text: there is nothing to score"):
        evaluate(causal, text=[f"{texts}/empty"])
    with pytest.raises(DataError, match=r"^eval.paths.none: /nowhere/\*.txt: no such file"):
        evaluate(causal, ["eval.paths.none=/nowhere/*.txt"], dry_run=True)
    with pytest.raises(DataError, match=r"^--text: /nowhere.txt: no such file"):
        evaluate(causal, text=["/nowhere.txt"], dry_run=True)


def test_what_to_score_must_be_said_where_no_store_is_there(causal, tmp_path):
    with pytest.raises(ConfigError, match=r"was not trained by raylm, .*; give --text FILE"):
        evaluate(causal)
    directory = tmp_path / "model"
    shutil.copytree(causal, directory)
    checkpoint.describe(directory, Experiment(), {"store": f"{tmp_path}/gone"})
    with pytest.raises(DataError, match=r"was trained with the token store .*/gone, which is gone; give --text"):
        evaluate(str(directory))
    manifest = {"format": 3, "fingerprint": "f", "tokenizer": {"eos_id": 0, "vocab_size": 9}, "sources": []}
    shards = [{"file": "train/shard-00000.arrow", "size": 9, "documents": 1, "tokens": 1, "bytes": 1}]
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "manifest.json").write_text(
        json.dumps({**manifest, "train": {"shards": shards}, "validation": {"shards": []}})
    )
    with pytest.raises(DataError, match=r"gone is damaged: train/shard-00000.arrow: missing; run raylm prepare"):
        evaluate(str(directory))


def test_a_model_that_diverged_has_no_figure(causal, texts, tmp_path):
    network = checkpoint.load(causal).model
    network.lm_head.weight.data[3] = math.nan
    with pytest.raises(StorageError, match=r"the likelihood of the text is not a finite number"):
        evaluate(saved(network, tmp_path), [sets(texts)], documents=tmp_path / "found.jsonl")
    assert not (tmp_path / "found.jsonl").exists()


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_what_is_not_a_checkpoint_is_told_with_the_way_out(verb, causal, texts, tmp_path):
    def call(path):
        return generate(str(path), prompt=["x"]) if verb == "generate" else evaluate(str(path), [sets(texts)])

    with pytest.raises(StorageError, match=r"gone is not a directory; give one that holds a model"):
        call(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file is not a directory; give one that holds a model"):
        call(tmp_path / "file")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(StorageError, match=r"run holds no model: it has no config.json$"):
        call(run)
    (run / "step_00000010").mkdir()
    (run / "step_00000010" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(StorageError, match=r"run holds no model: .*; did you mean .*/run/step_00000010\?"):
        call(run)
    tokenizer.load(causal).save_pretrained(run / "step_00000010")
    with pytest.raises(StorageError, match=r"step_00000010 cannot be loaded: OSError: .*model.safetensors"):
        call(run / "step_00000010")


# Token stores of sets, for training ----------------------------------------------------------------------------------


def test_a_set_is_tokenized_once_as_the_run_is_and_nothing_of_it_is_left_out(ray_cluster, tiny, texts):
    filtered = ["corpus.keep_any=cat", "corpus.max_documents=1", 'corpus.separator=" "']
    filtered += [f"corpus.validation_paths={texts}/books"]
    experiment = tiny(sets(texts), *filtered)
    store, _ = stores.prepare(plans.resolve_tokens(tiny()))
    found = stores.prepare_evaluation_sets(plans.resolve(experiment), store)
    assert list(found) == ["books", "code"]
    books = tokens.open_store(found["books"])
    words = " ".join(TEXTS[name] for name in ("books/a.txt", "books/b.txt")).split()
    assert [store.tokenizer.decode(ids) for ids in books.train] == words
    assert len(books.validation) == 0
    assert books.frame("auto") == store.frame("auto")
    times = {path: os.stat(f"{path}/manifest.json").st_mtime_ns for path in found.values()}
    assert stores.prepare_evaluation_sets(plans.resolve(experiment), store) == found
    assert times == {path: os.stat(f"{path}/manifest.json").st_mtime_ns for path in found.values()}
    one = tiny(f"eval.paths={texts}/empty", *filtered)
    with pytest.raises(DataError, match=r"^eval.paths: there is nothing to score in .*empty: no document has any"):
        stores.prepare_evaluation_sets(plans.resolve(one), store)
    assert stores.prepare_evaluation_sets(plans.resolve(tiny()), store) == {}


def test_a_causal_model_has_no_pseudo_perplexity(causal, texts):
    with pytest.raises(
        ConfigError, match=r"^eval.pseudo_perplexity=true is for masked models; leave it out, or set obj"
    ):
        evaluate(causal, ["eval.pseudo_perplexity=true"], text=[f"{texts}/books"])


@pytest.mark.parametrize("settings", [[], ["eval.pseudo_perplexity=true"]])
def test_the_tokens_that_are_scored_are_told_as_they_go(masked, texts, settings, monkeypatch):
    seen = []

    def advance(done, total):
        seen.append((done, total))

    monkeypatch.setattr(console, "task", lambda *_: contextlib.nullcontext(advance))
    answer = evaluate(masked, ["eval.batch_tokens=16", *settings], text=[f"{texts}/books"])
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx((answer.record["tokens"], answer.record["tokens"]))


def test_a_model_without_its_head_is_refused(tmp_path):
    """Which would be made at random: a sentence encoder, say, or what is left of a model that was cut off."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    directory = saved(BertModel(BertConfig(vocab_size=270, max_position_embeddings=16, **sizes)), tmp_path)
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(
        StorageError, match=rf"^{directory} has no weights for cls\.predictions\..* and \d more of BertFor"
    ):
        evaluate(directory, ["objective.kind=masked"], text=[f"{tmp_path}/text.txt"])
