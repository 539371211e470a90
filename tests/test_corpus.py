import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from raylm.config import CorpusConfig
from raylm.corpus import Ledger, check, documents, shards
from raylm.errors import DataError


def read(corpus, ledger=None):
    ledger = Ledger() if ledger is None else ledger
    return [document for shard in shards(check(corpus)) for document in documents(shard, corpus, ledger)]


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


def test_columns_of_text_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "id": 1}\n{"body": "two"}\n')
    table = pa.table({"id": [1, 2], "body": ["three", "four"]})
    pa.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    assert texts(CorpusConfig(paths=str(tmp_path), text="body")) == ["one", "two", "three", "four"]


def test_big_files_are_read_in_parts_and_every_row_once(tmp_path, monkeypatch):
    rows = [f"{number} " + "x" * (number % 97) for number in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl")
    from raylm import corpus as module

    whole = module.Piece(check(corpus)[0].files[0], 0)
    for most in (100, 977, 5000):
        pieces = [piece for piece, _ in module._pieces(whole, most)]
        assert len(pieces) > 10
        assert [text for piece in pieces for text in module._texts(piece, corpus, Ledger())] == rows


def test_the_standard_library_is_a_source():
    sources = check(CorpusConfig(paths="python://stdlib"))
    assert len(sources[0].files) > 500
    assert all(file.path.endswith(".py") and "site-packages" not in file.path for file in sources[0].files)


def test_duplicates_fall_on_one_side_of_the_split(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number % 100}")
    sides = {}
    for document in read(CorpusConfig(paths=str(tmp_path), validation_fraction=0.3)):
        sides.setdefault(document.text, set()).add(document.validation)
    assert all(len(side) == 1 for side in sides.values())
    held_out = sum(side == {True} for side in sides.values())
    assert 15 <= held_out <= 45


def test_validation_paths_are_the_whole_validation_split(tmp_path):
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "valid.txt").write_text("valid")
    corpus = CorpusConfig(
        paths=f"{tmp_path}/train.txt", validation_paths=f"{tmp_path}/valid.txt", validation_fraction=0.9
    )
    assert [(document.text, document.validation) for document in read(corpus)] == [("train", False), ("valid", True)]


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "import pandas"}\n{"text": "else"}\n{"text": " \\n"}\n{"text": ""}\n')
    ledger = Ledger()
    kept = read(CorpusConfig(paths=str(tmp_path), keep_any=["pandas", "sklearn"]), ledger)
    assert [document.text for document in kept] == ["import pandas"]
    assert ledger == {"documents": 4, "bytes": 13 + 4 + 2, "empty": 2, "filtered: keep_any": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', "row 2, byte 24: invalid UTF-8"),
        (b'{"text": "a"}\n{"text" "b"}\n', "row 2, byte 22: not JSON"),
        (b'{"text": "a"}\n{"text": 5}\n', "row 2: corpus.text: column 'text' must hold text, got 5"),
        (b'{"text": null}\n', "row 1: corpus.text: column 'text' must hold text, got null"),
        (b'{"body": "a", "id": 1}\n', "row 1: corpus.text: no column 'text'; columns: body, id"),
        (b'["a"]\n', "row 1: a row is an object"),
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
        check(CorpusConfig(paths="/no/such/place"))
    with pytest.raises(DataError, match=r"corpus\.paths: .*: no files in it"):
        check(CorpusConfig(paths=str(tmp_path)))
    with pytest.raises(DataError, match=r"corpus\.paths is empty"):
        check(CorpusConfig())
