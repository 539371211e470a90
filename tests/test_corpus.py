import bz2
import codecs
import csv
import gzip
import itertools
import json
import lzma
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.config import CorpusConfig, parse_setting
from raylm.corpus import (
    SEEN,
    File,
    Ledger,
    Shard,
    documents,
    formats,
    hashes,
    holdout,
    kept_fraction,
    left_out,
    list_sources,
    minhash,
    passages,
    select,
    shards,
    split,
)
from raylm.corpus.file_part import FilePart
from raylm.corpus.formats import whole_file
from raylm.errors import DataError


def read(corpus, ledger=None):
    ledger = Ledger() if ledger is None else ledger
    return [document for shard in shards(list_sources(corpus)) for document in documents(shard, corpus, ledger)]


def texts(corpus):
    return [document.text for document in read(corpus)]


def test_a_directory_gives_one_document_a_file_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("three")
    (tmp_path / ".hidden").write_text("not this")
    assert texts(CorpusConfig(paths=str(tmp_path))) == ["one", "two", "three"]


def test_globs_and_single_files(tmp_path):
    for name in ("a.py", "b.py", "c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(CorpusConfig(paths=[f"{tmp_path}/*.py", f"{tmp_path}/c.txt"])) == ["a.py", "b.py", "c.txt"]


def test_only_a_newline_ends_a_row_of_jsonl(tmp_path):
    rows = ["form\ffeed", "line\u2028separator\u0085next", "nul\0", "crlf\r\n", "\ufeffmark"]
    lines = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    assert texts(CorpusConfig(paths=str(tmp_path))) == rows


def test_jsonl_of_windows_with_a_mark_and_half_a_surrogate_pair(tmp_path):
    rows = [r'{"text": "one"}', r'{"text": "half \ud83d of it"}', r'{"text": "\ud83d\ude00 two\r\n"}']
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + "\r\n".join([*rows, ""]).encode())
    ledger = Ledger()
    found = [document.text for document in read(CorpusConfig(paths=str(tmp_path)), ledger)]
    assert found == ["one", "half \ufffd of it", "\U0001f600 two\r\n"]
    assert ledger["repaired: lone surrogates"] == 1


def test_columns_of_text_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "id": 1}\n{"body": "two"}\n')
    table = pa.table({"id": [1, 2], "body": ["three", "four"]})
    pa.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    assert texts(CorpusConfig(paths=str(tmp_path), text="body")) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("scheme", ["", "file://"])  # file:// is as remote as s3:// is
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_big_files_are_read_in_parts_and_every_row_once(tmp_path, scheme, suffix):
    rows = [f"{number} " + "x" * (number % 97) for number in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pa.parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=10)
    corpus = CorpusConfig(paths=f"{scheme}{tmp_path}/a.{suffix}")
    (source,) = list_sources(corpus)
    for most in (100, 977, 5000):
        parts = [part for part, _ in formats.split(whole_file(source.files[0], 0, source), most)]
        assert len(parts) > 10
        assert [text for part in parts for text in formats.texts(part, corpus)] == rows


MEMORY_OF_READING = """
import re, sys
import pyarrow.parquet
from raylm.config import CorpusConfig
from raylm.corpus import Ledger, documents, list_sources, shards

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

corpus = CorpusConfig(paths=sys.argv[1])
pyarrow.parquet.ParquetFile(sys.argv[1])
before = most()
read = (document for shard in shards(list_sources(corpus)) for document in documents(shard, corpus, Ledger()))
size = sum(document.num_bytes for document in read)
print((most() - before) / size)
"""


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        (50_000, 0.8),  # was 1.1: a whole column as it is stored
        (900, 3.6),  # was 6.0 and 10.1: and decoded, and in Python. Of one page, stored and decompressed, at least 2
    ],
)
@pytest.mark.parametrize("last", ["", "\U0001f642"])  # with which each character takes 4 bytes in Python
def test_a_parquet_file_of_one_row_group_is_not_read_whole(rows, most, last, tmp_path):
    text = random.Random(0).randbytes(60_000_000).translate(bytes(32 + byte % 95 for byte in range(256))).decode()
    length = len(text) // rows
    table = pa.table({"text": [text[row * length : (row + 1) * length] + last for row in range(rows)]})
    pa.parquet.write_table(table, tmp_path / "one.parquet")
    assert pa.parquet.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1
    command = [sys.executable, "-c", MEMORY_OF_READING, str(tmp_path / "one.parquet")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(told) < most


def test_the_standard_library_is_a_source():
    sources = list_sources(CorpusConfig(paths="python://stdlib"))
    assert len(sources[0].files) > 500
    assert all(file.path.endswith(".py") and "site-packages" not in file.path for file in sources[0].files)


def test_duplicates_fall_on_one_side_of_the_split(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number % 100}")
    sides = {}
    for document in read(CorpusConfig(paths=str(tmp_path), validation_fraction=0.3)):
        sides.setdefault(document.text, set()).add(document.split)
    assert all(len(side) == 1 for side in sides.values())
    held_out = sum(side == {"validation"} for side in sides.values())
    assert 15 <= held_out <= 45


def test_validation_paths_are_the_whole_validation_split(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "valid.txt").write_text("valid")
    corpus = CorpusConfig(
        paths=f"{tmp_path}/train.txt", validation_paths=f"{tmp_path}/valid.txt", validation_fraction=0.9
    )
    assert [(document.text, document.split) for document in read(corpus)] == [
        ("train", "train"),
        ("valid", "validation"),
    ]


def in_splits(corpus):
    """Split -> the texts of its documents, in order."""
    found = {}
    for document in read(corpus):
        found.setdefault(document.split, []).append(document.text)
    return found


@pytest.mark.parametrize("split_by", ["document", "passage"])
def test_test_text_is_taken_from_the_training_text(tmp_path, split_by):
    """The validation split is the same with and without; the test split, whatever is held out for validation."""
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(prose(6, seed=number))
    common = {"paths": str(tmp_path), "split_by": split_by}
    before = in_splits(CorpusConfig(**common, validation_fraction=0.2))
    after = in_splits(CorpusConfig(**common, validation_fraction=0.2, test_fraction=0.1))
    assert after["validation"] == before["validation"]
    assert after["test"] == in_splits(CorpusConfig(**common, validation_fraction=0.6, test_fraction=0.1))["test"]
    assert not {*after["test"]} & {*after["validation"]}
    assert not any(text in trained for text in after["test"] for trained in after["train"])
    assert sorted("".join(text for texts in after.values() for text in texts)) == sorted(
        "".join(text for texts in before.values() for text in texts)
    ), "nothing is lost"
    assert 0.25 < len(after["test"]) / len(after["validation"]) < 1


@pytest.mark.parametrize("held_out", [{"validation_paths": "valid"}, {"validation_fraction": 0.3}])
@pytest.mark.parametrize("split_by", ["document", "passage"])
def test_test_paths_are_the_whole_test_split(tmp_path, monkeypatch, held_out, split_by):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["train", "valid", "test"]):
        (tmp_path / name).write_text(prose(30, seed=number))
    common = {"paths": "train", "split_by": split_by, **held_out}
    found = in_splits(CorpusConfig(**common, test_paths="test", test_fraction=0.5))
    assert found.pop("test") == [prose(30, seed=2)]
    assert found == in_splits(CorpusConfig(**common))


def test_test_text_by_hash_beside_validation_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_text("".join(f"{number}\n" for number in range(300)))
    (tmp_path / "valid").write_text("".join(f"{number}\n" for number in range(300, 400)))
    corpus = CorpusConfig(paths="train", validation_paths="valid", test_fraction=0.3, separator="\n")
    found = in_splits(corpus)
    assert found["validation"] == [str(number) for number in range(300, 400)]
    assert 50 < len(found["test"]) < 130
    assert len(found["train"]) + len(found["test"]) == 300


def test_a_file_is_not_both_trained_on_and_tested_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = CorpusConfig(paths=str(tmp_path), test_paths=[f"{tmp_path}/b.txt", f"{tmp_path}/c*"])
    with pytest.raises(DataError, match=r"^corpus\.test_paths: \S+b\.txt and 1 more are in corpus\.paths") as error:
        list_sources(corpus)
    assert error.value.where == "corpus.test_paths"
    validated = corpus.model_copy(update={"paths": (f"{tmp_path}/a.txt",), "validation_paths": (f"{tmp_path}/b.txt",)})
    with pytest.raises(DataError, match=r"b\.txt is in corpus\.validation_paths, too"):
        list_sources(validated)
    everything = corpus.model_copy(update={"deduplicate": True, "test_paths": (str(tmp_path),)})
    with pytest.raises(DataError, match=r"^corpus\.test_paths: it has every file of corpus\.paths, too"):
        list_sources(everything)
    unique = corpus.model_copy(update={"deduplicate": True})
    kept = [document for shard in chosen(shards(list_sources(unique)), unique) for document in of(shard, unique)]
    assert [(document.text, document.split) for document in kept] == [("a", "train"), ("b", "test"), ("c", "test")]


def of(shard, corpus):
    return documents(shard, corpus, Ledger())


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "import pandas"}\n{"text": "else"}\n{"text": " \\n"}\n{"text": ""}\n')
    ledger = Ledger()
    kept = read(CorpusConfig(paths=str(tmp_path), keep_any=["pandas", "sklearn"]), ledger)
    assert [document.text for document in kept] == ["import pandas"]
    assert ledger == {
        "documents": 4,
        "bytes": 13 + 4 + 2,
        "empty": 2,
        "filtered: keep_any": 1,
        "kept": 1,
        "kept bytes": 13,
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', "row 2, byte 24: invalid UTF-8"),
        (b'{"text": "a"}\n{"text" "b"}\n', "row 2, byte 22: not JSON"),
        (b'{"text": "a"}\n{"text": 5}\n', "row 2: corpus.text: column 'text' must hold text, got 5"),
        (b'{"text": null}\n', "row 1: corpus.text: column 'text' must hold text, got null"),
        (b'{"body": "a", "id": 1}\n', "row 1: corpus.text: no column 'text'; columns: body, id"),
        (b'["a"]\n', "row 1: a row is an object"),
        (b'\xef\xbb\xbf{"text": "\xff"}\n', "row 1, byte 13: invalid UTF-8"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(CorpusConfig(paths=str(path)))
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: byte 3: invalid UTF-8"):
        read(CorpusConfig(paths=str(path)))


def test_a_path_that_matches_nothing_is_named_as_written(tmp_path):
    with pytest.raises(DataError, match=r"corpus\.paths: /no/such/place: no such file, directory or glob"):
        list_sources(CorpusConfig(paths="/no/such/place"))
    with pytest.raises(DataError, match=r"corpus\.paths: .*: no files in it"):
        list_sources(CorpusConfig(paths=str(tmp_path)))
    with pytest.raises(DataError, match=r"corpus\.paths is empty"):
        list_sources(CorpusConfig())


# Formats -------------------------------------------------------------------------------------------------------------

ROWS = [{"id": 1, "text": "one, two"}, {"id": 2, "text": 'naïve "three"\nfour'}]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(ROWS)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": write_jsonl,
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: pa.parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": write_arrow,
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_with_columns_gives_the_same_texts(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert texts(CorpusConfig(paths=f"{tmp_path}/{name}")) == [row["text"] for row in ROWS]


def test_of_a_json_file_the_first_row_is_checked_and_the_rest_is_not_read(tmp_path):
    """What is wrong after its first bytes is found when it is read; a file that is one object has its rows in that."""
    row = json.dumps({"text": "a text", "id": 1})
    torn = ",\n".join([row] * 20_000) + ',\n{"text'
    for name, content in (("list", f"[{torn}"), ("lines", torn), ("marked", f"\ufeff[{torn}"), ("naive", f"[{torn}ï")):
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
        corpus = CorpusConfig(paths=f"{tmp_path}/{name}.json")
        list_sources(corpus)
        with pytest.raises(DataError, match=f"{name}.json .*torn, or not json"):
            texts(corpus)
    (tmp_path / "object.json").write_text(f'{{"data": [{torn}')
    with pytest.raises(DataError, match="object.json .*torn, or not json"):
        list_sources(CorpusConfig(paths=f"{tmp_path}/object.json"))
    (tmp_path / "other.json").write_text(f'[{{"id": 1}}, {row}]')
    with pytest.raises(DataError, match="corpus.text: no column 'text'"):
        list_sources(CorpusConfig(paths=f"{tmp_path}/other.json"))


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_compressed_files(tmp_path, suffix, name):
    if name == "a.txt":
        (tmp_path / name).write_text("one\n\ftwo\n")
    else:
        WRITERS[name](tmp_path / name)
    expected = texts(CorpusConfig(paths=f"{tmp_path}/{name}"))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](content))
    assert texts(CorpusConfig(paths=str(tmp_path))) == expected


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_torn_compressed_file_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = "".join(json.dumps({"text": random.Random(n).randbytes(90).hex()}) + "\n" for n in range(2000))
    whole = COMPRESS[suffix](lines.encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} \(\d+ bytes\): torn, or not "):
        read(CorpusConfig(paths=str(path)))
    path.write_text("plain text after all")
    with pytest.raises(DataError, match=r"starts with b'pl.*expected b"):
        list_sources(CorpusConfig(paths=str(path)))


def test_torn_and_empty_tables_are_named_before_anything_starts(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ROWS * 100), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.parquet \(\d+ bytes\): torn, or not parquet"):
        list_sources(CorpusConfig(paths=str(path)))
    for name in ("b.parquet", "b.jsonl", "b.csv", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}: empty file \(0 bytes\), expected"):
            list_sources(CorpusConfig(paths=f"{tmp_path}/{name}"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "saved"])
def test_a_missing_column_is_named_with_the_ones_there_are(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}.*no column 'txt'; columns: id, text; did you mean text\?"):
        list_sources(CorpusConfig(paths=f"{tmp_path}/{name}", text="txt"))


ELI5 = {
    "q_id": "5lcjq6",
    "title": "Why is the sky blue?",
    "answers": {"a_id": ["x", "y"], "text": ["Because of scattering.", "Blue light is bent more."], "score": [5, 3]},
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_nested_columns_by_dotted_path_and_templates(tmp_path, suffix):
    path = tmp_path / f"eli5.{suffix}"
    if suffix == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist([ELI5]), path)
    elif suffix == "arrow":
        table = pa.Table.from_pylist([ELI5])
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(ELI5))
    answers = "Because of scattering. Blue light is bent more."
    assert texts(CorpusConfig(paths=str(path), text="answers.text")) == [answers]
    joined = CorpusConfig(paths=str(path), text="Question: {title}\nAnswer: {answers.text}", join="\n\n")
    assert texts(joined) == [
        "Question: Why is the sky blue?\nAnswer: Because of scattering.\n\nBlue light is bent more."
    ]
    with pytest.raises(DataError, match=r"corpus\.text: no column 'txt in answers.txt'; columns: a_id, text, score"):
        list_sources(CorpusConfig(paths=str(path), text="answers.txt"))


def test_a_list_of_objects_under_a_dotted_path(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"by": "a", "says": "hi"}, {"by": "b", "says": "ho"}]}])
    assert texts(CorpusConfig(paths=str(tmp_path), text="messages.says", join="\n")) == ["hi\nho"]


def test_text_files_cut_at_a_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ftwo\r\n\nthree\u2028four\n".encode())
    lines = CorpusConfig(paths=str(tmp_path), separator="\n")
    ledger = Ledger()
    assert [document.text for document in read(lines, ledger)] == ["one\ftwo", "three\u2028four"]
    assert ledger["empty"] == 1
    (tmp_path / "a.txt").write_text("one<|end|>two\n<|end|>" + "x" * 3_000_000 + "<|end|>\n")
    separated = CorpusConfig(paths=str(tmp_path), separator="<|end|>")
    assert texts(separated) == ["one", "two\n", "x" * 3_000_000]


def test_bad_rows_can_be_skipped_counted_and_listed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": 5}\n{"te\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(b"c\xff")
    (tmp_path / "c.parquet").write_bytes(b"")
    files = [f"{tmp_path}/{name}" for name in ("a.jsonl", "b.txt", "c.parquet")]
    corpus = CorpusConfig(paths=files, on_bad_row="skip")
    ledger, rejected = Ledger(), []
    (shard,) = shards(list_sources(corpus))
    found = documents(shard, corpus, ledger, lambda file, fault: rejected.append(fault.of(file)))
    assert [document.text for document in found] == ["a", "b"]
    assert ledger["bad rows"] == 5
    assert [fault.removeprefix(f"{tmp_path}/") for fault in rejected] == [
        "a.jsonl: row 2, byte 24: invalid UTF-8",
        "a.jsonl: row 3: corpus.text: column 'text' must hold text, got 5",
        "a.jsonl: row 4, byte 44: not JSON: Invalid control character at",
        "b.txt: byte 1: invalid UTF-8",
        "c.parquet: empty file (0 bytes), expected parquet",
    ]


def test_a_row_of_csv_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"a\nb"\n2,\xff\n')
    with pytest.raises(DataError, match=r"a\.csv: row 2, line 4: invalid UTF-8"):
        read(CorpusConfig(paths=str(tmp_path)))


def test_the_row_of_a_fault_far_into_a_big_file(tmp_path):
    rows = ['{"text": "' + "x" * (n % 50) + '"}\n' for n in range(2000)]
    rows[1500] = '{"text": 5}\n'
    (tmp_path / "a.jsonl").write_text("".join(rows))
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl")
    source = list_sources(corpus)[0]
    parts = [part for part, _ in formats.split(whole_file(source.files[0], 0, source), 1000)]
    faults = [row for part in parts for row in formats.texts(part, corpus) if isinstance(row, formats.BadDocument)]
    assert len(parts) > 10
    assert [fault.place for fault in faults] == ["row 1501"]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    corpus = CorpusConfig(paths=str(tmp_path))
    (shard,) = shards(list_sources(corpus))
    (tmp_path / "a.txt").write_text("another")
    with pytest.raises(DataError, match=r"a\.txt: it has changed after the corpus was listed"):
        list(documents(shard, corpus, Ledger()))


# Sources -------------------------------------------------------------------------------------------------------------


def test_an_installed_package_is_a_source():
    (source,) = list_sources(CorpusConfig(paths="python://pytest"))
    assert all(file.path.endswith(".py") and "/pytest/" in file.path for file in source.files)
    with pytest.raises(DataError, match=r"corpus\.paths: python://no_such: no package 'no_such' is installed"):
        list_sources(CorpusConfig(paths="python://no_such"))


def test_source_code_is_read_in_the_encoding_it_declares(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_bytes("# -*- coding: latin-1 -*-\n# naïve\n".encode("latin-1"))
    (package / "bad.py").write_bytes(b"# \xff\n")
    monkeypatch.syspath_prepend(tmp_path)
    ledger = Ledger()
    corpus = CorpusConfig(paths="python://some_package")
    assert [document.text for document in read(corpus, ledger)] == ["# -*- coding: latin-1 -*-\n# naïve\n"]
    assert ledger["bad rows"] == 1


def test_remote_files_directories_and_globs(tmp_path):
    for name in ("a.txt", "b.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    root = f"file://{tmp_path}"
    assert texts(CorpusConfig(paths=f"{root}/b.jsonl")) == ["b.jsonl"]
    assert texts(CorpusConfig(paths=f"{root}/*.jsonl")) == ["b.jsonl"]
    assert texts(CorpusConfig(paths=f"{root}/**/*.jsonl")) == ["b.jsonl", "sub/c.jsonl"]
    assert texts(CorpusConfig(paths=root)) == ['{"text": "a.txt"}\n', "b.jsonl", "sub/c.jsonl"]
    with pytest.raises(DataError, match=r"corpus\.paths: file://.*/nothing: no such file"):
        list_sources(CorpusConfig(paths=f"{root}/nothing"))


def test_other_schemes_go_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", b'{"text": "from memory"}\n')
    assert texts(CorpusConfig(paths="memory://corpus")) == ["from memory"]
    with pytest.raises(DataError, match=r"corpus\.paths: nosuch://x/y: "):
        list_sources(CorpusConfig(paths="nosuch://x/y"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set as load_dataset finds it: a directory of data files, four for train and one for test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "data_set"
    directory.mkdir()
    for part in range(4):
        write_jsonl(directory / f"train-{part}.jsonl", [{"text": f"{part} {row}", "id": row} for row in range(5)])
    write_jsonl(directory / "test-0.jsonl", [{"text": "test", "id": 0}])
    return f"hub://{directory}"


def test_a_data_set_of_the_hub_and_its_slices(hub):
    expected = [f"{part} {row}" for part in range(4) for row in range(5)]
    assert texts(CorpusConfig(paths=hub)) == expected
    assert texts(CorpusConfig(paths=f"{hub}?split=train[:7]")) == expected[:7]
    assert texts(CorpusConfig(paths=f"{hub}?split=train[50%:]")) == expected[10:]
    both = CorpusConfig(paths=hub, validation_paths=f"{hub}?split=test")
    assert [document.text for document in read(both) if document.split == "validation"] == ["test"]


def test_a_data_set_is_read_as_it_was_listed_though_there_is_a_new_commit(tmp_path, monkeypatch):
    """Stands in for the Hub: without a revision it gives its newest commit."""
    commits, loaded = ["a" * 40], []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("raylm.hub.out_of_reach", lambda: None)

    def builder(name, config, revision):
        where = tmp_path / name.replace("/", "___") / "default" / "0.0.0" / (revision or commits[-1])
        return SimpleNamespace(info=datasets.DatasetInfo(), cache_dir=str(where))

    def load(name, config, split, revision, streaming):
        loaded.append(revision or commits[-1])
        return datasets.Dataset.from_list([{"text": "words"}])

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = list_sources(CorpusConfig(paths="hub://somebody/stories"))
    commits.append("b" * 40)
    assert [part.file for shard in shards([source]) for part in shard.parts] == list(source.files)
    assert loaded == ["a" * 40]


def test_a_stream_of_the_hub_is_read_shard_by_shard(hub):
    corpus = CorpusConfig(paths=f"{hub}?split=train&streaming=true")
    plan = shards(list_sources(corpus))
    assert sum(len(shard.parts) for shard in plan) == 4
    assert texts(corpus) == [f"{part} {row}" for part in range(4) for row in range(5)]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("?split=nothing", 'Unknown split "nothing". Should be one of'),
        ("?slpit=train", "unknown slpit; known: split, config, revision, streaming"),
        ("?split=train[:5]&streaming=true", "a stream has no slices"),
        ("/nowhere", ""),
    ],
)
def test_a_data_set_that_cannot_be_had(hub, query, says):
    with pytest.raises(DataError, match=rf"hub://.*{re.escape(says)}"):
        read(CorpusConfig(paths=hub + query))


def test_a_saved_data_set_of_several_splits_wants_one_named(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"several splits; name one: .*/saved/test"):
        list_sources(CorpusConfig(paths=f"{tmp_path}/saved"))
    assert texts(CorpusConfig(paths=f"{tmp_path}/saved/test")) == [ROWS[1]["text"]]


# Filters -------------------------------------------------------------------------------------------------------------


def test_each_filter_keeps_and_counts(tmp_path):
    rows = ["import pandas", "import numpy", "x", "import pandas as pd # and a long comment", "class A: import pandas"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    ledger = Ledger()
    corpus = CorpusConfig(
        paths=str(tmp_path), keep_any="pandas", min_chars=2, max_chars=30, keep_matching="(?m)^import"
    )
    assert [document.text for document in read(corpus, ledger)] == ["import pandas"]
    counts = {what: count for what, count in ledger.items() if what.startswith("filtered")}
    assert counts == {f"filtered: {name}": 1 for name in ("keep_any", "min_chars", "max_chars", "keep_matching")}
    assert kept_fraction(ledger) == 1 / 5


def chosen(plan, corpus):
    return select(plan, lambda shards: (hashes(shard, corpus) for shard in shards), corpus)


@pytest.mark.parametrize("files_a_shard", [1, 3, 10])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"deduplicate": True}, ["a", "b", "c", "d", "e"]),
        ({"max_documents": 4}, ["a", "b", "a", "c"]),
        ({"max_documents": 100}, ["a", "b", "a", "c", "b", "a", "d", "e", "d"]),
        ({"deduplicate": True, "max_documents": 4}, ["a", "b", "c", "d"]),
        ({"deduplicate": True, "max_documents": 5}, ["a", "b", "c", "d", "e"]),
        ({"deduplicate": True, "max_documents": 6}, ["a", "b", "c", "d", "e"]),
    ],
)
def test_which_documents_are_kept_does_not_depend_on_the_shards(tmp_path, settings, expected, files_a_shard):
    for number, text in enumerate(["a", "b", "a", "", "c", "b", "a", "d", "e", "d"]):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = CorpusConfig(paths=str(tmp_path), **settings)
    (whole,) = shards(list_sources(corpus))
    plan = [Shard(whole.parts[first : first + files_a_shard], 1) for first in range(0, len(whole.parts), files_a_shard)]
    kept = [document.text for shard in chosen(plan, corpus) for document in documents(shard, corpus, Ledger())]
    assert kept == expected


