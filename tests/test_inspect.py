import json
import re

import pytest
from conftest import one_by_one

from raylm import config, console
from raylm import plan as plans
from raylm.pipeline import stores
from raylm.results import inspection
from raylm.tokens import write


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    (tmp_path / "corpus").mkdir()
    for number in range(6):
        (tmp_path / "corpus" / f"{number}.txt").write_text("hello <world>\n" * 2**number)
    (tmp_path / "corpus" / "empty.txt").write_text("")
    return config.load(
        config.BUILT_IN,
        [
            f"corpus.paths={tmp_path}/corpus",
            f"storage={tmp_path}",
            "corpus.validation_fraction=0",
            "corpus.keep_any=[]",
            "tokenizer.train={vocab_size: 300}",
            "blocks.block_size=16",
        ],
    )


@pytest.fixture
def store(experiment):
    store, _ = stores.prepare(plans.resolve_tokens(experiment))
    return store


def test_what_is_shown_is_what_is_in_the_store(experiment, store):
    record = inspection.inspect(experiment, store, examples=3)
    assert json.loads(json.dumps(record)) == record
    first = record["documents"][0]
    assert "".join(first["pieces"]) == "hello <world>\n"
    assert first["bytes"] == 14
    assert first["tokens"] == len(first["pieces"])
    assert sum(row["documents"] for row in record["lengths"]) == len(store.train) == 6
    assert sum(row["tokens"] for row in record["lengths"]) == store.train.num_tokens
    assert record["ledger"]["empty"] == 1
    assert record["kept_percent"] == pytest.approx(600 / 7)
    assert record["batch"]["input_ids"]["shape"] == [3, 16]
    assert record["batch"]["labels"]["begins"][0] == -100
    assert record["not_predicted"] == 3
    joined = "".join("".join(block["pieces"]) for block in record["blocks"]["examples"])
    assert joined.startswith("hello <world>\n<|endoftext|>hello <world>\nhello <world>\n<|endoftext|>")


def test_lengths_in_powers_of_two():
    import numpy as np

    class Split:
        def lengths(self):
            return iter([np.array([1, 2, 3]), np.array([4, 17, 2])])

    assert inspection.lengths(Split()) == [
        {"at_least": 1, "documents": 1, "tokens": 1},
        {"at_least": 2, "documents": 3, "tokens": 7},
        {"at_least": 4, "documents": 1, "tokens": 4},
        {"at_least": 8, "documents": 0, "tokens": 0},
        {"at_least": 16, "documents": 1, "tokens": 17},
    ]


def test_the_page_has_all_of_it_and_text_cannot_become_markup(experiment, store):
    html = console.as_html(inspection.view(inspection.inspect(experiment, store, examples=2)))
    text = re.sub(r"<[^>]+>", "", html)
    for heading in ("Sources", "Ledger", "Splits", "Lengths of training documents", "Document 1", "Block 1", "Batch"):
        assert heading in text
    assert "<world>" not in html
    assert "world" in text
    assert "src=" not in html
    assert "href=" not in html


def test_each_way_to_cut_can_be_looked_at(experiment, store):
    for packing in ("packed", "chunked", "padded"):
        changed = config.override(experiment, {"blocks.packing": packing})
        record = inspection.inspect(changed, store, examples=2)
        assert record["blocks"]["packing"] == packing
        assert set(record["batch"]) >= {"input_ids", "labels"}
    assert tuple(record["splits"]) == ("train", "validation")
