"""A look at a corpus: which columns of a table hold its text, and what its documents are like."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from raylm.config import CorpusConfig
from raylm.corpus import find_sources, guess_columns, list_sources, profile
from raylm.errors import DataError

PROSE = "It rained for most of the week and then it stopped."


def columns(path, rows, **settings):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    corpus = CorpusConfig(paths=str(path), **settings)
    found = guess_columns(find_sources(corpus), corpus)
    return None if found is None else found.text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "x", "body": PROSE}, None),
        ({"id": "a-1", "body": PROSE, "title": "Rain in May"}, "body"),
        ({"meta": {"url": "http://x/1"}, "page": {"en": PROSE}}, "page.en"),
        ({"title": "Rain?", "answers": {"text": [PROSE, PROSE]}}, "answers.text"),
        ({"Question": "Did it rain?", "Answer": "Yes."}, "{Question}\n{Answer}"),
        ({"instruction": "Say it", "input": "", "output": PROSE}, "{instruction}\n{input}\n{output}"),
        ({"prompt": "Say it", "completion": PROSE, "source": "me"}, "{prompt}\n{completion}"),
        ({"messages": [{"role": "user", "content": PROSE}]}, "{messages.role}: {messages.content}"),
        ({"conversations": [{"from": "gpt", "value": PROSE}]}, "{conversations.from}: {conversations.value}"),
        ({"id": 7, "kind": "a"}, None),
        ({"of {braces}": PROSE, "plain": "A few words here"}, "plain"),
    ],
)
def test_the_columns_of_rows(tmp_path, row, text):
    assert columns(tmp_path / "rows.jsonl", [row] * 5) == text


def test_every_format_of_tables_is_looked_at(tmp_path):
    rows = [{"id": str(number), "story": PROSE} for number in range(5)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.Table.from_pylist(rows).schema) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "a.tsv").write_text("id\tstory\n" + "".join(f"{row['id']}\t{row['story']}\n" for row in rows))
    for file in sorted(tmp_path.iterdir()):
        corpus = CorpusConfig(paths=str(file))
        found = guess_columns(find_sources(corpus), corpus)
        assert found.text == "story", file.name


def test_tables_of_two_kinds_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "articles.csv").write_text("title,body\n" + f"Rain,{PROSE}\n" * 9)
    (tmp_path / "reviews.csv").write_text("id,review\n" + f"1,{PROSE}\n")
    corpus = CorpusConfig(paths=str(tmp_path))
    with pytest.raises(DataError, match=r"reviews.csv.* no column 'body'.*articles.csv has it.* tables of one kind"):
        guess_columns(find_sources(corpus), corpus)
    (tmp_path / "reviews.csv").write_text("id,body\n" + f"1,{PROSE}\n")
    assert guess_columns(find_sources(corpus), corpus).text == "body"


def test_tables_beside_more_plain_text_are_not_what_the_corpus_is(tmp_path):
    (tmp_path / "data.csv").write_text("id,story\n" + f"1,{PROSE}\n" * 3)
    (tmp_path / "notes.md").write_text(PROSE)
    corpus = CorpusConfig(paths=str(tmp_path))
    assert guess_columns(find_sources(corpus), corpus).text == "story"
    (tmp_path / "notes.md").write_text(PROSE * 10)
    assert guess_columns(find_sources(corpus), corpus) is None
    (tmp_path / "data.csv").rename(tmp_path / "package-lock.json")
    (tmp_path / "notes.md").write_text(PROSE)
    assert guess_columns(find_sources(corpus), corpus) is None, "the settings of some program"


def test_a_profile_counts_lengths_duplicates_and_scripts(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("abcdef" if number % 2 else f"абв{number}")
    corpus = CorpusConfig(paths=str(tmp_path))
    found = profile(list_sources(corpus), corpus)
    assert (found.formats, found.seen, found.median_chars) == ({"text": 8}, 8, 5)
    assert found.duplicates == found.near_duplicates == 3 / 8
    assert found.scripts == {"LATIN": 24 / 36, "CYRILLIC": 12 / 36}


def test_a_profile_tells_near_duplicates_from_exact_ones(tmp_path):
    words = [f"word{number * number % 97}" for number in range(120)]
    for number in range(6):
        own = [*words, f"and{number}"] if number < 4 else [f"{word}{number}" for word in words]
        (tmp_path / f"{number}.txt").write_text(" ".join(own))
    (tmp_path / "again.txt").write_text((tmp_path / "5.txt").read_text())
    corpus = CorpusConfig(paths=str(tmp_path))
    found = profile(list_sources(corpus), corpus)
    assert (found.duplicates, found.near_duplicates) == pytest.approx((1 / 7, 4 / 7))


def test_a_profile_of_many_documents_looks_at_all_parts_of_them(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{n}"}) + "\n" for n in range(3000)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"ж{n}"}) + "\n" for n in range(3000)))
    corpus = CorpusConfig(paths=str(tmp_path))
    found = profile(list_sources(corpus), corpus)
    assert found.seen == 2000
    assert found.scripts == {"LATIN": 0.5, "CYRILLIC": 0.5}