def test_of_duplicates_in_both_splits_the_one_for_validation_is_kept(tmp_path):
    for name, text in {"train1": "a", "train2": "b", "valid1": "b", "valid2": "c", "valid3": "c"}.items():
        (tmp_path / name).write_text(text)
    corpus = CorpusConfig(paths=f"{tmp_path}/train*", validation_paths=f"{tmp_path}/valid*", deduplicate=True)
    plan = chosen(shards(list_sources(corpus)), corpus)
    kept = [document for shard in plan for document in documents(shard, corpus, Ledger())]
    assert [(document.text, document.split) for document in kept] == [
        ("a", "train"),
        ("b", "validation"),
        ("c", "validation"),
    ]


WORDS = [f"{first}{second}" for first in ("ba", "ro", "ti", "ne", "lu") for second in ("mak", "dir", "sen", "tov")]


def variants(seed, count=1, changed=1, num_words=200):
    """A text, and others in which some words are changed."""
    words = random.Random(seed).choices(WORDS, k=num_words)
    found = [" ".join(words)]
    for number in range(1, count):
        other = list(words)
        for at in random.Random(seed + number).sample(range(num_words), changed):
            other[at] = f"another{number}"
        found.append(" ".join(other))
    return found


def test_near_duplicates_share_a_band_and_other_texts_do_not():
    texts = [text for seed in range(0, 2000, 10) for text in variants(seed, count=3)]
    groups = minhash.components(np.stack([minhash.bands(text) for text in texts]))
    expected = np.repeat(np.arange(200), 3)
    assert len({*zip(groups.tolist(), expected.tolist(), strict=True)}) == len({*groups.tolist()}) == 200
    short = [f"Chapter {number} of the book" for number in range(50)] + ["", "x", "東京" * 9]
    assert len({*minhash.components(np.stack([minhash.bands(text) for text in short])).tolist()}) == 53
    assert (minhash.bands("One  Two\nthree four five six") == minhash.bands("one two three FOUR five six")).all()
    assert len(minhash.components(np.empty((0, minhash.BANDS), np.uint64))) == 0


