"""Where two models differ: by hand, and on two models of one layer that were never trained."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_evaluate import saved
from transformers import GPT2Config, GPT2LMHeadModel

from raylm import api
from raylm.compare import compare
from raylm.errors import ConfigError
from raylm.evaluate import evaluate
from raylm.results import where

WORDS = "the cat sat on a mat and saw one dog run far to sea".split()


def shown(answer):
    screen = Console(file=io.StringIO(), width=80)
    for part in answer.view:
        screen.print(part, soft_wrap=True)
    return screen.file.getvalue()


def lines(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def write(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# By hand --------------------------------------------------------------------------------------------------------------


def test_sources_are_ordered_by_what_they_contribute():
    parts = where.by_source(np.array([1.0, -9, 2]), np.array([10, 30, 10]), ["a", "b", "a"])
    assert [(part.name, part.documents, part.size, part.difference) for part in parts] == [
        ("b", 1, 30, -0.3),
        ("a", 2, 20, 0.15),
    ]
    assert parts[0].low is None, "of one document"


def test_lengths_are_bands_of_six_documents_or_more():
    num_bytes = np.array([5, 5, 5, 5, 5, 5, 5, 8, 9, 10, 11, 1200, 1300])
    parts = where.by_length(np.ones(13), num_bytes, num_bytes)
    assert [(part.name, part.documents) for part in parts] == [("5 to 5 bytes", 7), ("8 to 1,300 bytes", 6)]
    assert all(part.low is not None for part in parts)
    assert [part.documents for part in where.by_length(np.ones(40), np.arange(40) + 1, np.arange(40) + 1)] == [
        11,
        10,
        10,
        9,
    ]
    assert [part.name for part in where.by_length(np.ones(3), np.array([3, 4, 5]), np.array([3, 4, 5]))] == [
        "3 to 5 bytes"
    ]


def test_positions_without_tokens_are_left_out():
    rows, best = np.zeros((7, 12)), np.zeros((7, 12))
    rows[:, 1] = best[:, 1] = 16
    rows[:, 10], rows[:, 11] = 3, 6
    assert [(part.name, part.size, part.difference) for part in where.by_position(rows, best)] == [
        ("after 0 to 15 tokens", 112, 0),
        ("after 4,096 tokens or more", 42, 0.5),
    ]


def test_documents_count_in_either_direction():
    assert where.largest(np.array([1, -3, 2, 0, 0, 0.5, 0.1])).tolist() == [1, 2, 0, 5, 6]


# Two models -----------------------------------------------------------------------------------------------------------


def evaluated(directory, name, *, seed, n_positions=32):
    """An evaluation, `name`.jsonl, of a new model."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 270, "n_layer": 1, "n_head": 1, "n_embd": 8, "initializer_range": 0.3}
    network = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=n_positions, bos_token_id=0, eos_token_id=0))
    (directory / name).mkdir()
    saved(network, directory / name)
    text = [f"{directory}/{each}" for each in ("notes", "mail")]
    evaluate(str(directory / name), text=text, documents=directory / f"{name}.jsonl")


