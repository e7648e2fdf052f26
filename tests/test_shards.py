"""Token shards: what is on disk is the corpus, once, in order; the cache is never wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    ConfigError,
    CustomData,
    DataConfig,
    SyntheticData,
    TokenizerConfig,
)
from tinygpt.data import tokenizers, writing
from tinygpt.data.corpora import Document, SyntheticCorpus
from tinygpt.data.library import Ids
from tinygpt.data.shards import Prepared, cache_root, load_index, prepare

EOT = 257  # of the byte tokenizer


class Texts:
    """A corpus in memory that counts what is read from it; validation and test are its own."""

    def __init__(self, train: Any, **own: list[str]) -> None:
        self.texts = {"train": train, **own}
        self.own = set(own)
        self.reads = 0

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(sorted(self.texts.items())).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[Document]:
        for text in self.texts[split]:
            self.reads += 1
            yield Document(text)

    def position(self) -> None:
        return None


class Endless(Texts):
    """Documents without end, numbered."""

    def __init__(self) -> None:
        super().__init__((), val=["the validation"], test=["the test"])

    def documents(self, split: str) -> Iterator[Document]:
        if split != "train":
            yield from super().documents(split)
            return
        for number in itertools.count():
            self.reads += 1
            yield Document(f"document {number}")


@contextlib.contextmanager
def limited(**limits: Any) -> Iterator[Path]:
    """A folder to write into, with other limits than those of ``writing``."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(writing, **limits):
        yield Path(folder)


def stories(count: int, start: int = 0) -> list[str]:
    return [f"Story {n}: {'la' * (n % 17)} and {n * n} birds." for n in range(start, start + count)]


def config(**values: Any) -> CustomData:
    return CustomData(name="texts", path="-", **values)


def whole(folder: Path, corpus: Any, data: DataConfig | None = None) -> Prepared:
    return prepare(corpus, data or config(), ByteTokenizer(), folder)


def shard_tokens(prepared: Prepared, name: str) -> list[list[int]]:
    """The raw content of the files, read without any of the code under test."""
    entries = prepared.index["splits"][name]["files"]
    dtype = prepared.index["dtype"]
    return [np.fromfile(prepared.folder / e["file"], dtype=dtype).tolist() for e in entries]


def documents_of(prepared: Prepared, name: str) -> list[str]:
    """The texts of a split, cut from its shards at the ends of text."""
    eot, texts = prepared.tokenizer.eot_id, []
    for tokens in shard_tokens(prepared, name):
        assert tokens[0] == eot
        assert tokens[-1] == eot
        ends = [place for place, token in enumerate(tokens) if token == eot]
        for start, end in itertools.pairwise(ends):
            texts.append(prepared.tokenizer.decode(tokens[start + 1 : end]))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is on disk


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30),
    shard=st.integers(1, 200),
    batch=st.integers(1, 100),
)
def test_documents_come_back_in_order_and_are_counted(
    texts: list[str], shard: int, batch: int
) -> None:
    corpus = Texts([*texts, "last"], val=["validation"], test=["test", "one more"])
    kept = [t for t in corpus.texts["train"] if t and t not in ("validation", "test", "one more")]
    with limited(SHARD_TOKENS=shard, BATCH_CHARACTERS=batch) as folder:
        made = whole(folder, corpus)
        assert documents_of(made, "train") == kept
        assert documents_of(made, "val") == ["validation"]
        assert documents_of(made, "test") == ["test", "one more"]
        info, files = made.index["splits"]["train"], shard_tokens(made, "train")
        offsets = made.split("train").offsets
    lengths = [len(t.encode()) + 1 for t in kept]
    assert info["documents"] == len(kept)
    assert info["tokens"] == sum(lengths) == sum(len(f) - 1 for f in files)
    assert info["bytes"] == sum(len(t.encode()) for t in kept)
    assert info["characters"] == sum(len(t) for t in kept)
    assert info["longest_document"] == max(lengths)
    assert info["empty_documents"] == texts.count("")
    assert info["left_out_documents"] == info["unknown_tokens"] == 0
    assert info["irreducible_loss_exact"] is None
    duplicates = len(corpus.texts["train"]) - len(kept) - texts.count("")
    assert made.index["duplicates_of_validation_or_test"] == duplicates
    # no shard is closed before it is full, and the offsets are where documents end
    assert all(len(tokens) > shard for tokens in files[:-1])
    assert np.concatenate([np.diff(o) for o in offsets]).tolist() == lengths
    assert [int(o[-1]) for o in offsets] == [len(f) - 1 for f in files]


