"""Corpora: every document is read once, whole, and lands on one side of the split."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import LAYOUTS, lay_out, write_rows
from tinygpt.cli import compose_config
from tinygpt.config import ByteTokenizer, ConfigError, CustomData, HubData, SyntheticData
from tinygpt.data import textfiles
from tinygpt.data.corpora import describe, open_corpus, split_documents, split_of
from tinygpt.data.shards import prepare
from tinygpt.data.textfiles import END_OF_TEXT, SECTION, cut


def custom(path: Path | str, **more: Any) -> CustomData:
    return CustomData(name="custom", path=str(path), **more)


def texts(config: CustomData | HubData | SyntheticData, split: str = "train") -> list[str]:
    return [document.text for document in open_corpus(config).documents(split)]


def refused(config: CustomData | HubData) -> str:
    """The one line that reading all of this corpus ends in."""
    with pytest.raises(ConfigError) as error:
        list(split_documents(open_corpus(config), config))
    assert "\n" not in str(error.value)
    return str(error.value)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- the split


def test_a_document_never_changes_sides() -> None:
    """Written down, so that a change of the hash, which would mix old splits, does not pass."""
    found = [split_of(f"document {n}", 0.4, 0.3) for n in range(12)]
    sides = "val test val test train train test val train test train val"
    assert found == sides.split()


@given(st.text(), st.floats(0.01, 0.49), st.floats(0.0, 0.49), st.floats(0.0, 0.49))
def test_sides_are_nested(text: str, val: float, test: float, more: float) -> None:
    """Raising a fraction moves documents into that side only; validation stays what it was."""
    side = split_of(text, val, test)
    if side == "val":
        assert split_of(text, val, more) == "val"
        assert split_of(text, min(0.5, val + more), test) == "val"
    if side == "train":
        assert split_of(text, val, test * 0.5) == "train"
    if test == 0:
        assert side != "test"


def test_the_sources_own_validation_is_used_and_kept_out_of_training(
    tmp_path: Path, cache: Path
) -> None:
    train = [f"story number {n}" for n in range(200)]
    own = ["only for validation", "story number 3", "story number 5"]
    config = custom(
        written(tmp_path / "train.txt", END_OF_TEXT.join([*train, "story number 3"])),
        val_file=str(written(tmp_path / "val.txt", END_OF_TEXT.join(own))),
        test_fraction=0.2,
    )
    corpus = open_corpus(config)
    assert corpus.own == {"val"}
    found = [(s, d.text) for s, d in split_documents(corpus, config)]
    assert [text for split, text in found if split == "val"] == own
    duplicates = [text for split, text in found if split == "duplicate"]
    assert duplicates == ["story number 3", "story number 5", "story number 3"]
    assert not {text for split, text in found if split == "train"} & set(own)
    assert any(split == "test" for split, _ in found)
    index = prepare(corpus, config, ByteTokenizer(), cache).index
    assert index["duplicates_of_validation_or_test"] == 3
    assert index["splits"]["val"]["documents"] == 3


def test_another_encoding_or_delimiter_has_other_shards(tmp_path: Path, cache: Path) -> None:
    text = "text;x\n" + "".join(f"caf\xe9 \x80 {n};row {n}\n" for n in range(200))
    path = written(tmp_path / "a.csv", text.encode("latin-1"))
    folders = set()
    for encoding, delimiter in (("latin-1", ";"), ("cp1252", ";"), ("latin-1", "|")):
        config = custom(path, encoding=encoding, delimiter=delimiter)
        folders.add(prepare(open_corpus(config), config, ByteTokenizer(), cache).folder)
    assert len(folders) == 3


def test_own_test_file_and_no_test_at_all(tmp_path: Path) -> None:
    train = written(tmp_path / "train.txt", END_OF_TEXT.join(f"story {n}" for n in range(100)))
    test = written(tmp_path / "test.txt", f"one{END_OF_TEXT}two")
    config = custom(train, test_file=str(test), val_fraction=0.3)
    found = Counter(split for split, _ in split_documents(open_corpus(config), config))
    assert found["test"] == 2
    assert found["train"] + found["val"] == 100
    config = custom(train, val_is_test=True, val_fraction=0.3, test_fraction=0.3)
    found = Counter(split for split, _ in split_documents(open_corpus(config), config))
    assert set(found) == {"train", "val"}


# --- cutting a stream of text


def chunks_of(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@given(
    st.lists(st.text("ab \n", max_size=12), max_size=12),
    st.sampled_from(["<>", "a", "aa", "\n\n", END_OF_TEXT, "ab a"]),
    st.integers(1, 9),
)
def test_a_separator_is_found_wherever_the_chunks_end(
    parts: list[str], separator: str, size: int
) -> None:
    text = separator.join(parts)
    pieces = [piece for piece in text.split(separator) if piece.strip()]
    if separator == "\n\n":  # a document keeps its first line's indentation
        expected = [re.sub(r"\A([ ]*\n)+", "", piece).rstrip() for piece in pieces]
    else:
        expected = [piece.strip() for piece in pieces]
    assert list(cut(chunks_of(text, size), separator)) == expected


WORDS = st.lists(
    st.sampled_from(["a ", "word", "\n", "\n\n", "\r\n", "\r\n\r\n", "x" * 700, " " * 90])
)


@given(WORDS, st.integers(1, 5000))
def test_sections_keep_the_text_however_it_comes(words: list[str], size: int) -> None:
    text = "".join(words) * 3
    sections = list(cut(chunks_of(text, size), "sections"))
    assert "".join("".join(sections).split()) == "".join(text.split())
    assert all(0 < len(section) <= 2 * SECTION for section in sections)
    assert sections == list(cut([text], "sections"))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_sections_end_at_blank_lines(line_end: str) -> None:
    paragraphs = [f"Paragraph {n} " + "of words " * 30 for n in range(100)]
    blank = line_end * 2
    sections = list(cut([blank.join(paragraphs)], "sections"))
    assert len(sections) > 5
    assert all(section.startswith("Paragraph") for section in sections)
    assert all(SECTION <= len(s) <= SECTION + 400 for s in sections[:-1])
    assert blank.join(sections).split() == " ".join(paragraphs).split()


def test_one_gigantic_line_is_cut_too() -> None:
    words = " ".join(str(n) for n in range(20_000))
    sections = list(cut(chunks_of(words, 777), "sections"))
    assert " ".join(sections) == words
    assert all(SECTION <= len(section) + 1 < SECTION + 10 for section in sections[:-1])
    solid = list(cut(["x" * 10 * SECTION], "sections"))
    assert "".join(solid) == "x" * 10 * SECTION
    assert {len(section) for section in solid} == {SECTION}


def test_none_is_one_document() -> None:
    assert list(cut(["  one\n\n", "two ", " three "], "none")) == ["  one\n\ntwo  three"]
    assert list(cut([" \n ", "\n"], "none")) == []


# --- text files


def test_a_text_file_is_cut_where_auto_says(tmp_path: Path) -> None:
    marked = written(tmp_path / "marked.txt", f"one\n\ntwo{END_OF_TEXT}\nthree{END_OF_TEXT}")
    assert texts(custom(marked)) == ["one\n\ntwo", "three"]
    odd = written(tmp_path / "odd [1]*.txt", "a paragraph\n\n" * 1000)  # like a glob
    assert len(texts(custom(odd))) > 3
    assert texts(custom(odd, separator="none")) == [("a paragraph\n\n" * 1000).strip()]
    expected = ["one", f"two{END_OF_TEXT}\nthree{END_OF_TEXT}"]
    assert texts(custom(marked, separator="\n\n")) == expected


def test_the_mark_is_found_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.txt", f"one{END_OF_TEXT}two")
    for size in range(1, 20):
        monkeypatch.setattr(textfiles, "CHUNK", size)
        assert texts(custom(path)) == ["one", "two"]


# --- rows


def test_csv_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.csv", 'text\n"one\ntwo"\n"three ""and"" four"\n')
    for size in range(1, 12):
        monkeypatch.setattr(textfiles, "CHUNK", size)
        assert texts(custom(path)) == ["one\ntwo", 'three "and" four']


def test_jsonl_with_nulls_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    written(path, '{"text": "one"}\r\n\n{"text": null}\n{"id": 3}\n{"text": "a\\u2028b\\nc"}')
    assert texts(custom(path)) == ["one", "", "", "a\u2028b\nc"]
    written(path, '{"text": "a\u2028b"}\n')  # no end of line in JSON Lines
    assert texts(custom(path)) == ["a\u2028b"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", r'{"text": "a\ud800b \ud83e\udd95"}')
    config = custom(path)
    found = [document.text for _, document in split_documents(open_corpus(config), config)]
    assert found == ["a\ufffdb 🦕"]


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    """The first documents come without the rest being read: the file's end is not even text."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "word " * 200}) + "\n"
    written(path, line.encode() * 3000 + b"\xff")
    documents = open_corpus(custom(path)).documents("train")
    assert [next(documents).text for _ in range(200)] == ["word " * 200] * 200
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(documents)


