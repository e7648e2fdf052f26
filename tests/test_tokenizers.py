"""Tokenizers: lossless, deterministic, the same ids as `tokenizers`, and clear about bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import pre_tokenizers

from tinygpt.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    ConfigError,
    Gpt2Tokenizer,
    TokenizerConfig,
)
from tinygpt.data import network, tokenizers
from tinygpt.data.tokenizers import Bpe, Gpt2, Tokenizer, load_tokenizer, train_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
GPT2 = SHARED / "gpt2-bpe"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's vocabulary is not here")

TEXTS = [
    "Once upon a time, there was a little girl named Lily.\nShe didn't like the 3 big dogs! ",
    "  The   café — naïve 😀👩‍👩‍👧 日本語 12345\r\n\t\tend...  \n\n",
    "they're we've I'll he'd it's <|endoftext|> <|bos|> abababab",
] * 20

# Arbitrary Unicode, and texts of few letters, in which merges meet and overlap.
any_text = st.text(max_size=80)
crowded_text = st.text(alphabet="ab 'st\n1!é日😀\u0300", max_size=60)
words = st.lists(
    st.sampled_from(["the", " the", "'s", "\u2028", "\x00", "\x1c", "\x85", "  ", "\n", "😀", "ǅ"]),
    max_size=20,
).map("".join)
texts_of_all_kinds = any_text | crowded_text | words
corpora = st.lists(crowded_text | any_text, min_size=1, max_size=8).filter(any)


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    made = train_tokenizer(BpeTokenizer(vocab_size=400), TEXTS)
    assert isinstance(made, Bpe)
    return made


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return train_tokenizer(Gpt2Tokenizer(vocab_dir=str(GPT2)), ())


def every_kind() -> Iterator[Tokenizer]:
    for config in (BpeTokenizer(vocab_size=300), CharTokenizer(), ByteTokenizer()):
        yield train_tokenizer(config, TEXTS)


def reference(tokenizer: Bpe) -> HuggingFaceTokenizer:
    made = HuggingFaceTokenizer.from_str(tokenizer.serialised())
    made.encode_special_tokens = True
    return made


@settings(max_examples=300)
@given(texts_of_all_kinds)
def test_bpe_and_bytes_lose_nothing(bpe: Bpe, text: str) -> None:
    for tokenizer in (bpe, tokenizers.Bytes()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.bos_id, tokenizer.eot_id} & set(ids)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(corpora, st.sampled_from([258, 261, 270, 300, 600]), st.lists(texts_of_all_kinds))
def test_ids_are_identical_for_any_trained_merges(
    corpus: list[str], vocab_size: int, texts: list[str]
) -> None:
    tokenizer = train_tokenizer(BpeTokenizer(vocab_size=vocab_size), corpus)
    assert isinstance(tokenizer, Bpe)
    assert 258 <= tokenizer.vocab_size <= vocab_size
    library = reference(tokenizer)
    # joined, because merges differ most where learned pieces meet
    for text in [*texts, *corpus, "".join(corpus), "".join(reversed(corpus))]:
        assert tokenizer.encode(text) == library.encode(text).ids
    assert all(len(library.model.tokenize(token)) == 1 for token in tokenizer.merged)


@settings(max_examples=200)
@given(st.lists(texts_of_all_kinds | st.sampled_from(["<|endoftext|>", "<|endoftext|", "\ud800"])))
def test_a_batch_is_each_text_alone_on_any_thread(bpe: Bpe, texts: list[str]) -> None:
    for tokenizer in (bpe, tokenizers.Bytes()):
        expected = [tokenizer.encode(text) for text in texts]
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(tokenizer.encode_batch, [texts] * 3):
                assert [ids.tolist() for ids in found] == expected


@pytest.mark.parametrize("before", ["a", "1", "!", "\n"])
def test_both_libraries_agree_on_the_class_of_every_character(before: str) -> None:
    """Letter, number, space or other: their Unicode tables must be of one version."""
    chance = random.Random(before)
    chosen = [*range(0x80, 0x3000), *chance.sample(range(0xE000, 0x110000), 20_000)]
    # a piece that is a token comes out whole, so one id says that the pattern did not cut it
    ranks = {bytes([b]): b for b in range(256)}
    for c in chosen:
        ranks[(before + chr(c)).encode()] = len(ranks)
    encoding = tiktoken.Encoding(
        "pairs", pat_str=tokenizers._PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for c in chosen:
        text = before + chr(c)
        whole = len(library.pre_tokenize_str(text)) == 1
        assert (len(encoding.encode_ordinary(text)) == 1) == whole, hex(c)


@pytest.mark.parametrize("literal", ["<|endoftext|>", "<|bos|>", "<|unk|>"])
def test_a_literal_special_token_is_text(literal: str) -> None:
    for tokenizer in every_kind():
        ids = tokenizer.encode(f"end{literal}it")
        assert tokenizer.decode(ids) == f"end{literal}it"
        assert not {tokenizer.bos_id, tokenizer.eot_id} & set(ids)


def test_special_ids_decode_to_their_literal_text_and_nothing_to_nothing() -> None:
    for tokenizer in every_kind():
        ids = [tokenizer.bos_id, *tokenizer.encode("the"), tokenizer.eot_id]
        assert tokenizer.decode(np.array(ids)) == "<|bos|>the<|endoftext|>"
        assert tokenizer.encode("") == tokenizer.encode_batch([]) == []
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    for tokenizer in every_kind():
        with pytest.raises(ConfigError, match=f"id {wrong}: must be from 0 to"):
            tokenizer.decode([wrong])


def test_lone_surrogates_follow_the_stated_rule() -> None:
    bpe, char, byte = every_kind()
    for tokenizer in (bpe, byte):
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert char.encode("a\ud800")[1] == char.unknown_id
    for config in (BpeTokenizer(vocab_size=260), CharTokenizer()):
        trained = train_tokenizer(config, ["ab\ud800ab"])
        assert trained.decode(trained.encode("ab")) == "ab"


def test_char_has_the_training_alphabet_and_one_unknown_id() -> None:
    char = train_tokenizer(CharTokenizer(), ["ba", "cab\n"])
    assert (char.unknown_id, char.bos_id, char.eot_id, char.vocab_size) == (0, 1, 2, 7)
    assert char.encode("\nabc") == [3, 4, 5, 6]
    ids = char.encode("a日😀b")
    assert ids.count(0) == 2
    assert char.decode(ids) == "a<|unk|><|unk|>b"


@pytest.mark.parametrize("config", [BpeTokenizer(), CharTokenizer()])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_training_text_is_an_error(config: TokenizerConfig, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer.kind={config.kind}: .*no training text"):
        train_tokenizer(config, texts)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    for tokenizer in every_kind():
        path = tmp_path / f"{tokenizer.kind}.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        for text in TEXTS[:3]:
            assert loaded.encode(text) == tokenizer.encode(text)
        before = path.read_bytes()
        loaded.save(path)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bpe.json", "byte.json", "char.json"]


def test_training_is_deterministic(tmp_path: Path, bpe: Bpe) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tinygpt.config import BpeTokenizer\n"
        "from tinygpt.data.tokenizers import train_tokenizer\n"
        "texts = Path(sys.argv[1]).read_bytes().decode().split('\\0')\n"
        "train_tokenizer(BpeTokenizer(vocab_size=400), texts).save(Path(sys.argv[2]))\n"
    )
    (tmp_path / "corpus").write_bytes("\0".join(TEXTS).encode())
    bpe.save(tmp_path / "0.json")
    for i in (1, 2):
        arguments = [str(tmp_path / "corpus"), str(tmp_path / f"{i}.json")]
        environment = os.environ | {"PYTHONHASHSEED": str(i), "RAYON_NUM_THREADS": str(i)}
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)
    assert len({(tmp_path / f"{i}.json").read_bytes() for i in range(3)}) == 1


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"not json", b"[1, 2]", b"{}", b"\xff\xfe"),
        b'{"kind": "word"}',
        b'{"kind": "char"}',
        b'{"kind": "char", "alphabet": "ba"}',
        b'{"kind": "char", "alphabet": 3}',
        b'{"kind": "byte", "extra": 1}',
        b'{"kind": "gpt2", "merges": ["a b c"]}',
        b'{"kind": "gpt2", "merges": ["ab c"]}',
        b'{"model": {"type": "WordLevel", "vocab": {}}}',
        b'{"model": {"merges": []}}',
    ],
)
def test_a_foreign_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_bpe_file_is_refused(tmp_path: Path, bpe: Bpe) -> None:
    path = tmp_path / "tokenizer.json"
    good = json.loads(bpe.serialised())
    for section, key, value in [
        ("model", "merges", good["model"]["merges"][:-1]),
        ("model", "merges", good["model"]["merges"][::-1]),
        ("model", "vocab", dict(list(good["model"]["vocab"].items())[:-1])),
        ("model", "dropout", 0.5),
        ("pre_tokenizer", "add_prefix_space", True),
        ("pre_tokenizer", "use_regex", False),
    ]:
        path.write_text(json.dumps(good | {section: good[section] | {key: value}}))
        with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer file"):
            load_tokenizer(path)
    path.write_text(bpe.serialised()[:-200])
    with pytest.raises(ConfigError, match="not a tokenizer file"):
        load_tokenizer(path)


def test_merges_on_which_the_libraries_would_differ_are_refused(tmp_path: Path) -> None:
    """`abc` is never reached from its bytes by its own merge, since `bc` comes first."""
    path = tmp_path / "tokenizer.json"
    made = Bpe([("b", "c"), ("a", "b"), ("ab", "c")])
    made.save(path)
    assert made.encode("abcb") != reference(made).encode("abcb").ids
    with pytest.raises(ConfigError, match="contradict"):
        load_tokenizer(path)


LONG = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "a" * LONG,
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=LONG)),
        " " * LONG + "x",
        "x" + "\n" * LONG + " 1" + "\r\n" * LONG + "\u3000 !" + " " * LONG,
        "!" * LONG,
        "😀" * (LONG // 4),
    ],
    ids=["a", "letters", "spaces", "lines", "marks", "emoji"],
)
def test_a_megabyte_without_a_break(bpe: Bpe, text: str) -> None:
    begun = time.process_time()
    ids = bpe.encode(text)
    assert time.process_time() - begun < 5
    assert bpe.decode(ids) == text


@settings(max_examples=60)
@given(st.lists(st.sampled_from([" ", "\n", "\u3000", "\x1c", "a", "1", "'s", "!"]), max_size=30))
def test_long_white_space_has_the_ids_of_the_library(bpe: Bpe, parts: list[str]) -> None:
    """tiktoken's pattern backtracks over it, up to a limit behind which `tokenizers` encodes."""
    text = "".join(part * 1001 if part.isspace() else part for part in parts)
    assert bpe.encode(text) == reference(bpe).encode(text).ids