def test_val_is_test_is_the_same_tokens_and_no_document_is_lost(tmp_path: Path) -> None:
    texts = stories(200)
    made = whole(tmp_path, Texts(texts), config(val_fraction=0.2, val_is_test=True))
    assert documents_of(made, "test") == documents_of(made, "val") != []
    assert sorted(documents_of(made, "train") + documents_of(made, "val")) == sorted(texts)
    assert made.split("test").offsets[0].tolist() == made.split("val").offsets[0].tolist()


def test_eval_tokens_takes_whole_documents_and_counts_the_rest(tmp_path: Path) -> None:
    val = stories(50, start=1000)
    corpus = Texts(stories(20), val=val, test=["test"])
    with mock.patch.object(writing, "BATCH_CHARACTERS", 100):
        made = whole(tmp_path, corpus, config(eval_tokens=200))
    info = made.index["splits"]["val"]
    kept = documents_of(made, "val")
    assert kept == val[: len(kept)]
    assert info["tokens"] >= 200 > info["tokens"] - len(kept[-1].encode()) - 1
    assert info["left_out_documents"] == len(val) - len(kept) > 0


def test_characters_seen_only_in_validation_are_unknown_and_counted(tmp_path: Path) -> None:
    corpus = Texts(stories(20), val=["Story ñ: ½ ½."], test=["Story"])
    made = prepare(corpus, config(), CharTokenizer(), tmp_path)
    assert made.index["splits"]["val"]["unknown_tokens"] == 3
    assert made.index["splits"]["train"]["unknown_tokens"] == 0
    assert made.tokenizer.vocab_size == 3 + len(set("".join(stories(20))))


@pytest.mark.parametrize(("letters", "dtype"), [(2**16 - 3, "uint16"), (2**16 - 2, "uint32")])
def test_ids_are_as_wide_as_they_must_be(tmp_path: Path, letters: int, dtype: str) -> None:
    alphabet = "".join(chr(n) for n in range(0x10000, 0x10000 + letters))
    text = alphabet[::-1]
    made = prepare(Texts([text], val=["v"], test=["t"]), config(), CharTokenizer(), tmp_path)
    assert made.tokenizer.vocab_size == letters + 3
    assert made.index["dtype"] == dtype
    assert documents_of(made, "train") == [text]
    assert made.split("train").gather(np.array([0]), 2).tolist() == [[2, letters + 2]]


def test_the_floor_is_the_mean_of_the_documents_information(tmp_path: Path) -> None:
    data = SyntheticData(name="synthetic", max_documents=200, val_fraction=0.2, test_fraction=0.2)
    corpus = SyntheticCorpus(data)
    made = whole(tmp_path, corpus, data)
    nats = {d.text: d.nats for d in itertools.islice(corpus.documents("train"), 200)}
    for name in ("train", "val", "test"):
        texts, info = documents_of(made, name), made.index["splits"][name]
        known = [nats[text] for text in texts]
        total = sum(n for n in known if n is not None)
        assert None not in known
        assert info["irreducible_loss_exact"] == pytest.approx(total / info["tokens"], rel=1e-12)


# Windows


