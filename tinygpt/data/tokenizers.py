"""Tokenizers behind one small interface: ``bpe``, ``char``, ``byte`` and ``gpt2``.

Text is data: a literal ``<|endoftext|>`` in it is encoded as ordinary characters, never as the
special id; only code that asks for ``eot_id`` or ``bos_id`` gets one.  A lone surrogate is not
Unicode and cannot be written as UTF-8: ``bpe``, ``byte`` and ``gpt2`` read it as U+FFFD, ``char``
as unknown.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from tinygpt import config as schema
from tinygpt.config import ConfigError, TokenizerConfig, one_line
from tinygpt.data.network import gpt2_files, model_folder
from tinygpt.fileio import digest, parse_json, write_text

Ids = npt.NDArray[np.uint32]
Merge = tuple[str, str]

UNKNOWN, BOS, EOT = "<|unk|>", "<|bos|>", "<|endoftext|>"

# GPT-2's split of text into pieces that merges never cross, as `tokenizers`' ByteLevel has it,
# written so that long pieces do not backtrack.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Unicode's White_Space, which `\s` means above but not in Python.
_SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Training is quadratic in the length of a piece, so runs longer than this are cut (training only).
_LONGEST_RUN = 200
_LONG_RUNS = re.compile(rf"\S{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}")


class Tokenizer(ABC):
    """Text to ids and back.  Every id is below ``vocab_size``."""

    kind: str
    vocab_size: int
    bos_id: int
    eot_id: int
    unknown_id: int | None = None  # char only; the caller counts it in the ids
    # Where a Hugging Face folder puts a token of its own before a text: it, and those behind a
    # document that are no part of it and are not scored.  Else a document follows the end of
    # another, which is scored.
    document_start: int | None = None
    unscored: Sequence[int] = ()

    @property
    def start_id(self) -> int:
        """The token that a document, and so a prompt, begins behind."""
        return self.eot_id if self.document_start is None else self.document_start

    @property
    def separator(self) -> list[int]:
        """What stands between two documents."""
        return list(dict.fromkeys([self.eot_id, self.start_id]))

    @property
    def start_text(self) -> str | None:
        """The text of ``document_start``."""
        return None if self.document_start is None else self.decode([self.document_start])

    @property
    def convention(self) -> str | None:
        """What begins a document, in a line; None where that is the end of another, as in ours."""
        start = self.start_text
        return start and f"documents start with {start}, as the tokenizer's folder does it"

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token."""
        ids: list[int] = self._encode(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """One array a text; the fast way for a corpus, from several threads too."""
        return [self._encode(text) for text in texts]

    @abstractmethod
    def _encode(self, text: str) -> Ids: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special ids become their literal text, bytes that are not UTF-8
        U+FFFD.  Raises ConfigError for an id outside the vocabulary."""

    def is_settled(self, ids: Sequence[int], text: str) -> bool:
        """Whether ``text``, that of ``ids``, stays as it is whatever ids follow: it ends with a
        whole character."""
        return not text.endswith("\ufffd")

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """All that distinguishes this tokenizer, as JSON values."""

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal, the same wherever the tokenizer was saved or trained."""
        return digest(self._content())

    def _serialised(self) -> str:
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Writes the file that ``load_tokenizer`` reads; a reader sees the old one or the new."""
        write_text(Path(path), self._serialised())

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        for item in ids:
            number = int(item)
            if not 0 <= number < self.vocab_size:
                raise ConfigError(f"id {number}: must be from 0 to {self.vocab_size - 1}")
            yield number


class Char(Tokenizer):
    """One id a character of the training text; characters not in it are unknown."""

    kind = "char"
    unknown_id, bos_id, eot_id = 0, 1, 2

    def __init__(self, alphabet: str) -> None:
        """``alphabet``: distinct characters, sorted."""
        self.alphabet = alphabet
        self.symbols = [UNKNOWN, BOS, EOT, *alphabet]
        self.vocab_size = len(self.symbols)
        self._table = np.zeros(0x110000, dtype=np.uint32)
        self._table[_code_points(alphabet)] = np.arange(3, self.vocab_size, dtype=np.uint32)

    def _encode(self, text: str) -> Ids:
        return self._table[_code_points(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in self._checked(ids))

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 and two special tokens; nothing to train."""

    kind = "byte"
    vocab_size, bos_id, eot_id = 258, 256, 257

    def _encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id: BOS.encode(), self.eot_id: EOT.encode()}
        parts = (special.get(i) or bytes([i]) for i in self._checked(ids))
        return b"".join(parts).decode("utf-8", "replace")

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind}


