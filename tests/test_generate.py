import io
import json
import os
import pty
import sys
import tty
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from raylm import cli, tokenizer
from raylm.config import TrainedTokenizer
from raylm.errors import ConfigError, DataError, StorageError
from raylm.generate import generate
from raylm.generation import output_file

SHORT = ["max_new_tokens=12"]


def texts(directory, prompts, *settings, **options):
    return generate(str(directory), [*SHORT, *settings], prompt=prompts, **options).record["texts"]


# Prompts -------------------------------------------------------------------------------------------------------------


def test_texts_continue_prompts_beyond_the_context_and_are_reproducible(trained_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\n\na\u2028c\n", encoding="utf-8")
    found = generate(str(trained_directory), ["max_new_tokens=40"], prompt=["b"], prompts=tmp_path / "prompts.txt")
    assert found.record["prompts"] == ["b", "a b", "a\u2028c"]  # the model has 16 positions
    for prompt, text in zip(found.record["prompts"], found.record["texts"], strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)
    assert found.view == "\n\n".join(found.record["texts"])
    again = texts(trained_directory, ["b", "a b"], "max_new_tokens=40", batch_size=1)
    assert again == found.record["texts"][:2]
    assert texts(trained_directory, ["b"], "max_new_tokens=40", seed=1) != again[:1]


def test_on_a_terminal_the_text_appears_while_it_is_made(trained_directory, monkeypatch):
    master, slave = pty.openpty()
    tty.setraw(slave)  # or the terminal makes \r\n of \n
    terminal = os.fdopen(slave, "w", encoding="utf-8")
    pieces = []
    monkeypatch.setattr(terminal, "write", lambda text, write=terminal.write: pieces.append(text) or write(text))
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["generate", str(trained_directory), "--prompt", "a b", "max_new_tokens=20"])
    with pytest.raises(SystemExit) as ended:
        cli.run(generate)
    terminal.close()
    shown = b""
    while part := _read(master):
        shown += part
    [text] = texts(trained_directory, ["a b"], "max_new_tokens=20", json=True)
    assert ended.value.code == 0
    assert shown.decode() == f"{text}\n"
    assert pieces[0] == "a b"
    assert len(pieces) > 10


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the other end is closed
        return b""


def test_prompts_of_several_lines_and_from_standard_input(trained_directory, tmp_path, monkeypatch):
    lines = ['"a b\\nc"', '{"prompt": "b\\n\\na", "text": "not read"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = generate(str(trained_directory), SHORT, prompts=tmp_path / "prompts.jsonl", dry_run=True)
    assert found.record["prompts"] == ["a b\nc", "b\n\na"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb c\n"))
    assert generate(str(trained_directory), SHORT, prompts=Path("-"), dry_run=True).record["prompts"] == ["a", "b c"]
    (tmp_path / "prompts.jsonl").write_text("plain\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"each line must be .* got plain"):
        generate(str(trained_directory), SHORT, prompts=tmp_path / "prompts.jsonl")


def test_several_texts_of_a_prompt_are_told_the_seed(trained_directory):
    with pytest.raises(ConfigError, match="num_return_sequences: is not taken; each --seed gives another text"):
        texts(trained_directory, ["a"], "num_return_sequences=2")


def test_with_json_or_several_prompts_nothing_is_shown_before_the_end(trained_directory, monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master):
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(terminal, "write", lambda text: pytest.fail(f"shown: {text!r}"))
        generate(str(trained_directory), SHORT, prompt=["a"], json=True)
        generate(str(trained_directory), SHORT, prompt=["a", "b"])
        generate(str(trained_directory), [*SHORT, "num_beams=2"], prompt=["a"])
        monkeypatch.undo()


def test_a_dry_run_tells_every_setting(trained_directory):
    record = generate(str(trained_directory), ["top_k=3"], prompt=["a"], dry_run=True).record
    assert record == {
        "model": str(trained_directory),
        "max_new_tokens": 100,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 3,
        "seed": 0,
        "prompts": ["a"],
    }


@pytest.fixture(scope="module")
def masked_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("masked")
    trained = tokenizer.train(["a b c"], TrainedTokenizer(vocab_size=260, special_tokens=["<eos>", "<mask>"]))
    trained.save_pretrained(directory)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(trained), max_position_embeddings=8, **sizes)).save_pretrained(directory)
    return directory


def test_a_masked_model_fills_its_masks(masked_directory):
    [text] = generate(str(masked_directory), prompt=["a<mask>c"]).record["texts"]
    assert (text[0], text[-1]) == ("a", "c")
    assert "<mask>" not in text
    with pytest.raises(ConfigError, match="--prompt 'a c': a masked model fills <mask>; put one in"):
        generate(str(masked_directory), prompt=["a<mask>", "a c"])
    with pytest.raises(ConfigError, match="top_k: .* is a masked model"):
        generate(str(masked_directory), ["top_k=2"], prompt=["a<mask>"])


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], {}, "nothing to continue; give --prompt TEXT"),
        (["top_k"], {"prompt": ["a"]}, "'top_k' is not a setting"),
        (["train.seed=1"], {"prompt": ["a"]}, "train.seed: generate takes settings of corpus and cluster"),
        (["corpus.texts=a"], {"prompt": ["a"]}, r"corpus.texts: unknown key, did you mean text\?"),
        (["corpus.paths=x"], {"prompt": ["a"]}, "corpus.paths excludes --prompt"),
        (["cluster.num_workers=2"], {"prompt": ["a"]}, "cluster.num_workers excludes --prompt"),
        (["corpus.paths=x"], {}, "corpus.paths needs --output"),
        (["corpus.paths=x", "corpus.validation_fraction=0.5"], {}, "nothing is held out"),
        (["corpus.paths=x", "corpus.tokens=ids"], {}, "corpus.tokens: generate continues text"),
        ([], {"prompt": ["a"], "output": "x.jsonl"}, "--output .*x.jsonl needs corpus.paths"),
        (["corpus.paths=x"], {"output": "x.txt"}, "--output must be a file .*.jsonl or .parquet, got .*x.txt"),
        (["corpus.paths=x"], {"output": "there.jsonl"}, "there.jsonl exists already; give another, or --overwrite"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(settings, options, message, tmp_path):
    (tmp_path / "there.jsonl").touch()
    if "output" in options:
        options = {**options, "output": tmp_path / options["output"]}
    with pytest.raises(ConfigError, match=message):
        generate("/nowhere", settings, **options)


def test_code_that_comes_with_a_model_is_named_with_the_setting_that_lets_it_run(tmp_path):
    mapped = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": mapped}))
    with pytest.raises(ConfigError, match="comes with code of its own.*model.trust_remote_code=true"):
        generate(str(tmp_path), prompt=["a"])


# Documents -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A corpus of two sources, of which one has columns."""
    directory = tmp_path_factory.mktemp("questions")
    rows = [{"q": f"{'a b ' * (number % 5)}{number}", "kind": "c"} for number in range(20)]
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "b.txt").write_text("b a: c")
    return directory