@settings(max_examples=40)
@given(
    count=st.integers(1, 25),
    shard=st.integers(20, 400),
    length=st.integers(1, 40),
    part=st.integers(1, 40),
    fraction=st.floats(0.01, 1.0),
)
def test_training_windows_are_those_of_a_direct_cut(
    count: int, shard: int, length: int, part: int, fraction: float
) -> None:
    stride = min(part, length)
    corpus = Texts(stories(count), val=["validation"], test=["test"])
    with limited(SHARD_TOKENS=shard, BATCH_CHARACTERS=1) as folder:
        made = whole(folder, corpus)
        split = made.split("train")
        windows = split.train_windows(length, stride, fraction)
        found = split.gather(windows.starts, length + 1).tolist()
        files = shard_tokens(made, "train")
    left = max(1, round(fraction * count))
    expected, used, dropped = [], 0, 0
    for tokens in files:
        ends = [place for place, token in enumerate(tokens) if token == EOT]
        taken = min(left, len(ends) - 1)
        left -= taken
        tokens = tokens[: ends[taken] + 1]  # the first end of text is context alone
        targets: set[int] = set()
        for start in range(0, len(tokens) - length, stride):
            expected.append(tokens[start : start + length + 1])
            targets |= set(range(start + 1, start + length + 1))
        used += len(targets)
        dropped += len(tokens) - 1 - len(targets)
    assert found == expected
    assert (windows.used_tokens, windows.dropped_tokens) == (used, dropped)


@settings(max_examples=40)
@given(
    count=st.integers(1, 25),
    shard=st.integers(20, 400),
    length=st.integers(1, 120),
    packed=st.booleans(),
)
def test_evaluation_windows_hold_every_target_once(
    count: int, shard: int, length: int, packed: bool
) -> None:
    corpus = Texts(["t"], val=stories(count), test=["test"])
    with limited(SHARD_TOKENS=shard, BATCH_CHARACTERS=1) as folder:
        made = whole(folder, corpus)
        split, files = made.split("val"), shard_tokens(made, "val")
        longest = made.index["splits"]["val"]["longest_document"]
        length = max(length, longest) if packed else length
        windows = split.eval_windows(length, packed)
        found = [
            split.gather(np.array([start]), int(n) + 1)[0].tolist()
            for start, n in zip(windows.starts, windows.lengths, strict=True)
        ]
    assert all(1 < len(tokens) <= length + 1 for tokens in found)
    assert [t for tokens in found for t in tokens[1:]] == [t for f in files for t in f[1:]]
    if packed:
        assert all(tokens[0] == tokens[-1] == EOT for tokens in found)
        # one more document would not have fitted, unless the shard was over
        closed = {sum(len(f) for f in files[: n + 1]) for n in range(len(files))}
        ends = [int(s) + len(t) for s, t in zip(windows.starts, found, strict=True)]
        for tokens, after, end in zip(found, found[1:], ends, strict=False):
            assert end in closed or len(tokens) - 1 + after[1:].index(EOT) + 1 > length


# How much is read


