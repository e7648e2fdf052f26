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
CHAT_TEXT = "user: How far is it?\n\nassistant: Not far."


def read(path: Path, **keys: Any) -> tuple[list[str], Survey]:
    corpus = FileCorpus(CustomData(name="custom", path=str(path), **keys))
    corpus.survey.restart()
    return [document.text for document in corpus.documents("train")], corpus.survey


def refused(path: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **keys)
    return str(error.value)


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return written(path, "\n".join(json.dumps(row) for row in rows))


def parquet(path: Path, **found: Any) -> Path:
    pyarrow.parquet.write_table(pa.table(found), path)
    return path


def chosen(rows: list[dict[str, Any]], asked: str = "auto") -> list[str]:
    return columns.choose(columns.head_of(iter(rows)), asked, "x").columns


# --- which column is the text

ORDER = "Please put the following passage into plain French for a child, if you can, "
CLIPS = [{"text": f"clip_{i}.wav", "transcription": f"what they said {i} times"} for i in range(9)]
COLUMNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "text before long links": (
        [{"URL": f"https://example.org/a/long/path/{t}", "Text": t[:20]} for t in PROSE],
        "Text",
    ),
    "text that is null at first": (
        [{"text": None, "url": f"https://example.org/{n}"} for n in range(1500)] + [{"text": "a"}],
        "text",
    ),
    "text before longer prose": ([{"TEXT": t, "summary": t * 3} for t in PROSE], "TEXT"),
    "no names of files": (CLIPS, "transcription"),
    "names of files alone": ([{"text": row["text"]} for row in CLIPS], "text"),
    "the only one": ([{"name": name} for name in ("emma", "olivia", "ava")], "name"),
    "no templates": (
        [{"prompt": (ORDER, "Sum up ")[n % 2] * 3, "answer": t} for n, t in enumerate(PROSE)],
        "answer",
    ),
}


@pytest.mark.parametrize(("rows", "column"), COLUMNS.values(), ids=COLUMNS)
def test_the_column_that_auto_chooses(rows: list[dict[str, Any]], column: str) -> None:
    assert chosen(rows) == [column]


@pytest.mark.parametrize(
    "other",
    [
        lambda n: ("neu", "neg", "pos")[n % 3],
        lambda n: ("very good", "very bad")[n % 2],
        lambda n: f"conversation-{n:060d}-a1b2",
        lambda n: f"https://example.org/{n:080d}",
        lambda n: "2024-01-01 10:00:00.000000 +00:00 2024-01-01 10:00:00.000000 +00:00",
        lambda n: f"{n:064x}",
        lambda n: "the same long licence text in every single row of this whole table, always",
    ],
    ids=["label", "label of two words", "id", "link", "date", "hash", "constant"],
)
def test_labels_ids_links_dates_and_constants_are_not_text(other: Callable[[int], str]) -> None:
    assert chosen([{"other": other(n), "body": t} for n, t in enumerate(PROSE)]) == ["body"]
    alone = [{"other": other(n), "n": n} for n in range(150)]
    with pytest.raises(ConfigError, match=r"no text column; it has other, n; data\.text_col"):
        chosen(alone)
    assert chosen(alone, "other") == ["other"]