class _Merging(Tokenizer):
    """Byte-level BPE given by its merges: the 256 bytes, then one token a merge, in that order.

    tiktoken encodes: it merges any two neighbours whose joined bytes are a token, lowest rank
    first.  That is what `tokenizers` does too wherever every token comes out of its own bytes,
    because then no text brings together two tokens that spell a third but are not its merge.
    Trained merges are always so; `load_tokenizer` checks those of a file.
    """

    def __init__(self, merges: Sequence[Merge], first_id: int, special: dict[str, int]) -> None:
        """Raises ValueError for merges that do not build on one another."""
        self.merges = [(left, right) for left, right in merges]
        tokens = [_byte_spelling(token) for token in merged_tokens(self.merges)]
        self.vocab_size = len(tokens) + len(special)
        self.bos_id, self.eot_id = special.get(BOS, special[EOT]), special[EOT]
        self._bytes = [token.encode() for token in special]
        self._bytes[first_id:first_id] = tokens
        self._ranks = {token: first_id + i for i, token in enumerate(tokens)}
        self._special, self._threads = special, threading.local()

    @property
    def _encoding(self) -> tiktoken.Encoding:
        """Each thread has its own: the second to use one gets the pattern by a way that costs a
        quarter more CPU."""
        if not hasattr(self._threads, "encoding"):
            # Without a special token tiktoken searches for the empty pattern, at half the speed.
            self._threads.encoding = tiktoken.Encoding(
                self.kind,
                pat_str=_PATTERN,
                mergeable_ranks=self._ranks,
                special_tokens=self._special,
            )
        made: tiktoken.Encoding = self._threads.encoding
        return made

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """In one call, in which tiktoken leaves the interpreter to other threads."""
        joined = EOT.join(texts)
        if joined.count(EOT) == len(texts) - 1:  # no text has it as ordinary characters
            with contextlib.suppress(ValueError):  # one at a time they can be mended
                ids = self._encoding.encode_to_numpy(
                    joined, allowed_special={EOT}, disallowed_special=()
                )
                ends = np.flatnonzero(ids == self.eot_id).tolist()
                cuts = itertools.pairwise([-1, *ends, len(ids)])
                return [ids[before + 1 : end] for before, end in cuts]
        return super().encode_batch(texts)

    def _encode(self, text: str) -> Ids:
        try:
            return self._encode_piece(text)
        except UnicodeEncodeError:
            return self._encode(_without_surrogates(text))
        except ValueError:  # the pattern backtracks over white space, up to a limit
            return np.concatenate([self._encode_piece(piece) for piece in _cut_at_spaces(text)])

    def _encode_piece(self, text: str) -> Ids:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        parts = [self._bytes[i] for i in self._checked(ids)]
        return b"".join(parts).decode("utf-8", "replace")

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind, "merges": [" ".join(merge) for merge in self.merges]}