def test_the_similarity_of_near_duplicates():
    """The part of the pairs that are found, by the Jaccard similarity of their stretches of 24 bytes."""
    found = {}
    for changed in (2, 10, 60):
        pairs = [variants(seed, count=2, changed=changed) for seed in range(0, 1000, 10)]
        found[changed] = np.mean([(minhash.bands(one) == minhash.bands(two)).any() for one, two in pairs])
    assert found[2] > 0.95
    assert found[60] == 0
    assert found[2] >= found[10] >= found[60]


def test_near_duplicates_are_dropped_from_training_and_counted(tmp_path, monkeypatch):
    """The first of a group is kept, and one that is held out before those to train on."""
    groups = [variants(seed, count=3) for seed in range(0, 300, 10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for group in groups for text in group))
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl", deduplicate="near", validation_fraction=0.2)

    def selected_of(corpus, ledger):
        plan = shards(list_sources(corpus))
        chosen = select(plan, lambda some: (hashes(shard, corpus) for shard in some), corpus, ledger)
        return [document for shard in chosen for document in documents(shard, corpus, ledger)]

    ledger = Ledger()
    found = selected_of(corpus, ledger)
    assert [document.text for document in found] == [group[0] for group in groups]
    assert (ledger["filtered: duplicates"], ledger["duplicates: near"]) == (60, 60)
    # Without it most groups would be trained on and scored.
    before = [{document.split for document in read(corpus) if document.text in group} for group in groups]
    assert ledger["duplicates: of another split"] >= sum(len(splits) > 1 for splits in before) > 5
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": groups[7][2]}) + "\n")
    held = corpus.model_copy(update={"validation_paths": (f"{tmp_path}/held.jsonl",)})
    ledger = Ledger()
    found = selected_of(held, ledger)
    assert [document.text for document in found if document.split == "validation"] == [groups[7][2]]
    assert len(found) == 30
    assert not {groups[7][0], groups[7][1]} & {document.text for document in found}
    assert ledger["duplicates: of another split"] == 3
    exact = selected_of(corpus.model_copy(update={"deduplicate": "exact"}), Ledger())
    assert len(exact) == 90