@pytest.fixture
def two(tmp_path):
    """Two evaluations of the same two directories of text."""
    generator = np.random.default_rng(0)
    for directory, count in (("notes", 12), ("mail", 7)):
        (tmp_path / directory).mkdir()
        for number in range(count):
            words = generator.choice(WORDS, generator.integers(3, 30))
            (tmp_path / directory / f"{number:02}.txt").write_text(" ".join(words))
    for number, name in enumerate(("a", "b")):
        evaluated(tmp_path, name, seed=number)
    return tmp_path, [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_the_parts_add_up_to_the_difference(two):
    directory, files = two
    answer = compare(files, where=True, where_keyword=["cat"])
    record = answer.record["where"]
    (difference,) = (run["difference"] for run in answer.record["runs"] if run["difference"]["to"] is not None)
    tokens = sum(part["size"] for part in record["parts"]["length"])
    assert list(record["parts"]) == ["source", "length", "position", "keyword"]
    for by, parts in record["parts"].items():
        assert sum(part["size"] for part in parts) == tokens, by
        summed = sum(part["size"] * part["difference"] for part in parts)
        assert summed == pytest.approx(tokens * difference["nats_per_token"], rel=1e-5), by
    assert {part["name"] for part in record["parts"]["source"]} == {f"{directory}/notes", f"{directory}/mail"}
    assert [part["name"] for part in record["parts"]["keyword"]] == ["cat", "all else"]
    kept = {file: {line["document"]: line for line in lines(file)} for file in files}
    best = difference["to"]
    other = next(file for file in files if file != best)
    nats = {each: kept[other][each]["nll"] - kept[best][each]["nll"] for each in kept[best]}
    expected = sorted(nats, key=lambda each: -abs(nats[each]))[:5]
    assert [each["document"] for each in record["documents"]] == expected
    assert [each["difference"] for each in record["documents"]] == pytest.approx([nats[each] for each in expected])
    texts = [file.read_text() for file in directory.glob("*/*.txt")]
    for each in record["documents"]:
        assert any(text.startswith(each["text"].removesuffix(" …")) for text in texts)
    assert record["notes"] == []
    text = shown(answer)
    assert f"nats/token of {other} above {best}; below zero where it is better" in text
    assert "by position in the context  documents  tokens" in text
    json.dumps(answer.record, allow_nan=False)
    assert api.compare(*files, where=True, keywords=["cat"]).record()["where"] == record
    assert "where" not in api.compare(*files).record()


def test_positions_are_compared_only_in_contexts_of_one_length(two):
    directory, files = two
    evaluated(directory, "c", seed=2, n_positions=16)
    record = compare([files[0], str(directory / "c.jsonl")], where=True, where_keyword=["cat"]).record["where"]
    assert list(record["parts"]) == ["source", "length", "keyword"]
    assert record["notes"] == [
        "positions in the context: not shown, because the models read contexts of different lengths"
    ]


def test_what_is_gone_is_said_and_the_rest_is_shown(two):
    directory, files = two
    record = compare(files, where=True, where_keyword=["cat", "zebra"]).record["where"]
    assert record["notes"] == ["zebra: not in the text"]
    network = GPT2LMHeadModel.from_pretrained(directory / "a")
    network.lm_head.weight.data *= 2
    network.save_pretrained(directory / "a")
    record = compare(files, where=True).record["where"]
    assert list(record["parts"]) == ["source", "length"]
    assert [f"{directory}/a gives other scores than were kept" in note for note in record["notes"]] == [True]
    shutil.rmtree(directory / "a")
    record = compare(files, where=True).record["where"]
    assert "positions in the context: not shown" in record["notes"][-1]
    assert record["documents"][0]["text"] is not None, "by the other model"
    (directory / "notes" / "00.txt").write_text("another one")
    answer = compare(files, where=True)
    assert "has changed" in " ".join(answer.record["where"]["notes"]) or "gone" in " ".join(
        answer.record["where"]["notes"]
    )
    shutil.rmtree(directory / "notes")
    answer = compare(files, where=True)
    record = answer.record["where"]
    assert record["notes"][0].startswith("the text is not shown: ")
    assert {each["text"] for each in record["documents"]} == {None}
    assert list(record["parts"]) == ["source", "length"], "of what was kept"
    assert "documents that contribute most" in shown(answer)


def test_what_cannot_be_paired_is_refused(two, tmp_path):
    _, (a, b) = two
    with pytest.raises(ConfigError, match=r"^--where: give two runs, got 3$"):
        compare([a, b, a], where=True)
    write(tmp_path / "other.jsonl", lines(b)[1:])
    with pytest.raises(ConfigError, match=r"^--where: .*: scored on other documents|no other was scored"):
        compare([a, str(tmp_path / "other.jsonl")], where=True)
    with pytest.raises(ConfigError, match=r"^--where-keyword: .* give --where, too"):
        compare([a, b], where_keyword=["cat"])
    few = [str(tmp_path / f"few-{number}.jsonl") for number in range(2)]
    for file, kept in zip(few, (a, b), strict=True):
        write(file, lines(kept)[:5])
    with pytest.raises(ConfigError, match=r"^--where: .*: too few documents to tell: 5 documents"):
        compare(few, where=True)


def test_models_with_other_tokenizers_differ_in_bits_per_byte(two):
    _, (a, b) = two
    write(b, [{**line, "tokens": line["tokens"] + 1} for line in lines(b)])
    record = compare([a, b], where=True).record["where"]
    assert record["unit"] == "bits/byte"
    assert record["notes"] == ["positions in the context and keywords: not shown, because the tokenizers differ"]
    assert sum(part["size"] for part in record["parts"]["source"]) == sum(line["bytes"] for line in lines(b))
    assert math.isfinite(record["parts"]["source"][0]["low"])


@pytest.mark.slow
def test_two_trainings_differ_by_the_text_of_their_store(ray_cluster, tiny, tmp_path):
    directories = []
    for rate in ("2e-2", "1e-3"):
        experiment = tiny(f"storage={tmp_path}", f"train.learning_rate={rate}", "eval.max_tokens=400")
        directories.append(f"{experiment.storage}/tiny/{api.train(experiment).run}")
    record = compare(directories, where=True, where_keyword=["cat"]).record["where"]
    assert record["notes"] == []
    assert list(record["parts"]) == ["source", "length", "position", "keyword"]
    assert all(part["difference"] > 0 for parts in record["parts"].values() for part in parts)
    assert all(each["text"] for each in record["documents"])