class Bpe(_Merging):
    """Byte-level BPE of our own training.  Its file is a plain Hugging Face ``tokenizer.json``.

    `tokenizers` reading it gives the same ids once its ``encode_special_tokens`` is set, which
    the file cannot say: as read, it turns a literal special token into the special id.
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[Merge]) -> None:
        super().__init__(merges, first_id=2, special={BOS: 0, EOT: 1})

    def hugging_face(self) -> HuggingFaceTokenizer:
        """The same tokenizer as a `tokenizers` object."""
        names = [BOS, EOT, *merged_tokens(self.merges)]
        vocab = {token: i for i, token in enumerate(names)}
        made = byte_level(models.BPE(vocab=vocab, merges=self.merges))
        made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOT)])
        return made

    def _serialised(self) -> str:
        return self.hugging_face().to_str(pretty=True)


class Gpt2(_Merging):
    """GPT-2's vocabulary; the end of text also begins one."""

    kind = "gpt2"

    def __init__(self, merges: Sequence[Merge]) -> None:
        super().__init__(merges, first_id=0, special={EOT: 256 + len(merges)})


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer as ``config`` asks; ``bpe`` and ``char`` learn from all of ``texts``.

    The same texts give the same tokenizer.  ``bpe`` may end with fewer than ``vocab_size`` tokens
    on a short text.  Raises ConfigError for an empty text and where GPT-2's vocabulary is missing.
    """
    if isinstance(config, schema.BpeTokenizer):
        return _train_bpe(config.vocab_size, _not_empty(texts, config.kind))
    if isinstance(config, schema.CharTokenizer):
        characters: set[str] = set()
        for text in _not_empty(texts, config.kind):
            characters.update(text)
        return Char("".join(sorted(c for c in characters if not _SURROGATES.match(c))))
    if isinstance(config, schema.ByteTokenizer):
        return Bytes()
    if isinstance(config, schema.Gpt2Tokenizer):
        return _gpt2_by_tiktoken() if config.vocab_dir is None else _gpt2_from(config.vocab_dir)
    if isinstance(config, schema.SavedTokenizer):
        return open_tokenizer("tokenizer.path", config.path)
    raise ConfigError(f"tokenizer.kind={config.kind}: must be one of bpe, byte, char, gpt2, saved")


def open_tokenizer(key: str, place: str) -> Tokenizer:
    """The tokenizer of a file, a run folder, a Hugging Face folder or a model on the hub.

    Raises ConfigError, naming ``key``, where there is none.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return load_tokenizer(path)
    folder = model_folder(key, place)
    if not (folder / "config.json").exists():
        return load_tokenizer(folder / "tokenizer.json")
    from tinygpt.data.huggingface import read_tokenizer  # which builds on what is here

    return read_tokenizer(folder)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote to ``path``.  Raises ConfigError for any other file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a tokenizer file (not UTF-8)") from error
    try:
        return _from_content(text, parse_json(text))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path}: not a tokenizer file of tinygpt ({one_line(error)})") from error


def _from_content(text: str, content: Any) -> Tokenizer:
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    kind = content.get("kind")
    if kind is None:
        return _bpe_from_hugging_face(text, content)
    made: Tokenizer
    if kind == "char":
        made = Char(checked_alphabet(content["alphabet"]))
    elif kind == "byte":
        made = Bytes()
    elif kind == "gpt2":
        made = Gpt2([read_merge(line) for line in content["merges"]])
    elif kind == "hf":
        from tinygpt.data.huggingface import Foreign

        start, ends = content.get("start"), content.get("ends", False)
        made = Foreign(content["tokenizer"], content["eot"], content["bos"], start, ends)
    else:
        raise ValueError(f"kind {kind!r}")
    if made._content() != content:
        raise ValueError("unknown keys")
    return made


def checked_alphabet(alphabet: Any) -> str:
    if not isinstance(alphabet, str) or list(alphabet) != sorted(set(alphabet)):
        raise ValueError("its alphabet is not a sorted text")
    if _SURROGATES.search(alphabet):
        raise ValueError("its alphabet has surrogates")
    return alphabet


def _bpe_from_hugging_face(text: str, content: dict[str, Any]) -> Bpe:
    """Every setting must be as we write it, since tiktoken does the encoding."""
    merges = content["model"]["merges"]
    made = Bpe([read_merge(m) if isinstance(m, str) else (str(m[0]), str(m[1])) for m in merges])
    expected = made.hugging_face()
    if library_tokenizer(text).to_str() != expected.to_str():
        raise ValueError("a byte-level BPE with other settings than ours")
    if not made_of_themselves(expected, made.merges):
        raise ValueError("merges that contradict one another")
    return made


def library_tokenizer(text: str) -> HuggingFaceTokenizer:
    """The content of a tokenizer.json as a `tokenizers` object.  Raises ValueError."""
    content = parse_json(text)
    model = content["model"]
    vocab = model.get("vocab", ())
    largest = max(vocab.values(), default=0) if isinstance(vocab, dict) else 0
    if largest > 2 * len(vocab) + 1000:  # the library counts up to it
        raise ValueError(f"ids up to {largest} for {len(vocab)} tokens")
    if model.get("dropout"):
        raise ValueError(f"dropout={model['dropout']}: the same text must have the same ids")
    with library_errors():
        made = HuggingFaceTokenizer.from_str(text)
    growth = _growth([content.get("normalizer"), content.get("decoder")])
    if growth > 1000:  # or a short text would fill the memory
        raise ValueError(f"makes {growth} characters of one")
    return made