def test_true_means_exact_duplicates():
    assert CorpusConfig(deduplicate=True) == CorpusConfig(deduplicate="exact")
    assert CorpusConfig(deduplicate=False).deduplicate is False


@pytest.mark.parametrize("settings", [{"deduplicate": True}, {"max_documents": 4}, {"max_documents": 50}])
@pytest.mark.parametrize("files_a_shard", [1, 3])
def test_test_paths_change_nothing_in_what_is_kept_for_validation(tmp_path, settings, files_a_shard):
    """All of them are kept, but for what is validation text."""
    kinds = {"train": "a b c d e f", "valid": "g c h g", "test": "h i d i j"}
    for kind, words in kinds.items():
        for number, word in enumerate(words.split()):
            (tmp_path / f"{kind}{number}").write_text(word)
    found = {}
    for test_paths in ((), f"{tmp_path}/test*"):
        corpus = CorpusConfig(
            paths=f"{tmp_path}/train*", validation_paths=f"{tmp_path}/valid*", test_paths=test_paths, **settings
        )
        plan = [
            Shard(whole.parts[first : first + files_a_shard], 1)
            for whole in shards(list_sources(corpus))
            for first in range(0, len(whole.parts), files_a_shard)
        ]
        found[bool(test_paths)] = [document for shard in chosen(plan, corpus) for document in of(shard, corpus)]
    for name in ("train", "validation"):
        before, after = ([each.text for each in found[key] if each.split == name] for key in (False, True))
        tested = {"d"} if "deduplicate" in settings and name == "train" else set()
        assert after == [text for text in before if text not in tested]
    kept = "i d j" if "deduplicate" in settings else kinds["test"]
    assert [each.text for each in found[True] if each.split == "test"] == kept.split()