# --- what cannot be read


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for path in ("", "nowhere.txt", tmp_path / "*.txt", "/dev/null", "x" * 5000, "~nobody-here/x"):
        assert refused(custom(path)).startswith(f"data.path={path}: ")
    (tmp_path / "empty").mkdir()
    assert "no text in there (it is empty)" in refused(custom(tmp_path / "empty"))
    assert refused(custom(f"{tmp_path}/emp*")).endswith(": not a file")


def test_the_key_at_fault_is_named(tmp_path: Path) -> None:
    good, empty = written(tmp_path / "a.txt", "text"), written(tmp_path / "b.txt", "")
    assert refused(custom(good, val_file=str(empty))).startswith(f"data.val_file={empty}: ")
    assert refused(custom(good, test_file="nowhere")).startswith("data.test_file=nowhere: ")


# --- fingerprints


def test_a_fingerprint_is_of_the_content_not_the_path(tmp_path: Path) -> None:
    def of(name: str, content: str, **more: Any) -> str:
        return open_corpus(custom(written(tmp_path / name, content), **more)).fingerprint()

    here = of("here.txt", "some text")
    assert of("deep/er/there.txt", "some text") == here
    assert of("here.txt", "some texts") != here
    assert of("a.csv", "some text") != here  # the same bytes, read otherwise
    written(tmp_path / "val.txt", "v")
    assert of("here.txt", "some text", val_file=str(tmp_path / "val.txt")) != here