@settings(max_examples=20)
@given(limits=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_max_tokens_stops_an_endless_source_and_nests(limits: tuple[int, int]) -> None:
    small, large = sorted(limits)
    made: list[Prepared] = []
    raw: list[list[int]] = []
    with limited(BATCH_CHARACTERS=50, _cpus=lambda: 2) as folder:
        for limit in (small, large):
            corpus = Endless()
            made.append(whole(folder, corpus, config(max_tokens=limit)))
            raw.append(shard_tokens(made[-1], "train")[0])
            info = made[-1].index["splits"]["train"]
            last = len(documents_of(made[-1], "train")[-1]) + 1
            assert info["tokens"] >= limit > info["tokens"] - last
            # beyond what is kept one batch of text at the most, the two others, and what is read
            # ahead: two documents a part here, and a part for each thread, the next and the last
            assert corpus.reads <= info["documents"] + 50 // len("document 0") + 1 + 2 + 4 * 2
    assert raw[1][: len(raw[0])] == raw[0]


def test_the_evaluation_set_of_fewer_training_tokens_begins_that_of_more(tmp_path: Path) -> None:
    with mock.patch.object(writing, "BATCH_CHARACTERS", 50):
        made = [
            whole(tmp_path, Texts(stories(600)), config(max_tokens=limit, eval_tokens=500))
            for limit in (6000, 14000, 18000)
        ]
    for name in ("val", "test"):
        few, more, most = (shard_tokens(one, name)[0] for one in made)
        assert most[: len(more)] == more
        assert more[: len(few)] == few
        assert more == most  # once eval_tokens are there, the set is fixed


@settings(max_examples=20)
@given(
    cpus=st.integers(2, 20),
    batch=st.integers(1, 3000),
    max_tokens=st.none() | st.integers(1, 4000),
    eval_tokens=st.integers(1, 1000),
)
def test_any_number_of_threads_writes_the_same_bytes(
    cpus: int, batch: int, max_tokens: int | None, eval_tokens: int
) -> None:
    val = stories(20, start=1000)
    corpus = Texts(["", *stories(150), *val[:3], ""] * 2, val=val, test=["t"])
    data = config(max_tokens=max_tokens, eval_tokens=eval_tokens)
    found = []
    for count in (1, cpus):
        with limited(BATCH_CHARACTERS=batch, _cpus=mock.Mock(return_value=count)) as folder:
            made = prepare(corpus, data, BpeTokenizer(vocab_size=270), folder)
            found.append(contents(made.folder))
    assert found[0] == found[1]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(), BpeTokenizer()])