@pytest.mark.parametrize(
    ("name", "rows", "key"),
    [
        ("a.jsonl", [{"messages": CHAT, "source": "forum"}], "messages"),
        ("a.jsonl", [{"chat": {"role": ["user"], "content": ["How far?"]}}], "chat"),
        ("a.json", {"id": "a1", "messages": CHAT}, "messages"),
        ("a.jsonl", [{"t": {"en": "It is far.", "fr": "C'est loin, mon ami."}}], "t.fr"),
        ("a.parquet", [{"doc": {"raw": text}} for text in PROSE], "doc.raw"),
        ("a.parquet", [{"parts": text.split()} for text in PROSE], "parts"),
        ("a.parquet", [{"content": text.encode()} for text in PROSE], "content"),
    ],
)
def test_more_text_in_a_list_a_struct_or_a_chat_than_in_any_column_is_refused(
    name: str, rows: Any, key: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "a.json":
        written(path, json.dumps(rows))
    else:
        rows = [{"id": f"conversation-{n:06d}-a1b2", **row} for n, row in enumerate(rows)]
        if name == "a.parquet":
            parquet(path, **{name: [row[name] for row in rows] for name in rows[0]})
        else:
            lines(path, rows)
    assert refused(path).endswith(f"most text is inside {key}; give data.text_column={key}")
    if key == "content":
        assert read(path, text_column=key)[0] == PROSE


def test_nested_joined_and_chat_columns_are_read_when_they_are_named(tmp_path: Path) -> None:
    row = {
        "q": "Why?",
        "a": "Because.",
        "t": {"en": "far", "fr": {"old": "loing"}},
        "m": CHAT,
        "l": {"role": ["user", "assistant"], "content": ["How far is it?", "Not far."]},
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
        "m": CHAT_TEXT,
        "l": CHAT_TEXT,
        "c": "human: Hi.\n\ngpt:",
        "p": "user: One",
        "s": "one\ntwo",
        "a.b": "literal",
        "z.text": "first\nsecond",
    }
    found = {key: read(path, text_column=key)[0] for key in expected}
    assert {key: texts[0] for key, texts in found.items()} == expected
    assert (found["[q,a]"][1], found["t.en"][1]) == ("Alone.", "")
    assert "has no such column; it has q, a, t" in refused(path, text_column="nope")
    assert refused(path, text_column="t").endswith("name one, as data.text_column=t.en")


def test_what_is_no_text_is_skipped_and_counted(tmp_path: Path) -> None:
    values = ["one two", 3, True, float("nan"), None, "three four", ""]
    texts, survey = read(lines(tmp_path / "a.jsonl", [{"text": value} for value in values]))
    assert texts == ["one two", "", "three four", ""]
    assert survey.values_not_text == 3
    numbers = lines(tmp_path / "n.jsonl", [{"text": 3}, {"text": 4}])
    assert refused(numbers, text_column="text").endswith("holds no text but 3 (row 1)")


# --- formats and dialects

SURVEY = "What did you like most of all?"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.JSONL", '{"t": "one two"}\r\n{"t": "three four"}'),
        ("a.ndjson", '\ufeff{"t": "one two"}\n\n{"t": "three four"}\n'),
        ("a.jsonlines", '{"t": "one two"}\n{"t": "three four"}\n'),
        ("a.jl", '{"t": "one two"}\n{"t": "three four"}\n'),
        ("a.jsonl", '"one two"\n"three four"\n'),
        ("a.json", ' [\n {"t": "one two"},\n {"t": "three four"}\n]\n'),
        ("a.json", '{"t": "one two"}\n{"t": "three four"}\n'),
        ("a.json", '{\n "t": "one two"\n}\n{\n "t": "three four"\n}\n'),
        ("a.json", '{"n": 2, "rows": [{"t": "one two"}, {"t": "three four"}]}'),
        ("a.json", '{"n": 2, "in": {"rows": [{"t": "one two"}, {"t": "three four"}]}}'),
        ("a.json", '["one two", "three four"]'),
    ],
)
def test_json_of_any_shape(name: str, data: str, tmp_path: Path) -> None:
    written(tmp_path / name, data)
    texts, survey = read(tmp_path)
    assert texts == ["one two", "three four"]
    assert survey.text_column == ("t" if '"t"' in data else "text")
    assert list(survey.formats) == ["JSON" if name == "a.json" else "JSON lines"]


def test_an_object_may_be_a_row_of_its_own_and_julia_a_text(tmp_path: Path) -> None:
    row = {"body": PROSE[0], "meta": {"tags": [{"name": "a b"}]}}
    assert read(written(tmp_path / "a.json", json.dumps(row)))[0] == PROSE[:1]
    assert read(written(tmp_path / "a.jl", "f(x) = x\n"))[0] == ["f(x) = x"]


