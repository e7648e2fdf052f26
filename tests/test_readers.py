"""Texts and tables as people have them: which column, which dialect, packed how, in what bytes."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.cli import compose_config
from tinygpt.config import ConfigError, CustomData
from tinygpt.data import columns
from tinygpt.data.corpora import FileCorpus
from tinygpt.data.survey import Survey
from tinygpt.data.textfiles import format_of
from tinygpt.scaling.tables import read_table

PROSE = [f"Story {n}. The fox saw {n * n} birds by the river, and went home." for n in range(150)]
CHAT = [{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "Not far."}]


def read(path: Path, **keys: Any) -> tuple[list[str], Survey]:
    corpus = FileCorpus(CustomData(name="custom", path=str(path), **keys))
    corpus.survey.restart()
    return [document.text for document in corpus.documents("train")], corpus.survey


def refused(path: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **keys)
    return str(error.value)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, **found: Any) -> Path:
    pyarrow.parquet.write_table(pa.table(found), path)
    return path


def chosen(rows: list[dict[str, Any]], asked: str = "auto") -> list[str]:
    return columns.choose(columns.head_of(iter(rows)), asked, "x").columns


# --- which column is the text


@pytest.mark.parametrize(
    "found",
    [
        [
            {"URL": f"https://example.org/a/very/long/path/{n}", "Text": t[:20]}
            for n, t in enumerate(PROSE)
        ],
        [{"text": None, "url": f"https://example.org/{n}"} for n in range(1500)]
        + [{"text": "a b"}],
        [{"TEXT": t, "summary": t * 3} for t in PROSE],
    ],
    ids=["csv of links", "null at first", "capitals"],
)
def test_text_is_preferred_in_any_case(found: list[dict[str, Any]]) -> None:
    assert [name.lower() for name in chosen(found)] == ["text"]


@pytest.mark.parametrize(
    "other",
    [
        lambda n: ("neu", "neg", "pos")[n % 3],
        lambda n: f"conversation-{n:060d}-a1b2",
        lambda n: f"https://example.org/{n:080d}",
        lambda n: "2024-01-01 10:00:00.000000 +00:00 2024-01-01 10:00:00.000000 +00:00",
        lambda n: f"{n:064x}",
        lambda n: "the same long licence text in every single row of this whole table, always",
    ],
    ids=["label", "id", "link", "date", "hash", "constant"],
)
def test_labels_ids_links_dates_and_constants_are_not_text(other: Callable[[int], str]) -> None:
    rows = [{"other": other(n), "body": text} for n, text in enumerate(PROSE)]
    assert chosen(rows) == ["body"]
    alone = [{"other": other(n), "n": n} for n in range(150)]
    with pytest.raises(
        ConfigError, match=r"no column of text; it has other, n; data\.text_column="
    ):
        chosen(alone)
    assert chosen(alone, "other") == ["other"]


def test_the_only_column_is_the_text_whatever_it_is() -> None:
    assert chosen([{"name": name} for name in ("emma", "olivia", "ava")]) == ["name"]


def test_more_text_in_a_list_a_struct_or_a_chat_than_in_any_column_is_refused(
    tmp_path: Path,
) -> None:
    ids = [f"conversation-{n:06d}-a1b2" for n in range(150)]
    chat = lines(
        tmp_path / "chat.jsonl", [{"id": i, "source": "forum", "messages": CHAT} for i in ids]
    )
    assert refused(chat).endswith("most text is inside messages; give data.text_column=messages")
    pairs = lines(
        tmp_path / "pairs.jsonl",
        [{"id": i, "translation": {"en": "It is far.", "fr": "C'est loin, mon ami."}} for i in ids],
    )
    assert "give data.text_column=translation.fr" in refused(pairs)
    struct = parquet(tmp_path / "s.parquet", id=ids, doc=[{"raw": text} for text in PROSE])
    assert "give data.text_column=doc.raw" in refused(struct)
    listed = parquet(tmp_path / "l.parquet", name=ids, parts=[text.split() for text in PROSE])
    assert "give data.text_column=parts" in refused(listed)
    raw = parquet(tmp_path / "b.parquet", name=ids, content=[text.encode() for text in PROSE])
    assert "give data.text_column=content" in refused(raw)
    assert read(raw, text_column="content")[0] == PROSE


def test_nested_joined_and_chat_columns_are_read_when_they_are_named(tmp_path: Path) -> None:
    row = {
        "q": "Why?",
        "a": "Because.",
        "t": {"en": "far", "fr": {"old": "loing"}},
        "m": CHAT,
        "c": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": None}],
        "p": [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "image"}]}],
        "s": ["one", "two"],
        "a.b": "literal",
        "z": [{"text": "first"}, {"text": "second"}],
    }
    path = lines(tmp_path / "a.jsonl", [row, {"q": None, "a": "Alone.", "t": None}])
    expected = {
        "t.en": "far",
        "t.fr.old": "loing",
        "[q,a]": "Why?\n\nBecause.",
        "m": "user: How far is it?\n\nassistant: Not far.",
        "c": "human: Hi.\n\ngpt:",
        "p": "user: One",
        "s": "one\ntwo",
        "a.b": "literal",
        "z.text": "first\nsecond",
    }
    found = {key: read(path, text_column=key)[0] for key in expected}
    assert {key: texts[0] for key, texts in found.items()} == expected
    assert found["[q,a]"][1] == "Alone."
    assert found["t.en"][1] == ""
    assert "give" not in refused(path, text_column="nope")
    assert refused(path, text_column="t").endswith("name one, as data.text_column=t.en")


def test_what_is_no_text_is_skipped_and_counted(tmp_path: Path) -> None:
    values = ["one two", 3, True, float("nan"), None, "three four", ""]
    path = lines(tmp_path / "a.jsonl", [{"text": value} for value in values])
    texts, survey = read(path)
    assert texts == ["one two", "", "three four", ""]
    assert survey.values_not_text == 3
    numbers = lines(tmp_path / "n.jsonl", [{"text": 3}, {"text": 4}])
    assert refused(numbers, text_column="text").endswith("holds no text but 3 (row 1)")


# --- formats and dialects


@pytest.mark.parametrize(
    ("name", "data", "column", "detected"),
    [
        ("a.tsv", 'l\tt\n1\tsaid "one two\n2\tthree, four', "t", "CSV with tabs, a header"),
        (
            "a.CSV",
            'l;t\r\n1;"one ""1""\n\ntwo"\r\n2;three, four',
            "t",
            "CSV with semicolons, a header",
        ),
        (
            "b.tsv",
            'l\tt\n1\t"one" two\n2\tthree, four',
            "t",
            "CSV with tabs, a header, quotes are text",
        ),
        ("a.csv", "l\tt\n1\tone, two\n2\tthree four", "t", "CSV with tabs, a header"),
        ("b.csv", "l|t\r1|one, two\r2|three four", "t", "CSV with bars, a header"),
        (
            "c.csv",
            '1,"one, two."\n2,three four\n3,five six',
            "column_2",
            "CSV with commas, no header (columns are column_1, column_2, ...)",
        ),
        ("d.csv", 'text\n"one, two"\n"three, four"', "text", "CSV with commas, a header"),
        (
            "e.csv",
            "sep=;\r\nl;t\r\n1;one, two\r\n2;three, four",
            "t",
            "CSV with semicolons, a header",
        ),
        ("a.JSONL", '{"t": "one two"}\r\n{"t": "three four"}', "t", "JSON lines"),
        ("a.ndjson", '\ufeff{"t": "one two"}\n\n{"t": "three four"}\n', "t", "JSON lines"),
        ("a.json", ' [\n {"t": "one two"},\n {"t": "three four"}\n]\n', "t", "JSON"),
        ("b.json", '{"t": "one two"}\n{"t": "three four"}\n', "t", "JSON"),
        ("c.json", '{"n": 2, "rows": [{"t": "one two"}, {"t": "three four"}]}', "t", "JSON"),
        ("e.json", '["one two", "three four"]', "text", "JSON"),
        ("f.jsonl", '"one two"\n"three four"\n', "text", "JSON lines"),
        ("d.json", '{\n "t": "one two"\n}\n{\n "t": "three four"\n}\n', "t", "JSON"),
    ],
)
def test_formats_and_dialects_are_detected_and_told(
    name: str, data: str, column: str, detected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data.encode())
    texts, survey = read(tmp_path / name)
    assert survey.text_column == column
    assert list(survey.formats) == [detected]
    first = next(word for word in ("said", '"one" two', "one") if word in data)
    assert texts[0].startswith(first)
    assert [text for text in texts if text.startswith(("three", "two"))] == [
        "three, four" if "three, four" in data else "three four"
    ]


def test_delimiter_and_header_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one two:3\nfour five:6\n")
    config = compose_config(
        ["data=custom", f"data.path={tmp_path}/a.csv", "data.delimiter=':'", "data.header=false"]
    )
    assert isinstance(config.data, CustomData)
    corpus = FileCorpus(config.data)
    assert [document.text for document in corpus.documents("train")] == ["one two", "four five"]
    with pytest.raises(ConfigError, match=r"data\.delimiter=::: must be one character"):
        compose_config(["data=custom", "data.path=a", "data.delimiter='::'"])
    tabs = compose_config(["data=custom", "data.path=a", r"data.delimiter=\t"]).data
    assert isinstance(tabs, CustomData)
    assert tabs.delimiter == "\t"


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0\r\ufeff", codec="utf-8")).filter(
            lambda text: text not in columns.NULLS
        ),
        min_size=3,
    ),
    st.sampled_from(",;\t|"),
)
def test_any_text_survives_any_dialect(texts: list[str], delimiter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([("n", "text"), *enumerate(texts)])
        assert read(path)[0] == texts


# --- packed files and encodings


def zipped(data: bytes, tmp_path: Path, name: str) -> bytes:
    path = tmp_path / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
        archive.writestr(f"__MACOSX/._{name}", b"\0")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_every_kind_of_file_may_be_packed(name: str, tmp_path: Path) -> None:
    plain = tmp_path / name
    if name == "a.parquet":
        parquet(plain, text=PROSE)
    elif name in ("a.jsonl", "a.json"):
        lines(plain, [{"text": text} for text in PROSE])
    else:
        head = "" if name == "a.txt" else "text\n"
        plain.write_text(head + "\n".join(text.replace(",", "") for text in PROSE))
    data = plain.read_bytes()
    half = len(data) // 2
    packed = {
        "gz": gzip.compress(data[:half]) + gzip.compress(data[half:]),  # two members
        "bz2": bz2.compress(data),
        "XZ": lzma.compress(data),
        "zst": pa.Codec("zstd").compress(data, asbytes=True),
        "zstd": pa.Codec("zstd").compress(data, asbytes=True),
        "zip": zipped(data, tmp_path, name),
    }
    expected = read(plain)[0]
    for suffix, content in packed.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        texts, survey = read(path)
        assert texts == expected, suffix
        assert next(iter(survey.formats)).startswith(suffix.lower())
        path.write_bytes(content[: len(content) * 2 // 3])
        assert f"damaged or no .{suffix.lower()}" in refused(path), suffix


def test_streams_behind_each_other_are_all_read_or_refused(tmp_path: Path) -> None:
    """Python's own readers end, without a word, at the first that they cannot read."""
    parts = [f"{n} {n * PROSE[n]}\n".encode() for n in (7, 8, 9)]
    whole = b"".join(parts).decode().strip()
    for suffix, pack in ((".bz2", bz2.compress), (".xz", lzma.compress)):
        streams = [bytearray(pack(part)) for part in parts]
        path = tmp_path / f"a.txt{suffix}"
        good = [b"".join(streams)]
        padded = (b"\0" * 4).join(streams) + b"\0" * 8
        bad = [(b"\0" * 3).join(streams), good[0] + b"more", good[0][:-20], padded + b"\0"]
        (good if suffix == ".xz" else bad).append(padded)
        streams[1][40] ^= 0xFF
        bad.append(b"".join(streams))
        for data in good:
            assert "\n".join(read(written(path, data), separator="none")[0]) == whole
        for data in bad:
            assert refused(written(path, data)).startswith(f"data.path={path}: damaged or no ")
            table = written(tmp_path / f"t.csv{suffix}", data)
            with pytest.raises(ConfigError, match="cannot be read"):
                read_table(table)