def test_max_documents_reads_that_many(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    corpus = Endless()
    made = prepare(corpus, config(max_documents=30), tokenizer, tmp_path)
    assert documents_of(made, "train") == [f"document {n}" for n in range(30)]
    passes = 1 if isinstance(tokenizer, ByteTokenizer) else 2  # the tokenizer has its own
    assert corpus.reads == passes * (30 + 2)


@pytest.mark.parametrize("kind", [CharTokenizer, BpeTokenizer])
def test_a_tokenizer_learns_from_train_bytes_of_training_text(
    tmp_path: Path, kind: type[CharTokenizer | BpeTokenizer]
) -> None:
    """An endless source ends, and nothing that comes later changes the vocabulary."""
    corpus = Endless()
    with mock.patch.object(writing, "BATCH_CHARACTERS", 50):
        first = prepare(corpus, config(max_tokens=50), kind(train_bytes=300), tmp_path)
        assert corpus.reads < 60  # 300 bytes of ten or so a document, then 50 tokens
        more = prepare(Endless(), config(max_tokens=500), kind(train_bytes=300), tmp_path)
    assert first.tokenizer.fingerprint() == more.tokenizer.fingerprint()
    assert first.folder != more.folder


def test_the_tokenizer_sees_the_training_split_before_any_prefix(tmp_path: Path) -> None:
    texts = [*stories(50), "a rare § at the end"]
    corpus = Texts(texts, val=["validation ½"], test=["test ¾"])
    limited = prepare(corpus, config(max_tokens=100), CharTokenizer(), tmp_path)
    fraction = prepare(corpus, config(fraction=0.1), CharTokenizer(), tmp_path)
    assert limited.tokenizer.fingerprint() == fraction.tokenizer.fingerprint()
    assert limited.tokenizer.vocab_size == 3 + len(set("".join(texts)))


# The cache


def test_only_what_changes_shards_changes_the_key(tmp_path: Path) -> None:
    def folder(texts: list[str], **values: Any) -> Path:
        return whole(tmp_path, Texts(texts), config(**values)).folder

    texts = stories(300)
    base = folder(texts)
    for change in ({"fraction": 0.5}, {"stride": 3}):
        assert folder(texts, **change) == base
    changes: list[dict[str, Any]] = [
        *({"max_tokens": 300}, {"max_documents": 250}, {"eval_tokens": 50}, {"val_fraction": 0.2}),
        *({"test_fraction": 0.2}, {"val_is_test": True}, {"separator": "none"}),
        {"text_column": "story"},
    ]
    others = {folder(texts, **change) for change in changes} | {folder([*texts, "one more"])}
    for tokenizer in (
        CharTokenizer(),
        BpeTokenizer(vocab_size=270),
        BpeTokenizer(vocab_size=280),
        BpeTokenizer(vocab_size=270, train_bytes=100),
    ):
        others.add(prepare(Texts(texts), config(), tokenizer, tmp_path).folder)
    assert len(others | {base}) == 1 + len(changes) + 1 + 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corpus_seed", 1),
        ("n_facts", 16385),
        ("zipf_exponent", 1.2000001),
        ("noise_rate", 0.0500001),
    ],
)
def test_every_key_of_the_synthetic_corpus_is_in_the_fingerprint(key: str, value: Any) -> None:
    """Also one that happens to leave the first stories as they are: it changes the floor."""
    data = SyntheticData(name="synthetic", max_documents=10)
    changed = dataclasses.replace(data, **{key: value})
    assert SyntheticCorpus(data).fingerprint() != SyntheticCorpus(changed).fingerprint()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a shorter shard": ("train_00000.bin", lambda path: os.truncate(path, path.stat().st_size - 2)),
    "another bit in a shard": ("val_00000.bin", flip),
    "no shard": ("test_00000.bin", Path.unlink),
    "no index": ("index.json", Path.unlink),
    "no JSON": ("index.json", lambda path: os.truncate(path, 20)),
    "no index of ours": ("index.json", lambda path: path.write_text('{"a": 1}')),
    "no offsets": ("train.offsets.npy", Path.unlink),
    "another bit in the offsets": ("val.offsets.npy", flip),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_prepared_anew(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    corpus = Texts(stories(300))
    folder = whole(tmp_path, corpus).folder
    good = contents(folder)
    corpus.reads = 0
    assert whole(tmp_path, corpus).folder == folder
    assert corpus.reads == 0  # from the cache
    damage(folder / name)
    assert contents(folder) != good
    whole(tmp_path, corpus)
    assert corpus.reads == 300
    assert contents(folder) == good
    assert load_index(folder) is not None


def test_a_damaged_tokenizer_is_trained_anew(tmp_path: Path) -> None:
    corpus = Texts(stories(300))
    first = prepare(corpus, config(), BpeTokenizer(vocab_size=270), tmp_path)
    (path,) = (tmp_path / "tokenizers").glob("*.json")
    good = path.read_text()
    path.write_text(good[:100])
    again = prepare(corpus, config(), BpeTokenizer(vocab_size=270), tmp_path)
    assert path.read_text() == good
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()


class Failing(Texts):
    """Fails behind its training documents."""

    def documents(self, split: str) -> Iterator[Document]:
        yield from super().documents(split)
        if split == "train":
            raise OSError("the disk is gone")


@pytest.mark.parametrize("cpus", [1, 7])
def test_whether_a_source_fails_behind_what_is_wanted_does_not_matter(
    tmp_path: Path, cpus: int
) -> None:
    """As if nothing were read ahead; and a failure leaves nothing that is used."""
    corpus = Failing(stories(40), val=["validation"], test=["test"])
    enough = sum(len(text) + 1 for text in stories(38))
    with mock.patch.multiple(writing, BATCH_CHARACTERS=10, _cpus=lambda: cpus):
        with pytest.raises(OSError, match="the disk is gone"):
            whole(tmp_path, corpus, config(max_tokens=2 * enough))
        assert [p for p in (tmp_path / "data").iterdir() if p.is_dir()] == []
        assert documents_of(whole(tmp_path, corpus, config(max_tokens=enough)), "train")


class Interrupted(Texts):
    """Is interrupted when it is read to ``at``."""

    def __init__(self, train: Any, at: int) -> None:
        super().__init__(train)
        self.at = at

    def documents(self, split: str) -> Iterator[Document]:
        for number, document in enumerate(super().documents(split)):
            if number == self.at:
                raise KeyboardInterrupt
            yield document


@settings(max_examples=10)
@given(
    ats=st.lists(st.integers(0, 299), max_size=3).map(sorted),
    shard=st.integers(1000, 4000),
    batch=st.integers(1, 2000),
    limit=st.none() | st.integers(50, 20_000),
)
def test_an_interrupted_preparation_goes_on_from_whole_shards(
    ats: list[int], shard: int, batch: int, limit: int | None
) -> None:
    """To the same bytes."""
    data = config(max_tokens=limit, eval_tokens=limit, val_fraction=0.2, test_fraction=0.2)
    texts = [*stories(290), "", *stories(5), *stories(4, start=800)]
    with limited(SHARD_TOKENS=shard, BATCH_CHARACTERS=batch, MOST_THREADS=1) as folder:
        clean = contents(whole(folder / "clean", Texts(texts), data).folder)
        for at in ats:
            with contextlib.suppress(KeyboardInterrupt):  # where the limit is reached before it
                whole(folder / "here", Interrupted(texts, at), data)
        made = whole(folder / "here", Texts(texts), data)
        assert contents(made.folder) == clean
        assert not list(folder.glob("here/data/.*"))


def test_what_stands_in_whole_shards_is_not_encoded_again(tmp_path: Path) -> None:
    encoded: list[str] = []
    encode = tokenizers.Bytes.encode_batch

    def counting(self: tokenizers.Bytes, texts: Sequence[str]) -> list[Ids]:
        encoded.extend(texts)
        return encode(self, texts)

    with (
        mock.patch.multiple(writing, SHARD_TOKENS=2000, BATCH_CHARACTERS=100),
        mock.patch.object(tokenizers.Bytes, "encode_batch", counting),
    ):
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path, Interrupted(stories(300), at=250))
        encoded.clear()
        whole(tmp_path, Texts(stories(300)))
        assert 50 <= len(encoded) <= 150
        assert stories(300)[-1] in encoded
        assert stories(300)[0] not in encoded