def test_the_embedded_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SyntheticData(name="synthetic", max_documents=5)
    corpus = open_corpus(config)
    found = [document for _, document in split_documents(corpus, config)]
    assert len({document.text for document in found}) == 5
    assert all(document.nats is not None and document.nats > 0 for document in found)
    again = SyntheticData(name="synthetic", max_documents=9)
    assert open_corpus(again).fingerprint() == corpus.fingerprint()
    other = SyntheticData(name="synthetic", max_documents=5, corpus_seed=1)
    assert open_corpus(other).fingerprint() != corpus.fingerprint()
    with pytest.raises(ConfigError, match=r"data\.max_tokens=null: the embedded"):
        open_corpus(SyntheticData(name="synthetic"))


# --- the layout of the Hugging Face hub


def parquet(path: Path, texts: list[Any]) -> None:
    write_rows(path, [{"text": text} for text in texts])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``owner/name`` laid out like a repository of the hub, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "owner" / "name"
    stories = [f"story {n}" for n in range(60)]
    parquet(folder / "data" / "train-00000-of-00002.parquet", stories[:30])
    parquet(folder / "data" / "train-00001-of-00002.parquet", [*stories[30:], None, "held out"])
    parquet(folder / "data" / "validation-00000-of-00001.parquet", ["held out", "too"])
    return folder


def hub_data(**more: Any) -> HubData:
    return HubData(**{"name": "hub", "repo": "owner/name", "separator": "none", **more})


def test_a_folder_laid_out_like_the_hub(hub: Path) -> None:
    config = hub_data()
    corpus = open_corpus(config)
    assert corpus.own == {"val"}
    found = Counter(split for split, _ in split_documents(corpus, config))
    assert found["val"] == 2
    assert found["duplicate"] == 1
    assert found["train"] + found["test"] == 61
    assert texts(config)[:31] == [f"story {n}" for n in range(31)]
    assert texts(config, "val") == ["held out", "too"]
    assert describe(config) == "owner/name"


def test_which_of_the_hubs_splits(hub: Path) -> None:
    assert open_corpus(hub_data(val_split=None)).own == set()
    assert open_corpus(hub_data(val_split="validation")).own == {"val"}
    assert open_corpus(hub_data(split="validation")).own == set()
    assert texts(hub_data(split="validation")) == ["held out", "too"]
    parquet(hub / "data" / "test-00000-of-00001.parquet", ["exam"])
    assert open_corpus(hub_data()).own == {"val", "test"}
    assert open_corpus(hub_data(test_split=None)).own == {"val"}
    assert texts(hub_data(test_split="train"), "test")[0] == "story 0"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"split": "trian"}, "data.split=trian: no such split; there are train, validation"),
        ({"val_split": "dev"}, "data.val_split=dev: no such split; there are train, validation"),
        ({"val_split": None, "test_split": "t"}, "data.test_split=t: no such split; there are"),
        ({"text_column": "body"}, "data.text_column=body: data.repo=owner/name has no such column"),
        ({"config": "other"}, "data.repo=owner/name: "),
    ],
)
def test_what_the_hub_lacks(hub: Path, more: dict[str, Any], line: str) -> None:
    assert refused(hub_data(**more)).startswith(line)


def test_the_hubs_fingerprint(hub: Path, tmp_path: Path) -> None:
    first = open_corpus(hub_data()).fingerprint()
    assert open_corpus(hub_data(repo=str(hub))).fingerprint() == first
    assert open_corpus(hub_data(val_split=None)).fingerprint() != first
    parquet(hub / "data" / "validation-00000-of-00001.parquet", ["held out", "also"])
    assert open_corpus(hub_data()).fingerprint() != first