@pytest.mark.parametrize(
    ("name", "data", "texts", "detected"),
    [
        ("a.tsv", 'l\tt\n1\tsaid "a b\n2\tc, d', ['said "a b', "c, d"], "tabs, a header"),
        ("a.tsv", 'l\tt\n1\t"a" b\n2\tc, d', ['"a" b', "c, d"], "tabs, a header, quotes are text"),
        ("a.CSV", 'l;t\r\n1;"a ""b""\n\nc"\r\n2;d', ['a "b"\n\nc', "d"], "semicolons, a header"),
        ("a.csv", "l\tt\n1\tone, two\n2\tthree", ["one, two", "three"], "tabs, a header"),
        ("a.csv", "l|t\r1|one, two\r2|three", ["one, two", "three"], "bars, a header"),
        ("a.csv", "sep=;\r\nl;t\r\n1;a, b\r\n2;c, d", ["a, b", "c, d"], "semicolons, a header"),
        ("a.csv", 't\n"one, two"\n"three, four"', ["one, two", "three, four"], "commas, a header"),
        ("a.csv", "t\na b\nc, d, and, e\nf, g\n", ["a b", "c, d, and, e", "f, g"], "one column"),
        (
            "a.csv",
            'l, t\n1, "a, b"\n2, "c ""d"", e"\n',
            ["a, b", 'c "d", e'],
            "commas, a header, b",
        ),
        ("a.tab", "l\tt\n1\tone, two\n2\tthree, four\n", ["one, two", "three, four"], "tabs"),
        ("a.psv", "l|t\n1|one, two\n2|three, four\n", ["one, two", "three, four"], "bars"),
    ],
)
def test_dialects_of_csv(
    name: str, data: str, texts: list[str], detected: str, tmp_path: Path
) -> None:
    written(tmp_path / name, data)
    found, survey = read(tmp_path)
    assert (found, survey.text_column) == (texts, "t")
    assert next(iter(survey.formats)).startswith(f"CSV with {detected}")


@pytest.mark.parametrize(
    ("data", "column", "texts"),
    [
        ('1,"one, two."\n2,three four\n3,five six', "2", ["one, two.", "three four", "five six"]),
        ("id,text,\n1,one two,\n2,three four,\n", "text", ["one two", "three four"]),
        ("id,Text\n1,one two\nid,Text\n2,three four\n", "Text", ["one two", "three four"]),
        ("http://x/1,one two\nhttp://y/2,three four\n", "2", ["one two", "three four"]),
        ("a-01,one two\na-02,three four\na-03,six\n", "2", ["one two", "three four", "six"]),
        ('5,"A lonely row, here."\n', "2", ["A lonely row, here."]),
        ("id,,\n1,a b,and a far longer one\n2,c d,e\n", "3", ["and a far longer one", "e"]),
        (",,\n1,one two,x\n", "2", ["one two"]),
        ("\ufeffid,t\n1,one two\n\ufeffid,t\n2,three four\n", "t", ["one two", "three four"]),
        ('\ufeff"text"\none two\n\ufeff"text"\nthree four\n', "text", ["one two", "three four"]),
        ("text,review\n1,one two\n2,three four\n", "review", ["one two", "three four"]),
        (f"When?,{SURVEY}\n1/2,one two\n3/4,three four\n", SURVEY, ["one two", "three four"]),
        ("n,text\n1,NA\n2,one two\n3,\\N\n", "text", ["one two"]),
    ],
)
def test_headers_as_people_write_them_or_none(
    data: str, column: str, texts: list[str], tmp_path: Path
) -> None:
    found, survey = read(written(tmp_path / "a.csv", data))
    assert list(filter(None, found)) == texts
    assert survey.text_column == (f"column_{column}" if column.isdecimal() else column)
    assert ("no header" in next(iter(survey.formats))) == (column == "2")