@pytest.mark.parametrize("damage", ["mark", "shorter", "gone"])
def test_a_damaged_mark_is_no_beginning(tmp_path: Path, damage: str) -> None:
    with mock.patch.multiple(writing, SHARD_TOKENS=2000, BATCH_CHARACTERS=100):
        clean = contents(whole(tmp_path / "clean", Texts(stories(300))).folder)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path, Interrupted(stories(300), at=250))
        (mark,) = tmp_path.glob("data/.*/progress.json")
        if damage == "mark":
            mark.write_text(mark.read_text().replace('"documents": ', '"documents": 1', 1))
        elif damage == "shorter":
            os.truncate(mark.with_name("train_00000.bin"), 100)
        else:
            mark.with_name("train_00000.bin").unlink()
        assert contents(whole(tmp_path, Texts(stories(300))).folder) == clean


# Errors


@pytest.mark.parametrize(
    ("corpus", "values", "words"),
    [
        (
            Texts(["one"], test=["t"]),
            {"val_fraction": 1e-9},
            "validation split is empty, .* data.val_file",
        ),
        (
            Texts(["one"], val=["v"]),
            {"test_fraction": 1e-9},
            "test split is empty, .* data.test_fraction=0",
        ),
        (Texts([], val=["v"], test=["t"]), {}, "the training split is empty"),
        (Texts([""], val=["v"], test=["t"]), {}, "only 2 documents"),
    ],
)
def test_an_empty_split_is_one_line_that_names_keys(
    tmp_path: Path, corpus: Texts, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        whole(tmp_path, corpus, config(**values))
    assert "\n" not in str(caught.value)
    assert "data.path=" in str(caught.value)
    assert [p for p in (tmp_path / "data").iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cache_dir="):
        whole(tmp_path / "file", Texts(stories(300)))


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TINYGPT_CACHE", raising=False)
    assert cache_root(None) == tmp_path / ".cache" / "tinygpt"
    monkeypatch.setenv("TINYGPT_CACHE", "~/elsewhere")
    assert cache_root(None) == tmp_path / "elsewhere"
    assert cache_root("here") == Path("here")