def test_training_on_a_long_run_is_not_quadratic() -> None:
    begun = time.perf_counter()
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=LONG // 4))
    made = train_tokenizer(BpeTokenizer(vocab_size=400), ["a" * LONG, " " * LONG, letters])
    assert time.perf_counter() - begun < 20
    assert made.vocab_size == 400


@needs_gpt2
def test_gpt2_is_tiktokens(
    gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GPT2 / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    library = tiktoken.get_encoding("gpt2")
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.bos_id) == (50257, 50256, 50256)
    for text in [*TEXTS[:3], "\x00\x1c \u2028 <|endoftext|>"]:
        assert gpt2.encode(text) == library.encode_ordinary(text)
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode([50256]) == "<|endoftext|>"

    monkeypatch.setattr(network, "reachable", pytest.fail)  # the cache must do
    cached = train_tokenizer(Gpt2Tokenizer(), ())
    assert cached.fingerprint() == gpt2.fingerprint()
    cached.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, Gpt2)
    assert loaded.fingerprint() == gpt2.fingerprint()
    assert loaded.encode(TEXTS[1]) == gpt2.encode(TEXTS[1])


@needs_gpt2
def test_gpt2_folder_with_damaged_files(tmp_path: Path) -> None:
    config = Gpt2Tokenizer(vocab_dir=str(tmp_path))
    wanted = r"tokenizer\.vocab_dir=.*encoder\.json and vocab\.bpe"
    encoder, merges = ((GPT2 / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    with pytest.raises(ConfigError, match=wanted):
        train_tokenizer(config, ())
    (tmp_path / "encoder.json").write_bytes(encoder)
    with pytest.raises(ConfigError, match=wanted + r".*vocab\.bpe: No such file"):
        train_tokenizer(config, ())
    damaged = (
        (encoder, bad) for bad in (merges[: len(merges) // 2], b"", b"\xff", b"<html></html>")
    )
    for first, second in (*damaged, (b"[", merges)):
        (tmp_path / "encoder.json").write_bytes(first)
        (tmp_path / "vocab.bpe").write_bytes(second)
        with pytest.raises(ConfigError, match=wanted):
            train_tokenizer(config, ())


def test_gpt2_without_network_fails_fast_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://192.0.2.1:9")  # an address that never answers
    damaged = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    damaged.write_bytes(b"damaged")
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=r"give tokenizer\.vocab_dir="):
        train_tokenizer(Gpt2Tokenizer(), ())
    assert time.perf_counter() - begun < 2.5
    assert damaged.exists()


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tinygpt.tokenizer", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command_trains_encodes_and_decodes(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.txt", tmp_path / "run" / "tokenizer.json"
    corpus.write_text("".join(TEXTS))
    done = command("train", f"path={corpus}", "kind=bpe", "vocab_size=300", f"out={out}")
    assert "bpe, 300 tokens" in done.stdout
    text = "Hello, world = {'a'}"
    ids = command("encode", f"tokenizer={out.parent}", f"text={text}").stdout.strip()
    assert command("decode", f"tokenizer={out}", f"ids={ids}").stdout == text + "\n"


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    for arguments in (
        ["tarin"],
        ["train", f"path={tmp_path / 'none.txt'}"],
        ["decode", f"tokenizer={tmp_path}", "ids=1"],
    ):
        done = command(*arguments, code=2)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