def test_a_zip_of_several_files_is_refused_and_one_tells_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("b.txt", "b")
    assert "must hold one file, this one has 2" in refused(path)
    path.write_bytes(zipped(b'{"text": "one"}\n', tmp_path, "a.JSONL"))
    assert format_of(path) == "jsonl"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße aus Köln, 🦕.".encode(encoding))
    texts, survey = read(path)
    assert texts == ["Grüße aus Köln, 🦕."]
    detected = next(iter(survey.formats))
    assert detected.startswith("cut into" if encoding == "utf-8-sig" else encoding.upper())


def test_another_encoding_is_named_never_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" * 400_000 + b"caf\xe9\n")
    line = refused(path)
    assert "at byte 1,600,003, line 400,001; data.encoding=" in line
    assert read(path, encoding="latin-1")[0][-1].endswith("café")
    with pytest.raises(ConfigError, match=r"data\.encoding=klingon: no such encoding"):
        compose_config(["data=custom", "data.path=a", "data.encoding=klingon"])
    assert "NUL bytes" in refused(written(tmp_path / "u.txt", "no mark".encode("utf-16-le")))
    assert read(tmp_path / "u.txt", encoding="utf-16-le")[0] == ["no mark"]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_only_a_table_that_is_read_otherwise_has_another_fingerprint(tmp_path: Path) -> None:
    """Earlier versions took the longest column, and runs made from it stand for other documents."""
    rows = [{"u": f"https://example.org/{n:090d}", "b": t} for n, t in enumerate(PROSE)]
    for name, found, is_new in (
        ("a.jsonl", [{"text": text} for text in PROSE], False),
        ("b.jsonl", rows, True),
    ):
        path = lines(tmp_path / name, found)
        before = {"train": [[hashlib.sha256(path.read_bytes()).hexdigest(), ".jsonl"]]}
        known = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
        corpus = FileCorpus(CustomData(name="custom", path=str(path)))
        assert (corpus.fingerprint() != known) == is_new
        assert corpus.survey.text_column == ("b" if is_new else "text")