def test_no_more_is_read_than_needed(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    corpus = CorpusConfig(paths=str(tmp_path), max_documents=3)
    (whole,) = shards(list_sources(corpus))
    plan = [Shard((part,), 1) for part in whole.parts]
    read_shards = []

    def hashed(shards):
        for number, shard in enumerate(shards):
            read_shards.append(number)
            yield hashes(shard, corpus)

    assert len(select(plan, hashed, corpus)) == 3
    assert read_shards == [0, 1, 2]


@pytest.mark.parametrize("files_a_shard", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_documents": 4}, ["a0", "a1", "b0", "c0"]),
        ({"max_documents": 7}, ["a0", "a1", "a2", "b0", "c0", "c1", "c2"]),
        ({"max_documents": 100}, ["a0", "a1", "a2", "a3", "a4", "b0", "c0", "c1", "c2"]),
        ({"max_documents": 5, "validation_paths": "d/*"}, ["a0", "a1", "b0", "c0", "d0"]),
    ],
)
def test_documents_are_taken_from_the_sources_in_turn(tmp_path, monkeypatch, settings, expected, files_a_shard):
    monkeypatch.chdir(tmp_path)
    for name in "a0 a1 a2 a3 a4 b0 c0 c1 c2 d0 d1".split():
        (tmp_path / name[0]).mkdir(exist_ok=True)
        (tmp_path / name[0] / name).write_text(name)
    corpus = CorpusConfig(paths=["a", "b/b*", "c/*"], **settings)
    parts = [part for shard in shards(list_sources(corpus)) for part in shard.parts]
    sides = [[part for part in parts if part.split == side] for side in ("train", "validation")]
    plan = [
        Shard(tuple(side[first : first + files_a_shard]), 1)
        for side in sides
        for first in range(0, len(side), files_a_shard)
    ]
    plan = chosen(plan, corpus)
    assert [document.text for shard in plan for document in documents(shard, corpus, Ledger())] == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 20),
    st.booleans(),
    st.integers(1, 5),
)
def test_a_selection_is_the_same_however_the_shards_are_cut(sources, most, deduplicate, docs_a_shard):
    corpus = CorpusConfig(max_documents=most, deduplicate=deduplicate)
    documents = [(ord(text), index) for index, texts in enumerate(sources) for text in texts]
    cut = [documents[first : first + docs_a_shard] for first in range(0, len(documents), docs_a_shard)]
    file = File("a", 1, "")
    plan = [
        Shard(tuple(FilePart(file, "text", None, index) for _, index in part), number)
        for number, part in enumerate(cut)
    ]

    def read(some):
        return (np.array(cut[shard.num_bytes], SEEN).tobytes() for shard in some)

    kept = []
    for shard in select(plan, read, corpus):
        bits = np.unpackbits(np.frombuffer(shard.keep, np.uint8), count=shard.num_bits)
        kept += [document for document, bit in zip(cut[shard.num_bytes], bits, strict=False) if bit]
    turns, expected = {}, []
    for at, (text, index) in enumerate(documents):
        turns[index] = turns.get(index, -1) + 1
        expected.append((turns[index], at, text, index))
    first, contents = [], set()
    for _, at, text, index in sorted(expected):
        if len(first) < most and not (deduplicate and text in contents):
            first.append((at, text, index))
            contents.add(text)
    assert kept == [(text, index) for _, text, index in sorted(first)]


def test_a_nested_column_that_is_null_is_a_bad_row(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"answers": {"text": "yes"}}, {"answers": None}])
    with pytest.raises(DataError, match=r"row 2: corpus\.text: there is no text of answers\.text in null"):
        read(CorpusConfig(paths=str(tmp_path), text="answers.text"))


@pytest.mark.parametrize("text", ["{", "Question: {}", "a } b"])
def test_a_template_that_cannot_be_filled_in_is_a_config_error(text):
    with pytest.raises(ValueError, match="must "):
        CorpusConfig(text=text)


# Passages ------------------------------------------------------------------------------------------------------------


def prose(paragraphs, seed=0):
    """Paragraphs of 20 to 120 words, with a blank line after each."""
    draw = random.Random(seed)
    words = [f"{draw.choice('bdfgk')}{draw.choice('aeiou')}{draw.choice('lmnrst')}" for _ in range(60)]

    def paragraph():
        return " ".join(draw.choice(words) + draw.choice(["", "", "", ".", ","]) for _ in range(draw.randint(20, 120)))

    return "".join(paragraph() + "\n\n" for _ in range(paragraphs))


TEXT = st.text(st.sampled_from("ab é。.!?\n\r \t\u2028\0語")) | st.text()


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=30), st.integers(1, 60))
def test_passages_joined_are_the_text_and_bounded(parts, times):
    text = "".join(parts) * times
    cut = list(passages.passages(text))
    assert "".join(cut) == text
    assert all(500 <= len(passage) <= 1000 for passage in cut) or len(cut) == 1