@pytest.mark.parametrize(
    "workers", ["cluster.cpus_per_worker=2", pytest.param("cluster.num_workers=2", marks=pytest.mark.slow)]
)
def test_every_document_is_continued_by_workers_that_take_every_cpu(
    workers, ray_cluster, trained_directory, questions, tmp_path
):
    from ray.data import DataContext

    before = DataContext.get_current().target_max_block_size
    settings = [
        *SHORT,
        "min_new_tokens=12",
        f"corpus.paths=['{questions}/a.jsonl', '{questions}/b.txt']",
        "corpus.text='{q}: {kind}'",
    ]
    output = tmp_path / "answers" / "all.jsonl"
    options = {"output": output, "batch_size": 3}
    planned = generate(str(trained_directory), settings, dry_run=True, **options).record
    assert (planned["documents"], planned["output"]) == (21, str(output))
    assert not output.parent.exists()
    record = generate(str(trained_directory), [*settings, workers], **options).record
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert (record["output"], record["documents"], record["tokens"]) == (str(output), 21, 21 * 12)
    prompts = [f"{'a b ' * (number % 5)}{number}: c" for number in range(20)] + ["b a: c"]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["text"] for row in rows] == texts(trained_directory, prompts, "min_new_tokens=12", batch_size=21)
    assert [row["source"] for row in rows] == [f"{questions}/a.jsonl"] * 20 + [f"{questions}/b.txt"]
    assert rows[-1]["doc_id"] == f"{tokens_hash('b a: c'):016x}"
    assert os.listdir(output.parent) == ["all.jsonl"]
    assert DataContext.get_current().target_max_block_size == before


def tokens_hash(text: str) -> int:
    """The doc_id that a token store has for a document."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def test_documents_without_a_mask_are_an_error(masked_directory, questions, tmp_path):
    settings = [f"corpus.paths={questions}/b.txt"]
    with pytest.raises(DataError, match="corpus.paths: no document has a <mask> to fill"):
        generate(str(masked_directory), settings, output=tmp_path / "out.jsonl")


def test_an_empty_corpus_is_an_error(trained_directory, questions, tmp_path):
    settings = [f"corpus.paths={questions}/a.jsonl", "corpus.text=q", "corpus.keep_any=[zebra]"]
    with pytest.raises(DataError, match="no document to continue; of what was read, .*filtered: keep_any: 20"):
        generate(str(trained_directory), settings, output=tmp_path / "out.jsonl")
    settings = [f"corpus.paths={questions}/a.jsonl", "corpus.text=q", "corpus.max_documents=3"]
    assert (
        generate(str(trained_directory), settings, output=tmp_path / "a.jsonl", dry_run=True).record["documents"] == 3
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_file_is_there_entirely_or_not_at_all(name, tmp_path):
    rows = [{"prompt": f"é{n}\u2028", "text": "b\n", "source": "s", "doc_id": f"{n:016x}"} for n in range(2500)]
    with pytest.raises(KeyError), output_file(tmp_path / name) as write:
        write([*rows, {"prompt": "a"}["text"]])
    assert list(tmp_path.iterdir()) == []
    with output_file(tmp_path / name) as write:
        for start in range(0, 2500, 100):
            write(rows[start : start + 100])
        assert not (tmp_path / name).exists()
    if name.endswith(".parquet"):
        file = pyarrow.parquet.ParquetFile(tmp_path / name)
        assert (file.read().to_pylist(), file.num_row_groups) == (rows, 3)
    else:
        lines = (tmp_path / name).read_text(encoding="utf-8").split("\n")
        assert [json.loads(line) for line in lines[:-1]] == rows
    with (
        pytest.raises(StorageError, match="--output .*cannot be written"),
        output_file(tmp_path / name / "inside.jsonl"),
    ):
        pass