# --- what was once read wrongly without a word


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.csv", "n,body\n1,one two\n2,half\nother half\n3,four", "line 4 has 1 values for 2"),
        ("a.csv", "text,text\none two,three four\nfive six,seven", "line 1 names the column text"),
        ("b.csv", "n,body\n" + "1,word word\n" * 20 + "20,one, two", "line 22 has 3 values for 2"),
        ("a.csv", 'text\n"never closed\n', "not readable as CSV"),
        ("a.csv", "a\0b", "not a text file (it has NUL bytes)"),
        ("a.txt", "", "this file is empty"),
        ("a.txt", "ab\0cd", "not a text file (it has NUL bytes)"),
        ("b.txt", "%PDF-1.7\nab", "not a text file (a PDF; extract its text first)"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '["a"]\n', "line 1 is not a JSON object"),
        ("a.parquet", "PAR1 and no more", "not readable as parquet"),
        ("a.json", '[{"t": "a b"}]\nmore', "line 2 is not JSON"),
        ("a.json", '[{"t": "a b"}\n {"t": "c d"}]', "line 2 is not JSON"),
        ("a.json", '[{"t": "a b"},\n', "the array has no end"),
        ("a.json", '[{"t": "a b"},\n 5]', "line 2 is not a JSON object"),
        ("a.json", '{"x": [{"t": "a b"}], "y": [{"t": "c d"}]}', "2 lists of rows (x, y)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(
    name: str, data: str, line: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(data)
    said = refused(path)
    assert line in said
    assert said.startswith(f"data.path={path}: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("id,text,\n1,one two,\n2,three four,\n", ["one two", "three four"]),
        ("id,Text\n1,one two\nid,Text\n2,three four\n", ["one two", "three four"]),
        ("text\none two\nthree, four, and, five\nsix, seven\n", None),
        ("http://x/1,one two\nhttp://y/2,three four\n", ["one two", "three four"]),
        ("a-01,one two\na-02,three four\na-03,five\n", ["one two", "three four", "five"]),
        ('5,"A lonely row, here."\n', ["A lonely row, here."]),
    ],
    ids=["blank name", "header again", "one column of prose", "links", "ids", "one row"],
)
def test_headers_and_single_columns(data: str, expected: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(data)
    assert read(tmp_path / "a.csv")[0] == (expected or data.splitlines()[1:])


@pytest.mark.parametrize(
    ("data", "column", "first"),
    [
        ("id,,\n1,a short one,and a far longer second one\n2,b c,d e\n", "column_3", "and a far"),
        (",,\n1,one two three,x\n", "column_2", "one two three"),
        ('id, text\n1, "one, two"\n2, "he said ""no"", twice"\n', "text", "one, two"),
        ("\ufeffid,t\n1,one two\n\ufeffid,t\n2,three four\n", "t", "one two"),
        ('\ufeff"text"\none two\n\ufeff"text"\nthree four\n', "text", "one two"),
        ("text,review\n1,one two three\n2,four five six\n", "review", "one two three"),
        ("When?,What did you like most of all?\n1/2,one two\n3/4,it, too\n", "", ""),
        ("When?,What did you like most of all?\n1/2,one two\n3/4,five\n", "What did", "one two"),
        ("n,text\n1,NA\n2,one two\n3,\\N\n", "text", "one two"),
    ],
)
def test_names_of_columns_as_people_write_them(
    data: str, column: str, first: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.csv", data.encode())
    if not column:
        assert "line 3 has 3 values for 2" in refused(path)
        return
    texts, survey = read(path)
    assert str(survey.text_column).startswith(column)
    assert next(filter(None, texts)).startswith(first)
    assert not {"NA", r"\N", "text", "t"} & set(texts)
    assert not any(" " in text[:1] or '"' in text[:1] for text in texts)


@pytest.mark.parametrize("title", ["Reviews of 2023,,", "# a survey of May and of June,,", "May"])
def test_a_title_above_the_names_is_refused(title: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", f"{title}\nid,q,answer\n1,one,two six\n2,x,y z\n".encode())
    assert f"first line has only {title.rstrip(',')!r}, a title" in refused(path)
    if "," in title:
        assert read(path, header=True)[0][-1] == "y z"


@pytest.mark.parametrize(
    ("name", "data", "column"),
    [
        ("a.jl", '{"t": "one two"}\n{"t": "three four"}\n', "t"),
        ("a.jl", "f(x) = x\n", None),
        ("a.jsonlines", '{"t": "one two"}\n', "t"),
        ("a.tab", "n\tt\n1\tone, two\n2\tthree, four\n", "t"),
        ("a.psv", "n|t\n1|one, two\n2|three, four\n", "t"),
    ],
)
def test_tables_under_rarer_suffixes(
    name: str, data: str, column: str | None, tmp_path: Path
) -> None:
    written(tmp_path / name, data.encode())
    texts, survey = read(tmp_path)
    assert survey.text_column == column
    assert texts[0].startswith("one" if column else "f(x)")


def test_what_is_no_prose_under_a_suffix_of_text_is_refused(tmp_path: Path) -> None:
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    packed = written(tmp_path / "b.gz", gzip.compress(rows))
    for path in (written(tmp_path / "a.txt", rows), packed):
        assert refused(path).startswith(f"data.path={path}: lines of JSON objects; name it .jsonl")
        assert read(path, separator="none")[0][0].startswith('{"text"')
    assert "RTF; save it as" in refused(written(tmp_path / "c.txt", b"{\\rtf1 one}"))
    assert "nbconvert" in refused(written(tmp_path / "d.ipynb", b'{\n "cells": []\n}'))
    japanese = "昔々あるところに。" * 9
    jis = written(tmp_path / "e.txt", b"Once.\n" + japanese.encode("iso2022_jp"))
    assert "at byte 6; data.encoding=iso2022_jp" in refused(jis)
    assert read(jis, encoding="iso2022_jp")[0] == ["Once.\n" + japanese]


def test_the_logs_of_latex_are_no_prose(tmp_path: Path) -> None:
    for name in ("main.tex", "main.log", "a/b.aux", "a/b.log", "a/other.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    texts, survey = read(tmp_path)
    assert texts == ["the text of a/other.log", "the text of main.tex"]
    assert survey.skipped == {"LaTeX log": 2, ".aux": 1}


def test_a_text_that_changes_its_name_midway_is_not_skipped_unsaid(tmp_path: Path) -> None:
    said = [
        f"the cat number {i} saw a dog and ran over the hill to the sea {i} times"
        for i in range(300)
    ]
    rows = [{"body" if i < 250 else "content": 2 * text} for i, text in enumerate(said)]
    path = lines(tmp_path / "a.jsonl", rows)
    line = refused(path)
    assert "row 251 has no body but a text in content" in line
    assert len(read(path, text_column="[body,content]")[0]) == 300
    assert sum(map(bool, read(path, text_column="body")[0])) == 250


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_texts_under_two_names_by_turns_are_refused(kind: str, tmp_path: Path) -> None:
    """So pandas writes two tables that are put behind each other."""
    half = len(PROSE) // 2
    empty = "" if kind == "csv" else None
    found = {
        "text": [t[:60] if n < half else empty for n, t in enumerate(PROSE)],
        "content": [empty if n < half else t[:60] for n, t in enumerate(PROSE)],
        "title": [f"The title of {n * n} and its pages" for n in range(len(PROSE))],
    }
    path = tmp_path / f"a.{kind}"
    rows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    if kind == "parquet":
        parquet(path, **found)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([found, *(row.values() for row in rows)])
    else:
        lines(path, rows)
    line = refused(path)
    assert "75 of 150 rows have no text but a text in content; data.text_column=[text" in line
    assert read(path, text_column="[text,content]")[0] == [text[:60] for text in PROSE]
    assert sum(map(bool, read(path, text_column="text")[0])) == half


def test_titles_and_labels_beside_empty_texts_are_no_other_name(tmp_path: Path) -> None:
    rows = [
        {"title": f"The title of {n * n}", "comment": 2 * t if n % 3 else "", "why": "not told"}
        for n, t in enumerate(PROSE)
    ]
    assert sum(map(bool, read(lines(tmp_path / "a.jsonl", rows))[0])) == 100
    mixed = [{"Text" if n % 2 else "text": text[:60]} for n, text in enumerate(PROSE)]
    assert "75 of 150 rows have no text but a text in Text" in refused(
        lines(tmp_path / "b.jsonl", mixed)
    )


def test_names_of_files_are_not_text_beside_text() -> None:
    rows = [
        {"text": f"clip_{i}.wav", "transcription": f"what they said {i} times"} for i in range(9)
    ]
    assert chosen(rows) == ["transcription"]
    assert chosen([{"text": f"clip_{i}.wav"} for i in range(9)]) == ["text"]


def test_a_sentence_may_be_a_list_of_parts_as_telegram_has_it(tmp_path: Path) -> None:
    parts = ["see ", {"type": "link", "text": "x.org"}, " today"]
    found = [{"id": 1, "from": "A", "text": "one two"}, {"id": 2, "from": "B", "text": parts}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"name": "A group of us all", "messages": found}))
    assert read(path)[0] == ["one two", "see x.org today"]


def test_rows_may_lie_deeper_in_one_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", "data": {"items": [{"t": t} for t in PROSE]}}))
    assert read(path)[0] == PROSE
    row = {"body": PROSE[0], "meta": {"tags": [{"name": "a b"}]}}
    path.write_text(json.dumps(row))
    assert read(path)[0] == [PROSE[0]]


def test_a_refusal_says_what_would_do(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").write_text("key,value\nlicence,MIT\nyear,2024\n")
    rows = lines(tmp_path / "train.jsonl", [{"text": text} for text in PROSE])
    line = refused(tmp_path)
    assert "meta.csv has no column of text" in line
    assert line.endswith(f"; data.path='[{rows}]' names those with text")
    quotes = written(tmp_path / "q.csv", b'n,t\n1,"he said \\"no\\" to it"\n2,"two"\n')
    assert refused(quotes).endswith("a quote in a value is written twice)")
    last = written(tmp_path / "l.csv", b"n,t\n1,one two\n2,three\n(2 rows)\n")
    assert "line 4 has 1 values for 2 columns, it begins '(2 rows)'" in refused(last)
    text = written(tmp_path / "a.txt", b"one\r\n\r\ntwo\n***\n")
    assert refused(text, separator="---").startswith("data.separator='---': occurs nowhere in")
    assert read(text, separator="***")[0] == ["one\n\ntwo"]
    assert read(text, separator="\n\n")[0] == ["one", "two\n***"]


def test_one_object_of_texts_is_not_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({f"doc{i}": f"the text of document {i}" for i in range(40)}))
    assert "one JSON object with 40 texts" in refused(path)


def test_templates_and_few_labels_of_two_words_are_not_text() -> None:
    long = [
        "Please put the following passage into plain French for a child, if you can, ",
        "Sum up ",
    ]
    rows = [{"prompt": long[n % 2] * 3, "answer": text} for n, text in enumerate(PROSE)]
    assert chosen(rows) == ["answer"]
    with pytest.raises(ConfigError, match="has no column of text"):
        chosen([{"id": f"r{n}", "mood": ("very good", "very bad")[n % 2]} for n in range(9)])


def test_a_chat_may_be_a_list_of_roles_and_one_of_contents(tmp_path: Path) -> None:
    said = {"role": ["user", "assistant"], "content": ["How far?", "Not far."]}
    lines(tmp_path / "a.jsonl", [{"id": "a1", "chat": said}])
    assert "give data.text_column=chat" in refused(tmp_path / "a.jsonl")
    texts, _ = read(tmp_path / "a.jsonl", text_column="chat")
    assert texts == ["user: How far?\n\nassistant: Not far."]
    (tmp_path / "b.json").write_text(json.dumps({"id": "a1", "messages": CHAT}))
    assert "give data.text_column=messages" in refused(tmp_path / "b.json")


def test_files_of_one_corpus_are_read_by_one_column(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"story": t, "title": t[:7]} for t in PROSE])
    more = {"title": "A much longer title than any story, and then some more of it. ", "n": 1}
    lines(tmp_path / "b.jsonl", [{"story": t, **more, "of": t * 2} for t in PROSE])
    texts, survey = read(tmp_path)
    assert survey.text_column == "story"
    assert texts == PROSE * 2