@pytest.mark.parametrize(
    ("between", "ends"),
    [("\n\n", "\n\n"), ("\r\n \r\n", "\r\n \r\n"), ("\n", "\n"), (". ", ". "), ("。", "。"), (" ", " "), ("", "w")],
)
def test_passages_end_where_the_text_does(between, ends):
    cut = list(passages.passages(between.join(["w" * 70] * 200)))
    assert len(cut) >= 14
    assert all(passage.endswith(ends) for passage in cut[:-1])
    assert all(len(passage) < 600 for passage in cut[:-1]) or not between


def test_fifty_kilobytes_are_well_over_sixty_passages():
    text = prose(200)[:50_000]
    assert 65 <= len(list(passages.passages(text))) <= 100


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=30), st.integers(1, 60), st.floats(0.01, 0.99))
def test_a_text_split_by_passages_loses_nothing(tmp_path_factory, parts, times, fraction):
    text = "".join(parts) * times
    path = tmp_path_factory.mktemp("passages") / "a.txt"
    path.write_bytes(text.encode())
    corpus = CorpusConfig(paths=str(path), split_by="passage", validation_fraction=fraction)
    assert "".join(texts(corpus)) == (text.removeprefix("\ufeff") if text.strip() else "")


def test_training_passages_are_joined_up_to_the_next_one_held_out(tmp_path):
    text = prose(200)
    (tmp_path / "novel.txt").write_text(text)
    corpus = CorpusConfig(paths=str(tmp_path), split_by="passage", validation_fraction=0.1)
    ledger = Ledger()
    found = read(corpus, ledger)
    held_out = [document.text for document in found if document.split == "validation"]
    cut = list(passages.passages(text))
    assert held_out == [passage for passage in cut if passage in set(held_out)]
    assert 0.03 * len(cut) < len(held_out) < 0.2 * len(cut)
    assert max(len(document.text) for document in found) > 5000
    assert not any(first.split == second.split == "train" for first, second in itertools.pairwise(found))
    assert (ledger["documents"], ledger["kept"], ledger["passages"]) == (1, 1, len(cut))
    assert len({document.hash for document in found}) == len(found)


