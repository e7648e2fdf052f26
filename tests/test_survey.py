"""What is read of folders, where text is cut, which side it goes to, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tinygpt import cli, tokenizer
from tinygpt.config import ByteTokenizer, ConfigError, CustomData
from tinygpt.data import survey as surveys
from tinygpt.data.corpora import FileCorpus, split_documents
from tinygpt.data.files import find_files
from tinygpt.data.shards import prepare
from tinygpt.data.survey import Survey
from tinygpt.data.textfiles import END_OF_TEXT, SECTION, cut, is_separated
from tinygpt.data.tokenizers import load_tokenizer


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def opened(path: object, **more: Any) -> FileCorpus:
    return FileCorpus(CustomData(name="custom", path=str(path), **more))


def texts(path: object, **more: Any) -> list[str]:
    return [document.text for document in opened(path, **more).documents("train")]


# --- folders


def test_a_folder_is_read_without_what_nobody_wrote(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "corpus"  # may itself lie in a hidden folder
    for name in ("b.txt", "A.MD", "sub/c.log", "sub/d.py", "e.srt"):
        written(root / name, f"text of {name}")
    hidden = ("._b.txt", ".hidden.txt", "__MACOSX/._b.txt", ".git/HEAD.txt")
    for name in (*hidden, "sub/.ipynb_checkpoints/d-checkpoint.py", "sub/__pycache__/d.py"):
        written(root / name, b"\0\5\x16\7")
    written(root / "sub" / "__init__.py", "")
    written(root / "photo.PNG", b"\x89PNG")
    written(root / "LICENSE", "words")
    written(root / "video.ts", b"G\0\x11" * 100)
    (root / "gone.txt").symlink_to(root / "nowhere.txt")
    corpus = opened(root)
    found = [document.text for document in corpus.documents("train")]
    names = ("A.MD", "b.txt", "e.srt", "sub/c.log", "sub/d.py")
    assert found == [f"text of {name}" for name in names]
    assert corpus.survey.files == 5
    assert corpus.survey.skipped == {
        "hidden file": 2,
        "hidden folder": 4,
        "empty file": 1,
        ".png": 1,
        "without suffix": 1,
        "binary file": 1,
        "broken link": 1,
    }


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    written(root / "z" / "a.txt", "one")
    written(tmp_path / "elsewhere" / "b.txt", "two")
    (root / "a_link_to_z").symlink_to(root / "z")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "z" / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "0.txt").symlink_to(root / "z" / "a.txt")
    os.link(root / "z" / "a.txt", root / "z" / "hard.txt")
    survey = Survey()
    found = find_files("data.path", str(root), survey)
    assert [path.relative_to(root).as_posix() for path in found] == ["again/b.txt", "z/a.txt"]
    assert survey.skipped == {"repeated folder": 4, "duplicate file": 2}


def test_an_empty_file_is_refused_only_where_it_is_named(tmp_path: Path) -> None:
    empty, full = written(tmp_path / "a.py", ""), written(tmp_path / "b.py", "pass")
    assert find_files("data.path", str(tmp_path)) == [full]
    assert find_files("data.path", f"{tmp_path}/*.py") == [full]
    with pytest.raises(ConfigError, match=r"a\.py: this file is empty"):
        opened(empty)
    full.unlink()
    written(tmp_path / "c.png", "picture")
    with pytest.raises(ConfigError) as error:
        opened(tmp_path)
    assert str(error.value).startswith(
        f"data.path={tmp_path}: no text in there (1 .png, 1 empty file); "
    )


def test_settings_beside_text_are_no_text(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.json", '[{"text": "a"}]')
    assert find_files("data.path", str(tmp_path)) == [rows]
    text, survey = written(tmp_path / "a.txt", "text"), Survey()
    assert find_files("data.path", str(tmp_path), survey) == [text]
    assert survey.skipped == {".json": 1}


def test_what_is_packed_goes_by_the_suffix_inside(tmp_path: Path) -> None:
    names = ("a.txt.gz", "B.CSV.GZ", "c.tar.gz", "d.zip", "e.jsonl.zst")
    for name in names:
        written(tmp_path / name, b"\x1f\x8b\0")
    survey = Survey()
    found = find_files("data.path", str(tmp_path), survey)
    assert [path.name for path in found] == ["B.CSV.GZ", "a.txt.gz", "e.jsonl.zst"]
    assert survey.skipped == {".tar.gz": 1, ".zip": 1}


def test_several_files_in_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c, d.txt"):
        written(tmp_path / name, name)
    place = f"[{tmp_path}/b.txt, '{tmp_path}/c, d.txt',{tmp_path}/a.txt,{tmp_path}/b.txt]"
    assert texts(place) == ["b.txt", "c, d.txt", "a.txt"]
    assert opened(place).survey.skipped == {"duplicate file": 1}
    first, second = f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"
    corpus = opened(first, val_file=f"[{second},{first}]")
    assert [document.text for document in corpus.documents("val")] == ["b.txt", "a.txt"]
    words = ["data=custom", f"data.path=[{first},{second}]"]
    config = cli.compose_config(words)
    assert isinstance(config.data, CustomData)
    assert texts(config.data.path) == ["a.txt", "b.txt"]
    with pytest.raises(ConfigError) as error:
        cli.compose_config(["data=custom", "data.path=a.txt,b.txt"])
    line = "data.path=a.txt,b.txt: write several files as a list, 'data.path=[a.txt,b.txt]'"
    assert str(error.value) == line
    with pytest.raises(ConfigError, match=r"several are a list, 'data\.path=\[a\.txt,b\.txt\]'"):
        opened("a.txt,b.txt")


# --- separators


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"\n", "\n"), (r"\n\n", "\n\n"), (r"\t", "\t"), (r"\r\n", "\r\n"), (r"\\", "\\"), ("x", "x")],
)
def test_a_separator_as_it_is_typed_in_a_shell(typed: str, meant: str) -> None:
    assert CustomData(path="x", separator=typed).separator == meant
    if typed != r"\\":  # which Hydra reads as one
        config = cli.compose_config(["data=custom", "data.path=x", f"data.separator={typed}"])
        assert isinstance(config.data, CustomData)
        assert config.data.separator == meant


@pytest.mark.parametrize(
    "separator", ["auto", "none", "sections", "\n", "\n\n", "\r\n\r\n", "--\n"]
)
@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_line_ends_make_no_other_documents(
    tmp_path: Path, separator: str, line_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"    line {n}\n\n  of words\n--\n" for n in range(300))
    expected = texts(written(tmp_path / "unix.txt", text), separator=separator)
    assert len(expected) > 1 or separator == "none"
    other = written(tmp_path / "other.txt", text.replace("\n", line_end))
    for size in (1 << 20, 7):
        monkeypatch.setattr("tinygpt.data.textfiles.CHUNK", size)
        assert texts(other, separator=separator) == expected


def test_a_section_keeps_its_indentation() -> None:
    block = "    def f():\n        return 1\n" + "        x\n" * 200
    sections = list(cut(["\n\n".join([block] * 9)], "sections"))
    assert len(sections) > 3
    assert all(section.startswith("    def f():\n        return") for section in sections)
    assert list(cut(["\n\n  \n\n    a\n  b \n\n\n  c\n"], "\n\n")) == ["    a\n  b", "  c"]
    assert list(cut(["\n    one\n"], "none")) == ["    one"]
    assert list(cut(["　　從前\n\n　　後來"], "\n\n")) == ["　　從前", "　　後來"]
    assert list(cut([f"one{END_OF_TEXT} two"], END_OF_TEXT)) == ["one", "two"]
    spaces = "word" + " " * 5
    assert all(not text[0].isspace() for text in cut([spaces * 2 * SECTION], "sections"))


@pytest.mark.parametrize(
    ("text", "is_mark"),
    [
        ("one|two", True),
        ("one\n|\ntwo", True),
        ("Story.\n|\n" * 3, True),
        ('"Bye," he said.|\n"Hello," she said.', True),
        ("The end. |\nOnce more.|\n", True),
        ("He left. | Once upon a time. | The end.", True),
        ("words | words " * 60, True),
        ("her story|", True),
        ("GPT-2 ends documents with | as everybody knows.", False),
        ("GPT-2 ends documents with\n| as everybody knows.", False),
        ("It is called |.\nThat is all.", False),
        ("It is called `|`\nor '|' or\n\"|\"\n", False),
        ("<code>|</code>", False),
        ("END = '|'\n" * 60, False),
        ("使用|作为分隔符", False),
        ("故事。|从前", True),
        ("nothing", False),
    ],
)
def test_a_mark_in_a_sentence_separates_nothing(text: str, is_mark: bool) -> None:
    text = text.replace("|", END_OF_TEXT)
    for size in (len(text), 1, 5):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert is_separated(chunks) is is_mark


def test_only_text_that_is_cut_otherwise_now_has_another_fingerprint(tmp_path: Path) -> None:
    """The values are those of earlier versions: their runs and shards stand for other documents."""
    known = {
        "plain\n\ntext\n": "93cf148e",
        f"one{END_OF_TEXT}\n  two": "d3b88e60",
        "line\n    indented\n": "d4ea8dd5",
    }
    for text, before in known.items():
        assert opened(written(tmp_path / "a.txt", text)).fingerprint()[:8] == before
    for text in ("a\r\nb", "a\rb", "  a", f"about {END_OF_TEXT} here", "\n\n\u3000a"):
        marked = {"train": [[hashlib.sha256(text.encode()).hexdigest(), "", 2]]}
        expected = hashlib.sha256(json.dumps(marked).encode()).hexdigest()
        assert opened(written(tmp_path / "a.txt", text)).fingerprint() == expected


# --- splits


def sides(corpus: FileCorpus, config: CustomData) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for split, document in split_documents(corpus, config):
        found.setdefault(" ".join(document.text.split()), set()).add(split)
    return found


def test_the_same_text_stands_on_one_side(tmp_path: Path) -> None:
    endings = ("{}", " {}", "{} ", "{}\r\n", "\t{}\n\n", "\u3000{}")
    rows = [
        json.dumps({"text": ending.format(f"Story {n}.{line_end}It ends.")})
        for n in range(100)
        for ending in endings
        for line_end in ("\n", "\r\n", "\r")
    ]
    path = written(tmp_path / "a.jsonl", "\n".join(rows))
    config = CustomData(path=str(path), val_fraction=0.3, test_fraction=0.3)
    found = sides(FileCorpus(config), config)
    assert len(found) == 100
    assert all(len(where) == 1 for where in found.values())
    assert set.union(*found.values()) == {"train", "val", "test"}
    held = written(tmp_path / "val.jsonl", '{"text": "  Story 7.\\r\\nIt ends.\\n"}\n{"text": ""}')
    config = CustomData(path=str(path), val_file=str(held))
    found = sides(FileCorpus(config), config)
    assert found["Story 7. It ends."] == {"val", "duplicate"}


# --- what is said, kept and recorded


def test_the_survey_is_kept_with_the_shards(tmp_path: Path) -> None:
    rows = [{"text": f"story {n}"} for n in range(200)] + [{"text": ""}] * 4
    written(tmp_path / "corpus" / "a.jsonl", "\n".join(map(json.dumps, rows)))
    written(tmp_path / "corpus" / "b.png", "picture")
    config = CustomData(name="custom", path=str(tmp_path / "corpus"))

    def facts() -> dict[str, Any]:
        made = prepare(FileCorpus(config), config, ByteTokenizer(), tmp_path / "cache")
        found: dict[str, Any] = made.index["survey"]
        return found

    first = facts()
    line = "text: 1 file, 200 documents; skipped 1 .png, 4 empty documents"
    assert Survey.read(first).lines()[0] == line
    assert facts() == first  # from the cache
    written(tmp_path / "corpus" / "c.png", "picture")  # beside the same text
    assert facts()["skipped"] == {".png": 2}
    results = surveys.results(facts())
    assert results["text_files"] == 1
    assert results["text_files_skipped"] == "2 .png"
    assert (results["documents_read"], results["documents_empty"]) == (200, 4)
    assert all(isinstance(value, str | int | None) for value in results.values())
    assert surveys.results(None) == dict.fromkeys(results)


def test_an_empty_split_names_what_was_skipped(tmp_path: Path) -> None:
    written(tmp_path / "corpus" / "README.md", "Some words on the data.")
    written(tmp_path / "corpus" / "train.json", '[{"text": "one two"}]')
    config = CustomData(name="custom", path=str(tmp_path / "corpus"))
    with pytest.raises(ConfigError, match=r"only 1 document \(skipped 1 \.json\); raise data"):
        prepare(FileCorpus(config), config, ByteTokenizer(), tmp_path / "cache")


def test_lines_say_only_what_applies() -> None:
    assert Survey(files=1, documents=1).lines() == ["text: 1 file, 1 document"]
    assert Survey(documents=12345).lines() == ["text: 12,345 documents"]
    survey = Survey(files=2, documents=3, text_column="body", other_columns=["title", "url"])
    survey.values_not_text, survey.empty_documents = 1, 2
    survey.formats.update({"CSV, ';' between values": 2})
    assert survey.lines() == [
        "text: 2 files, 3 documents; skipped 2 empty documents, 1 value not text",
        "text column: body (not title, url); CSV, ';' between values",
    ]
    survey.skipped.update({f".{n}": 20 - n for n in range(12)})
    assert "12 .8" not in survey.lines()[0]
    assert "42 others" in survey.lines()[0]


# --- the tokenizer's command


def run_tokenizer(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    name, *rest = words
    {"train": tokenizer.train, "encode": tokenizer.encode}[name](rest)
    return capsys.readouterr().out


def test_the_tokenizer_takes_the_keys_of_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "zz", "body": f"abc{n}"} for n in range(5)]
    written(tmp_path / "t" / "a.jsonl", "\n".join(map(json.dumps, rows)))
    written(tmp_path / "t" / "b.png", "picture")
    out = tmp_path / "out.json"

    def symbols(*words: str) -> tuple[str, str]:
        place = [f"path={tmp_path / 't'}", "kind=char", f"out={out}"]
        said = run_tokenizer("train", *place, *words, capsys=capsys)
        return "".join(load_tokenizer(out).alphabet), said  # type: ignore[attr-defined]

    found, said = symbols("text_column=body")
    assert found == "01234abc"
    assert said.startswith("text: 1 file, 5 documents; skipped 1 .png\n")
    assert symbols("data.text_column=body", "max_documents=2")[0] == "01abc"
    assert symbols()[0] == "z"
    text = written(tmp_path / "a.txt", "ab|cd|ef")
    held = written(tmp_path / "v.txt", "cd")
    words = [f"path={text}", r"separator=|", f"val_file={held}", "test_fraction=0"]
    assert symbols(*words)[0] == "abef"


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n", b"one\rtwo", b"one\n\r\n two "])
def test_encode_keeps_line_ends(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path / "a.txt", content), tmp_path / "out.json"
    run_tokenizer("train", f"path={path}", f"out={out}", capsys=capsys)
    said = run_tokenizer("encode", f"tokenizer={out}", f"path={path}", capsys=capsys)
    ids = [int(word) for word in said.split(",")]
    assert load_tokenizer(out).decode(ids).encode() == content


def test_a_run_and_its_plan_say_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from tinygpt.sweeping.study import run_study
    from tinygpt.training.session import train

    rows = [{"text": f"story {n} " * 40} for n in range(60)] + [{"text": ""}]
    written(tmp_path / "t" / "a.jsonl", "\n".join(map(json.dumps, rows)))
    written(tmp_path / "t" / "b.png", "picture")
    words = ["data=custom", f"data.path={tmp_path / 't'}", "tokenizer=byte", "train.steps=1"]
    words += ["model.d_model=8", "model.n_heads=1", "model.n_layers=1", "model.max_seq_len=32"]
    words += ["train.batch_tokens=64", "train.sample_tokens=0", f"output_dir={tmp_path / 'o'}"]
    words += [f"cache_dir={tmp_path / 'cache'}", "data.val_fraction=0.2", "data.test_fraction=0.2"]
    line = "text: 1 file, 60 documents; skipped 1 .png, 1 empty document"
    monkeypatch.setenv("COLUMNS", "200")
    run_study([[*words, "plan=true"]])
    assert line in capsys.readouterr().out
    train(cli.compose_config(words), words, Console())  # from the cache
    assert line in capsys.readouterr().out
    (path,) = (tmp_path / "o" / "runs").glob("*/results.json")
    results = json.loads(path.read_text())
    assert (results["text_files"], results["text_files_skipped"]) == (1, "1 .png")
    assert (results["documents_read"], results["documents_empty"]) == (60, 1)