def _growth(steps: Any) -> int:
    """How many times as long a text may become by what is replaced, one step after another."""
    inner = steps.values() if isinstance(steps, dict) else steps if isinstance(steps, list) else ()
    own = steps.get("content") if isinstance(steps, dict) else None
    return math.prod(map(_growth, inner)) * max(1, len(own) if isinstance(own, str) else 1)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Makes whatever `tokenizers` raises a ConfigError; a panic of its Rust is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"this tokenizer fails: {one_line(error)}") from error


def made_of_themselves(library: HuggingFaceTokenizer, merges: Sequence[Merge]) -> bool:
    """Whether every token comes out of its own bytes: see _Merging."""
    return all(len(library.model.tokenize(token)) == 1 for token in merged_tokens(merges))


def read_merge(line: Any) -> Merge:
    if not isinstance(line, str) or line.count(" ") != 1:
        raise ValueError(f"the merge {line!r} is not two tokens")
    left, right = line.split(" ")
    return left, right


# Bytes as printable characters, GPT-2's way: those that print stand for themselves, the others for
# the characters from U+0100 on.  In this order they are the first 256 tokens.
_PRINTING = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHERS = [b for b in range(256) if b not in _PRINTING]
BYTE_OF = {chr(b): b for b in _PRINTING} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


def _byte_spelling(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


def merged_tokens(merges: Sequence[Merge]) -> list[str]:
    """The 256 bytes and what ``merges`` make of them.  Raises ValueError where they do not fit."""
    tokens = dict.fromkeys(BYTE_OF)
    for left, right in merges:
        if left not in tokens or right not in tokens or left + right in tokens:
            raise ValueError(f"the merge '{left} {right}' does not build on those before it")
        tokens[left + right] = None
    return list(tokens)


def byte_level(model: models.BPE) -> HuggingFaceTokenizer:
    made = HuggingFaceTokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Bpe:
    trained = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_learnable(texts), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return Bpe([(left, right) for left, right in merges])


def _learnable(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = _without_surrogates(text)
        start = 0
        if len(text) > _LONGEST_RUN:
            for run in _LONG_RUNS.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]


def _not_empty(texts: Iterable[str], kind: str) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ConfigError(f"tokenizer.kind={kind}: there is no training text to learn it from")


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _without_surrogates(text).encode()


def _cut_at_spaces(text: str) -> Iterator[str]:
    """Pieces with the same ids as the whole: the pattern ends a piece before the last white space
    of a run, and a run at the end of a piece does not backtrack."""
    start = 0
    for run in _SPACES.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def read_gpt2(encoder: bytes, vocab: bytes) -> Gpt2:
    """From the content of encoder.json and vocab.bpe.  Raises ValueError where they disagree."""
    lines = codecs.decode(vocab, "utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    made = Gpt2([read_merge(line.rstrip("\r")) for line in lines if line.strip()])
    expected = {token: i for i, token in enumerate([*merged_tokens(made.merges), EOT])}
    if parse_json(encoder.decode()) != expected:
        raise ValueError("encoder.json and vocab.bpe do not belong together")
    return made


def _gpt2_from(vocab_dir: str) -> Gpt2:
    folder = Path(vocab_dir).expanduser()
    wanted = f"tokenizer.vocab_dir={vocab_dir}: must be a folder with encoder.json and vocab.bpe"
    try:
        return read_gpt2(
            (folder / "encoder.json").read_bytes(), (folder / "vocab.bpe").read_bytes()
        )
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise ConfigError(f"{wanted} of GPT-2 ({missing}: {error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{wanted} of GPT-2 ({one_line(error)})") from error


def _gpt2_by_tiktoken() -> Gpt2:
    files = gpt2_files()
    return read_gpt2(files["encoder.json"], files["vocab.bpe"])