def test_a_separator_cuts_the_rows_of_the_hub(hub: Path) -> None:
    rows = ["one", "still one", "", f"two{END_OF_TEXT}three"]
    parquet(hub / "data" / "validation-00000-of-00001.parquet", rows)
    found = texts(hub_data(split="validation", separator=END_OF_TEXT))
    assert found == ["one\nstill one\n\ntwo", "three"]


# --- the corpora that have a name here

STANDARD = {"val": "validation", "test": "test"}


def shipped(choice: str, *more: str) -> HubData:
    config = compose_config([f"data={choice}", *more]).data
    assert isinstance(config, HubData)
    return config


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("choice", LAYOUTS)
def test_a_shipped_corpus_is_read_as_it_lies_on_the_hub(
    choice: str, offline: Path, cache: Path
) -> None:
    layout = LAYOUTS[choice]
    rows = {
        split: [f"{choice}: {split} document {n}" for n in range(300 if split == "train" else 20)]
        for split in layout.files
    }
    held_out = [split for split in rows if split != "train"]
    for split in held_out:
        rows["train"][7] = rows[split][3]  # left out of training, and counted
    lay_out(offline, layout, rows)
    config = shipped(choice)
    corpus = open_corpus(config)
    assert describe(config) == choice
    assert corpus.own == {split for split, name in STANDARD.items() if name in layout.files}
    assert texts(config) == rows["train"]
    for split in corpus.own:
        assert texts(config, split) == rows[STANDARD[split]]
    found: dict[str, list[str]] = {"train": [], "val": [], "test": [], "duplicate": []}
    for split, document in split_documents(corpus, config):
        found[split].append(document.text)
    for split in found:
        if split in corpus.own:
            assert found[split] == rows[STANDARD[split]]
        elif split in ("val", "test"):  # a twentieth of the training documents
            assert 5 <= len(found[split]) <= 30
            assert set(found[split]) <= set(rows["train"])
    assert len(found["duplicate"]) == len(held_out)
    index = prepare(corpus, config, ByteTokenizer(), cache).index
    sizes = {split: info["documents"] for split, info in index["splits"].items()}
    assert sizes == {split: len(found[split]) for split in ("train", "val", "test")}
    assert index["duplicates_of_validation_or_test"] == len(held_out)


@pytest.mark.parametrize("choice", LAYOUTS)
def test_the_text_column_of_a_shipped_corpus_is_recorded(choice: str) -> None:
    """In the run's config.yaml; ``auto`` only where the source's own columns are not known."""
    layout = LAYOUTS[choice]
    config = shipped(choice)
    assert config.repo == layout.repo
    assert config.text_column == ("auto" if choice == "transweb_edu" else layout.column)


def test_no_more_of_a_large_corpus_is_read_than_is_asked_for(offline: Path, cache: Path) -> None:
    layout = LAYOUTS["openwebtext"]
    rows = [f"page {n} " * 900 for n in range(600)]  # 5 MB, and about one is tokenized at a time
    repo = lay_out(offline, layout, {"train": rows})
    config = shipped("openwebtext", "data.max_tokens=20_000")
    corpus = open_corpus(config)
    (repo / layout.files["train"][2]).write_bytes(b"nobody looks here")
    index = prepare(corpus, config, ByteTokenizer(), cache).index
    assert index["splits"]["train"]["documents"] == 4
    with pytest.raises(ConfigError, match=r"data\.repo=vietgpt/openwebtext_en: "):
        texts(config)


def test_a_configuration_is_the_sub_folder_of_its_name(offline: Path) -> None:
    """As the hub's parquet branch has it, which has no README.md; others beside it are not read."""
    repo = offline / "HuggingFaceFW" / "fineweb-edu"
    write_rows(repo / "sample-10BT" / "train" / "0000.parquet", [{"text": "one"}, {"text": "two"}])
    write_rows(repo / "sample-100BT" / "train" / "0000.parquet", [{"text": "another"}])
    assert texts(shipped("fineweb_edu")) == ["one", "two"]
    assert refused(shipped("fineweb_edu", "data.config=sample-1T")).startswith(
        f"data.repo={repo.relative_to(offline)}: "
    )


# --- real text


def test_real_books(real_data: Path) -> None:
    config = custom(real_data / "books")
    found = Counter[str]()
    for split, document in split_documents(open_corpus(config), config):
        found[split] += 1
        assert 0 < len(document.text) <= 2 * SECTION
    assert found["train"] > 1000
    assert found["val"] / found.total() == pytest.approx(0.05, abs=0.02)