def test_delimiter_and_header_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "one two:3\nfour five:6\n")
    config = compose_config(
        ["data=custom", f"data.path={path}", "data.delimiter=':'", "data.header=false"]
    ).data
    assert isinstance(config, CustomData)
    assert [d.text for d in FileCorpus(config).documents("train")] == ["one two", "four five"]
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


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            archive.writestr(f"__MACOSX/._{name}", b"\0")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_every_kind_of_file_may_be_packed(name: str, tmp_path: Path) -> None:
    plain = tmp_path / name
    if name == "a.parquet":
        parquet(plain, text=PROSE)
    elif name in ("a.jsonl", "a.json"):
        lines(plain, [{"text": text} for text in PROSE])
    else:
        head = "" if name == "a.txt" else "text\n"
        written(plain, head + "\n".join(text.replace(",", "") for text in PROSE))
    data = plain.read_bytes()
    half = len(data) // 2
    packed = {
        "gz": gzip.compress(data[:half]) + gzip.compress(data[half:]),  # two members
        "bz2": bz2.compress(data),
        "XZ": lzma.compress(data),
        "zst": pa.Codec("zstd").compress(data, asbytes=True),
        "zstd": pa.Codec("zstd").compress(data, asbytes=True),
        "zip": zipped(tmp_path / "made.zip", {name: data}).read_bytes(),
    }
    expected = read(plain)[0]
    for suffix, content in packed.items():
        path = written(tmp_path / f"{name}.{suffix}", content)
        texts, survey = read(path)
        assert texts == expected, suffix
        assert next(iter(survey.formats)).startswith(suffix.lower())
        written(path, content[: len(content) * 2 // 3])
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
            with pytest.raises(ConfigError, match="cannot be read"):
                read_table(written(tmp_path / f"t.csv{suffix}", data))


def test_a_zip_of_several_files_is_refused_and_one_tells_its_kind(tmp_path: Path) -> None:
    path = zipped(tmp_path / "two.zip", {"a.txt": b"a", "b.txt": b"b"})
    assert "must hold one file, this one has 2" in refused(path)
    assert format_of(zipped(path, {"a.JSONL": b'{"text": "one"}\n'})) == "jsonl"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    texts, survey = read(written(tmp_path / "a.txt", "Grüße aus Köln, 🦕.".encode(encoding)))
    assert texts == ["Grüße aus Köln, 🦕."]
    detected = next(iter(survey.formats))
    assert detected.startswith("cut into" if encoding == "utf-8-sig" else encoding.upper())


def test_another_encoding_is_named_never_guessed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", b"one\n" * 400_000 + b"caf\xe9\n")
    assert "at byte 1,600,003, line 400,001; data.encoding=" in refused(path)
    assert read(path, encoding="latin-1")[0][-1].endswith("café")
    with pytest.raises(ConfigError, match=r"data\.encoding=klingon: no such encoding"):
        compose_config(["data=custom", "data.path=a", "data.encoding=klingon"])
    unmarked = written(tmp_path / "u.txt", "no mark".encode("utf-16-le"))
    assert "NUL bytes" in refused(unmarked)
    assert read(unmarked, encoding="utf-16-le")[0] == ["no mark"]
    japanese = "昔々あるところに。" * 9
    jis = written(tmp_path / "e.txt", b"Once.\n" + japanese.encode("iso2022_jp"))
    assert "at byte 6; data.encoding=iso2022_jp" in refused(jis)
    assert read(jis, encoding="iso2022_jp")[0] == ["Once.\n" + japanese]


@pytest.mark.parametrize(("column", "is_new"), [("text", False), ("b", True)])
def test_only_a_table_that_is_read_otherwise_has_another_fingerprint(
    column: str, is_new: bool, tmp_path: Path
) -> None:
    """Earlier versions took the longest column, and runs made from it stand for other documents."""
    rows = [{"u": f"https://example.org/{n:090d}", column: t} for n, t in enumerate(PROSE)]
    path = lines(tmp_path / "a.jsonl", rows)
    before = {"train": [[hashlib.sha256(path.read_bytes()).hexdigest(), ".jsonl"]]}
    known = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    corpus = FileCorpus(CustomData(name="custom", path=str(path)))
    assert (corpus.fingerprint() != known) == is_new
    assert corpus.survey.text_column == column


# --- what was once read wrongly without a word


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.csv", "n,body\n1,one two\n2,half\nother half\n3,four", "line 4 has 1 values for 2"),
        ("a.csv", "n,t\n1,one\n2,x\n(2 rows)\n", "for 2 columns, it begins '(2 rows)'"),
        ("a.csv", "text,text\none two,three four\nfive six,seven", "line 1 names the column text"),
        ("a.csv", "n,body\n" + "1,word word\n" * 20 + "20,one, two", "line 22 has 3 values for 2"),
        ("a.csv", f"When?,{SURVEY}\n1/2,one two\n3/4,it, too\n", "line 3 has 3 values for 2"),
        ("a.csv", 'text\n"never closed\n', "not readable as CSV"),
        ("a.csv", 'n,t\n1,"he said \\"no\\" to it"\n2,x\n', "a quote in a value is written twice)"),
        ("a.csv", "a\0b", "not a text file (it has NUL bytes)"),
        ("a.txt", "", "this file is empty"),
        ("a.txt", "ab\0cd", "not a text file (it has NUL bytes)"),
        ("a.txt", "%PDF-1.7\nab", "not a text file (a PDF; extract its text first)"),
        ("a.txt", "{\\rtf1 one}", "not a text file (RTF; save it as"),
        ("a.txt", '{"text": "one"}\n{"text": "two"}\n', "lines of JSON objects; name it .jsonl"),
        ("a.ipynb", '{\n "cells": []\n}', "nbconvert"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '["a"]\n', "line 1 is not a JSON object"),
        ("a.parquet", "PAR1 and no more", "not readable as parquet"),
        ("a.json", '[{"t": "a b"}]\nmore', "line 2 is not JSON"),
        ("a.json", '[{"t": "a b"}\n {"t": "c d"}]', "line 2 is not JSON"),
        ("a.json", '[{"t": "a b"},\n', "the array has no end"),
        ("a.json", '[{"t": "a b"},\n 5]', "line 2 is not a JSON object"),
        ("a.json", '{"x": [{"t": "a b"}], "y": [{"t": "c d"}]}', "2 lists of rows (x, y)"),
        ("a.json", json.dumps({f"d{n}": "the text" for n in range(40)}), "object with 40 texts"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(
    name: str, data: str, line: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, data)
    said = refused(path)
    assert line in said
    assert said.startswith(f"data.path={path}: ")
    assert "\n" not in said


@pytest.mark.parametrize("title", ["Reviews of 2023,,", "# a survey of May and of June,,", "May"])
def test_a_title_above_the_names_is_refused(title: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", f"{title}\nid,q,answer\n1,one,two six\n2,x,y z\n")
    assert f"first line has only {title.rstrip(',')!r}, a title" in refused(path)
    if "," in title:
        assert read(path, header=True)[0][-1] == "y z"


def test_lines_of_objects_are_a_text_where_that_is_said(tmp_path: Path) -> None:
    packed = written(tmp_path / "b.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert refused(packed).startswith(f"data.path={packed}: lines of JSON objects; name it .jsonl")
    assert read(packed, separator="none")[0][0].startswith('{"text"')


def test_the_logs_of_latex_are_no_prose(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("main.tex", "main.log", "a/b.aux", "a/b.log", "a/other.log"):
        written(tmp_path / name, f"the text of {name}")
    texts, survey = read(tmp_path)
    assert texts == ["the text of a/other.log", "the text of main.tex"]
    assert survey.skipped == {"LaTeX log": 2, ".aux": 1}


def test_a_text_that_changes_its_name_midway_is_not_skipped_unsaid(tmp_path: Path) -> None:
    rows = [{"body" if n < 110 else "content": 2 * text} for n, text in enumerate(PROSE)]
    path = lines(tmp_path / "a.jsonl", rows)
    assert "row 111 has no body but a text in content" in refused(path)
    assert read(path, text_column="[body,content]")[0] == [2 * text for text in PROSE]
    assert sum(map(bool, read(path, text_column="body")[0])) == 110


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
    said = refused(lines(tmp_path / "b.jsonl", mixed))
    assert "75 of 150 rows have no text but a text in Text" in said


def test_a_sentence_may_be_a_list_of_parts_as_telegram_has_it(tmp_path: Path) -> None:
    parts = ["see ", {"type": "link", "text": "x.org"}, " today"]
    found = [{"id": 1, "from": "A", "text": "one two"}, {"id": 2, "from": "B", "text": parts}]
    content = json.dumps({"name": "A group of us all", "messages": found})
    assert read(written(tmp_path / "a.json", content))[0] == ["one two", "see x.org today"]


def test_a_refusal_says_what_would_do(tmp_path: Path) -> None:
    written(tmp_path / "meta.csv", "key,value\nlicence,MIT\nyear,2024\n")
    rows = lines(tmp_path / "train.jsonl", [{"text": text} for text in PROSE])
    line = refused(tmp_path)
    assert "meta.csv has no text column" in line
    assert line.endswith(f"; data.path='[{rows}]' names those with text")
    text = written(tmp_path / "a.txt", b"one\r\n\r\ntwo\n***\n")
    assert refused(text, separator="---").startswith("data.separator='---': occurs nowhere in")
    assert read(text, separator="***")[0] == ["one\n\ntwo"]
    assert read(text, separator="\n\n")[0] == ["one", "two\n***"]


def test_files_of_one_corpus_are_read_by_one_column(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"story": t, "title": t[:7]} for t in PROSE])
    more = {"title": "A much longer title than any story, and then some more of it. ", "n": 1}
    lines(tmp_path / "b.jsonl", [{"story": t, **more, "of": t * 2} for t in PROSE])
    texts, survey = read(tmp_path)
    assert survey.text_column == "story"
    assert texts == PROSE * 2