@pytest.mark.parametrize("settings", [{"validation_fraction": 0}, {"validation_paths": "valid"}, {"split_by": None}])
def test_without_a_split_by_passages_a_document_stays_whole(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_text(prose(20))
    (tmp_path / "valid").write_text(prose(30, seed=1))
    whole = [document.text for document in read(CorpusConfig(paths="train", **{"split_by": "passage", **settings}))]
    assert whole == [prose(20), prose(30, seed=1)][: len(whole)]


def test_filters_and_selection_are_of_documents_before_they_are_cut(tmp_path):
    for number, text in enumerate(["short", prose(50), prose(50), prose(50, seed=1), prose(50, seed=2)]):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = CorpusConfig(paths=str(tmp_path), split_by="passage", min_chars=1000, deduplicate=True, max_documents=2)
    plan = chosen(shards(list_sources(corpus)), corpus)
    ledger = Ledger()
    found = "".join(document.text for shard in plan for document in documents(shard, corpus, ledger))
    assert found == prose(50) + prose(50, seed=1)
    assert (ledger["filtered: min_chars"], ledger["filtered: duplicates"], ledger["kept"]) == (1, 1, 2)


# Holdout -------------------------------------------------------------------------------------------------------------


def held(corpus):
    return holdout(list_sources(corpus), corpus)


def validation(corpus, found):
    """The texts of the validation split, if the corpus is split as found."""
    update = {"split_by": found.split_by, "validation_fraction": found.validation_fraction}
    return {document.text for document in read(corpus.model_copy(update=update)) if document.split == "validation"}


@pytest.mark.parametrize(
    ("count", "split_by", "at_least"),
    [(1, "passage", 1), (49, "passage", 9), (50, "document", 10), (300, "document", 30)],
)
def test_a_corpus_of_few_documents_is_split_by_passages(tmp_path, count, split_by, at_least):
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(prose(5, seed=number))
    corpus = CorpusConfig(paths=str(tmp_path), validation_fraction=0.001)
    found = held(corpus)
    assert (found.split_by, found.documents, found.complete) == (split_by, count, True)
    assert len(validation(corpus, found)) >= at_least
    assert len(validation(corpus, found)) <= max(1, found.units // 5) + 1
    given = corpus.model_copy(update={"split_by": "document"})
    assert held(given).split_by == "document"
    assert held(given).units == count


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 400), st.integers(0, 10**6))
def test_the_validation_split_is_never_too_small_by_bad_luck(tmp_path_factory, count, seed):
    path = tmp_path_factory.mktemp("holdout") / "a.jsonl"
    write_jsonl(path, [{"text": f"{seed} {number}"} for number in range(count)])
    corpus = CorpusConfig(paths=str(path), split_by="document", validation_fraction=1e-5)
    assert max(1, min(30, count // 5)) <= len(validation(corpus, held(corpus))) < count


def test_a_fraction_that_holds_out_enough_is_not_changed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{number}"} for number in range(2500)])
    corpus = CorpusConfig(paths=str(tmp_path))
    found = held(corpus)
    assert (found.split_by, found.validation_fraction, found.documents, found.units) == ("document", 0.05, 2000, 2000)
    assert not found.complete
    assert found.unit_bytes == 3
    assert found.num_bytes == pytest.approx((tmp_path / "a.jsonl").stat().st_size, rel=0.01), "all that is read is kept"
    little = held(corpus.model_copy(update={"validation_fraction": 0.001}))
    assert little.validation_fraction < 0.03
    assert len(validation(corpus, little)) >= 30


def test_a_test_split_changes_nothing_in_how_the_corpus_is_split(tmp_path):
    for number in range(60):
        (tmp_path / f"train{number}.txt").write_text(prose(3, seed=number))
        (tmp_path / f"test{number}.txt").write_text(prose(9, seed=100 + number))
    corpus = CorpusConfig(paths=f"{tmp_path}/train*", validation_fraction=0.01)
    for tested in ({"test_fraction": 0.3}, {"test_paths": (f"{tmp_path}/test*",)}):
        assert held(corpus.model_copy(update=tested)) == held(corpus)


def test_what_decides_nothing_is_not_looked_at(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    for section in ({"validation_fraction": 0}, {"validation_paths": str(path), "split_by": "passage"}):
        corpus = CorpusConfig(paths=str(path), **section)
        found = held(corpus)
        assert (found.split_by, found.units) == (corpus.split_by or "document", 0)
        assert found.validation_fraction == corpus.validation_fraction


def test_a_data_set_of_the_hub_is_many_documents_and_not_loaded(hub, monkeypatch):
    corpus = CorpusConfig(paths=hub, deduplicate=True)
    sources = list_sources(corpus)
    monkeypatch.setattr(datasets, "load_dataset", None)
    formats.rows.data_set_rows.cache_clear()
    found = holdout(sources, corpus)
    assert (found.split_by, found.validation_fraction, found.documents) == ("document", 0.05, 50)
    assert (found.units, found.unit_bytes, found.complete) == (0, 0, False)


def test_a_small_fraction_of_a_large_corpus_stays_if_it_is_enough_documents(tmp_path, monkeypatch):
    """Only its beginning is looked at; `raylm init` had 0.0001 of 3 GB in the file, and the sweep held out 0.017."""
    monkeypatch.setattr(split, "MOST_UNITS", 200)
    rows = "".join(json.dumps({"text": f"{number} {prose(1, seed=number % 50)}"}) + "\n" for number in range(6000))
    (tmp_path / "a.jsonl").write_text(rows)
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl", validation_fraction=0.02)
    found = held(corpus)
    assert (found.validation_fraction, found.complete) == (0.02, False)
    assert len(validation(corpus, found)) > 60
    raised = held(corpus.model_copy(update={"validation_fraction": 0.005}))
    assert raised.validation_fraction > 0.1, "30 of the 200 that were seen"


def test_the_look_at_a_corpus_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MOST_BYTES", 100_000)
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(prose(60, seed=number))
    found = held(CorpusConfig(paths=str(tmp_path)))
    assert found.split_by == "document"
    assert (found.documents, found.complete) == (60, False)
    assert found.units < 20
    assert found.validation_fraction == 12 / 60
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "novel.txt").write_text(prose(400))
    found = held(CorpusConfig(paths=f"{tmp_path}/large"))
    assert (found.split_by, found.documents, found.units, found.complete) == ("passage", 1, 0, False)


def test_the_look_selects_as_the_corpus_is_selected(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{number % 100}"} for number in range(1000)])
    for section, count in ({"deduplicate": True}, 100), ({"max_documents": 70}, 70), ({"max_documents": 40}, 40):
        found = held(CorpusConfig(paths=str(tmp_path), **section))
        assert (found.documents, found.complete) == (count, True)


# As people have it ---------------------------------------------------------------------------------------------------


def names(source):
    return [os.path.basename(file.path) for file in source.files]


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def notes(path):
    """A directory of notes with what else lies in one."""
    for name, content in {
        "a.md": b"# notes",
        "b.py": b"import os",
        "c.pdf": b"%PDF-1.4 begins like text",
        "d.png": PNG,
        "e.PNG": PNG,
        "f.so": b"\x7fELF\0\0",
        "g.pt": b"PK\x03\x04\0\0",
        "h.txt": "naïve".encode("cp1252"),
        "i": b"\0\1",
        "data.csv": b"year;price\n2024;5\n",
        "package.json": b'{"name": "notes", "dependencies": {}}',
        "tsconfig.json": b"{// comment\n}",
        "backup.tar.gz": gzip.compress(b"a.md\0\0\0"),
        "many.jsonl": b'{"id": 1}\n',
    }.items():
        (path / name).write_bytes(content)
    return path


def test_of_a_mixed_directory_what_is_text_is_read_and_the_rest_counted(tmp_path):
    (source,) = list_sources(CorpusConfig(paths=str(notes(tmp_path))))
    assert names(source) == ["a.md", "b.py"]
    assert source.left_out == {
        ".pdf": 1, ".png": 2, ".so": 1, ".pt": 1, ".txt": 1, "without a suffix": 1, ".tar.gz": 1,
        ".csv without corpus.text": 1, ".json without corpus.text": 2, ".jsonl without corpus.text": 1,
    }  # fmt: skip
    assert left_out([source]).startswith("2 .png, 2 .json without corpus.text, ")
    latin = CorpusConfig(paths=f"{tmp_path}/*.txt", encoding="cp1252")
    assert texts(latin) == ["naïve"]


def test_hidden_files_locks_and_unfinished_downloads_are_counted(tmp_path):
    for name in (
        "a.txt",
        ".DS_Store",
        ".git/config",
        ".cache/huggingface/a.txt.metadata",
        "books/.a.txt.swp",
        "books/b.txt.part",
        "books/c.jsonl.tmp",
        "poetry.lock",
        "d.parquet.CRDOWNLOAD",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (source,) = list_sources(CorpusConfig(paths=str(tmp_path)))
    assert names(source) == ["a.txt"]
    assert source.left_out == {
        "hidden files": 2, "hidden directories": 2, ".part": 1, ".tmp": 1, ".lock": 1,
        ".crdownload": 1,
    }  # fmt: skip
    (source,) = list_sources(CorpusConfig(paths=f"file://{tmp_path}"))
    assert names(source) == ["a.txt"]
    assert source.left_out["hidden files"] == 4
    assert texts(CorpusConfig(paths=f"{tmp_path}/books/b.txt.part")) == ["text"]  # named by the user


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.json", "b.parquet", "b.txt.gz"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / name).write_text(POINTER)
    for paths in (str(tmp_path), f"{tmp_path}/b*", f"{tmp_path}/{name}"):
        with pytest.raises(DataError, match=r"b\.\w+(\.gz)?: a git-lfs pointer, .* git lfs pull .*on_bad_row=skip"):
            list_sources(CorpusConfig(paths=paths))
    (source,) = list_sources(CorpusConfig(paths=str(tmp_path), on_bad_row="skip"))
    assert (names(source), source.left_out) == (["a.txt"], {"git-lfs pointers": 1})
    ledger = Ledger()
    assert read(CorpusConfig(paths=f"{tmp_path}/{name}", on_bad_row="skip"), ledger) == []
    assert ledger == {"bad rows": 1}


def test_a_file_that_was_named_is_not_left_out(tmp_path):
    notes(tmp_path)
    for name, says in {
        "d.png": "invalid UTF-8",
        "data.csv": "no column 'text'",
        "h.txt": "byte 2: invalid UTF-8",
    }.items():
        with pytest.raises(DataError, match=f"{name}.*{says}"):
            read(CorpusConfig(paths=f"{tmp_path}/{name}"))


def test_a_directory_with_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(
        DataError, match=r"corpus\.paths: .*: nothing to read in it: 1 \.png, 1 \.txt; .*corpus\.encoding"
    ):
        list_sources(CorpusConfig(paths=str(tmp_path)))


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_a_directory_of_tables_without_the_column_is_an_error(tmp_path, name):
    for part in "ab":
        WRITERS[f"a.{name}"](tmp_path / f"{part}.{name}")
    with pytest.raises(DataError, match=r"no column 'txt'"):
        list_sources(CorpusConfig(paths=str(tmp_path), text="txt"))
    (tmp_path / "README.md").write_text("what it is")
    with pytest.raises(DataError, match=r"no column 'txt'"):  # else a typo would train on the README
        list_sources(CorpusConfig(paths=str(tmp_path), text="txt"))


def test_a_torn_table_beside_text_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"a\.parquet .*torn"):
        list_sources(CorpusConfig(paths=str(tmp_path)))


def test_a_found_file_that_turns_out_to_be_no_text_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_bytes(b"x" * 5000 + b"\xff")
    ledger = Ledger()
    assert [document.text for document in read(CorpusConfig(paths=str(tmp_path)), ledger)] == ["one"]
    assert ledger["bad rows"] == 1


def test_runs_token_stores_and_mlflow_are_never_corpus(tmp_path):
    for name in (
        "a.txt",
        "mlflow.db-journal",
        "mlruns/0/meta.yaml",
        "mlartifacts/0/x/experiment.yaml",
        "runs/notes/train-20261123-101500-3fa2/metrics.jsonl",
        "runs/tokens/0123456789abcdef/manifest.json",
        "runs/of-mine.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for paths in (str(tmp_path), f"{tmp_path}/**", f"file://{tmp_path}"):
        (source,) = list_sources(CorpusConfig(paths=paths))
        assert names(source) == ["a.txt", "of-mine.txt"]
        assert source.left_out == {"of runs and tracking": 5}


def test_links_to_nothing_and_in_circles_are_counted(tmp_path):
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "real" / "a.txt").write_text("here")
    (tmp_path / "elsewhere" / "b.txt").write_text("behind a link")
    for name, target in {
        "2024": tmp_path / "elsewhere",
        "again": "real",
        "circle": ".",
        "circle2": "..",
        "itself": "itself",
        "nothing.txt": "no such file",
    }.items():
        os.symlink(target, tmp_path / "data" / name)
    os.mkfifo(tmp_path / "data" / "pipe")
    for paths in (f"{tmp_path}/data", f"{tmp_path}/data/**/*.txt"):
        (source,) = list_sources(CorpusConfig(paths=paths))
        assert names(source) == ["b.txt", "a.txt"]
    (source,) = list_sources(CorpusConfig(paths=f"{tmp_path}/data"))
    assert source.left_out == {
        "links to nothing": 2,
        "no regular files": 1,
        "links to directories that are read already": 4,  # 2024 is below circle2, too
    }


def test_braces_in_globs(tmp_path):
    for name in ("a/1.txt", "b/2.txt", "b/3.md", "c/4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for root in (str(tmp_path), f"file://{tmp_path}"):
        for paths, expected in {
            "{a,b}/*.txt": ["a/1.txt", "b/2.txt"],
            "{a,c}": ["a/1.txt", "c/4.txt"],
            "**/*.{txt,md}": ["a/1.txt", "b/2.txt", "b/3.md", "c/4.txt"],
            "{b/{2,3}.*,c/*}": ["b/2.txt", "b/3.md", "c/4.txt"],
        }.items():
            assert texts(CorpusConfig(paths=f"{root}/{paths}")) == expected


def test_names_with_quotes_spaces_newlines_braces_and_bytes(tmp_path):
    found = ['it\'s "one".txt', "a b.txt", "new\nline.txt", "{x,y}.txt", "[z].txt", "caf\udce9.txt", "語.txt", "*.txt"]
    for name in found:
        (tmp_path / name).write_text(name.encode("utf-8", "replace").decode())
        _, value = parse_setting(f"corpus.paths={tmp_path}/{name}")
        assert texts(CorpusConfig(paths=value)) == [name.encode("utf-8", "replace").decode()]
    assert len(texts(CorpusConfig(paths=str(tmp_path)))) == len(found)


def test_a_separator_matches_the_line_ends_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\nmore\r\n\r\ntwo\n\nthree\r\n\nfour")
    expected = ["one\r\nmore", "two", "three", "four"]
    assert texts(CorpusConfig(paths=str(tmp_path), separator="\n\n")) == expected
    assert texts(CorpusConfig(paths=str(tmp_path), separator="\\n\\n")) == expected
    (tmp_path / "a.txt").write_bytes(b"".join(b"x" * 1023 + b"\r\n\r\n" for _ in range(5000)))
    assert texts(CorpusConfig(paths=str(tmp_path), separator="\n\n")) == ["x" * 1023] * 5000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.csv.gz"])
def test_text_of_other_encodings(tmp_path, encoding, name):
    content = "text\nnaïve café\n"
    encoded = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    # A byte order mark tells; what has none must be told.
    corpus = CorpusConfig(paths=str(tmp_path), encoding="cp1252" if encoding == "cp1252" else "utf-8")
    assert texts(corpus) == [content if name == "a.txt" else "naïve café"]


def test_text_that_is_not_of_its_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\x81")
    with pytest.raises(DataError, match=r"a\.txt: not text in cp1252"):
        read(CorpusConfig(paths=f"{tmp_path}/a.txt", encoding="cp1252"))
    with pytest.raises(ValueError, match="must be an encoding that Python knows"):
        CorpusConfig(encoding="latin-99")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_found(tmp_path, delimiter):
    write_csv(tmp_path / "a.csv", delimiter)
    assert texts(CorpusConfig(paths=f"{tmp_path}/a.csv")) == [row["text"] for row in ROWS]
    with pytest.raises(DataError, match="no column 'body'; columns: id, text"):
        list_sources(CorpusConfig(paths=f"{tmp_path}/a.csv", text="body"))


def test_a_row_of_csv_with_more_fields_than_the_header_is_not_cut(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello, world\n")
    with pytest.raises(DataError, match=r"row 1, line 2: has more fields than the header, 1; is a ',' unquoted\?"):
        read(CorpusConfig(paths=f"{tmp_path}/a.csv"))
    (tmp_path / "a.csv").write_text("id,text\n1,hello,,\n")
    assert texts(CorpusConfig(paths=f"{tmp_path}/a.csv")) == ["hello"]


@pytest.mark.parametrize(
    "content", [{"data": [{"text": "a"}, {"text": "b"}], "version": 1}, {"id1": {"text": "a"}, "id2": {"text": "b"}}]
)
def test_one_object_of_records(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    assert texts(CorpusConfig(paths=str(tmp_path))) == ["a", "b"]
    with pytest.raises(DataError, match=r"row 1: corpus\.text: no column 'txt'; columns: text"):
        list_sources(CorpusConfig(paths=str(tmp_path), text="txt"))


def test_an_error_names_some_of_many_columns(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({f"{'x' * 200}{number}": 1 for number in range(5000)}))
    with pytest.raises(DataError, match="and 4,980 more") as error:
        list_sources(CorpusConfig(paths=str(tmp_path)))
    assert len(str(error.value)) < 2500


CHAT = {
    "title": "Sky",
    "messages": [{"role": "user", "content": "Why is it blue?"}, {"role": "assistant", "content": "Scattering."}],
}


def test_a_template_over_a_list_of_messages_is_filled_in_for_each(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [CHAT])
    corpus = CorpusConfig(paths=str(tmp_path), text="{messages.role}: {messages.content}", join="\\n")
    assert texts(corpus) == ["user: Why is it blue?\nassistant: Scattering."]
    with pytest.raises(DataError, match=r"{messages.role} and {messages.content} are lists, and go together only"):
        read(CorpusConfig(paths=str(tmp_path), text="{title} {messages.role}: {messages.content}"))
    assert texts(CorpusConfig(paths=str(tmp_path), text="{title}: {messages.content}", join=" / ")) == [
        "Sky: Why is it blue? / Scattering."
    ]


def test_lists_of_lists_are_joined(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [[{"text": "a"}, {"text": "b"}], [{"text": "c"}]]}])
    assert texts(CorpusConfig(paths=str(tmp_path), text="messages.text")) == ["a b c"]


def test_the_error_of_a_row_names_the_way_out(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"row 2: .* got null; corpus\.on_bad_row=skip leaves such documents out"):
        read(CorpusConfig(paths=str(path)))
    write_jsonl(tmp_path / "b.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match="columns: body$"):  # to skip all of them is no way out
        list_sources(CorpusConfig(paths=f"{tmp_path}/b.jsonl"))


def test_a_binary_column_that_holds_utf8_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": pa.array(["naïve".encode(), b"\xff"], pa.binary())}), path)
    corpus = CorpusConfig(paths=str(path), on_bad_row="skip")
    assert texts(corpus) == ["naïve"]
    with pytest.raises(DataError, match=r"row 2: corpus\.text: column 'text' holds bytes that are not UTF-8"):
        read(CorpusConfig(paths=str(path)))
