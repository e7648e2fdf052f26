"""Train, save and load our own tokenizers: ``char``, ``byte``, ``bpe`` and ``gpt2``.

`tokenizers` decodes and exports all of them; each has a faster encoder with the same ids.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from tinygpt import config as schema
from tinygpt.config import ConfigError, TokenizerConfig, one_line
from tinygpt.data.library import Foreign, Ids, library_tokenizer
from tinygpt.data.library import Tokenizer as Tokenizer
from tinygpt.data.network import gpt2_files
from tinygpt.data.textfiles import unicode_only
from tinygpt.fileio import parse_json

Merge = tuple[str, str]

UNKNOWN, BOS, EOT = "<|unk|>", "<|bos|>", "<|endoftext|>"
# GPT-2's split of text into pieces that merges never cross, as in `tokenizers`' ByteLevel, but
# possessive, so that long pieces do not backtrack.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Training is quadratic in the length of a piece, so only there longer runs are cut.
_LONGEST_RUN = 200
_LONG_RUNS = re.compile(rf"\S{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}")

# GPT-2's spelling of bytes: printable ones as themselves, the others as characters from U+0100 on.
# In this order they are the first 256 tokens.
_PRINTING = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHERS = [b for b in range(256) if b not in _PRINTING]
BYTE_OF = {chr(b): b for b in _PRINTING} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


class Char(Tokenizer):
    """Encode each character of the training text as an id, all others as unknown."""

    kind = "char"
    unknown_id, bos_id, eot_id = 0, 1, 2

    def __init__(self, alphabet: Any) -> None:
        """Raise ValueError unless ``alphabet`` is a string of distinct characters, sorted."""
        if not isinstance(alphabet, str) or list(alphabet) != sorted(set(alphabet)):
            raise ValueError("its alphabet is not a sorted text")
        if unicode_only(alphabet) != alphabet:
            raise ValueError("its alphabet has surrogates")
        self.alphabet, self.vocab_size = alphabet, 3 + len(alphabet)
        self._table = np.zeros(0x110000, dtype=np.uint32)
        self._table[_code_points(alphabet)] = np.arange(3, self.vocab_size, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self._table[_code_points(text)] for text in texts]

    def to_hugging_face(self) -> Library:
        """Return a BPE without merges: each token is a character."""
        vocab = _numbered([UNKNOWN, BOS, EOT, *self.alphabet])
        made = Library(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
        made.decoder = decoders.Fuse()
        return _with_special(made, UNKNOWN, BOS, EOT)

    def content(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


class Bytes(Tokenizer):
    """Encode the bytes of UTF-8; two special tokens follow the 256."""

    kind = "byte"
    vocab_size, bos_id, eot_id = 258, 256, 257

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encoded = (unicode_only(text).encode() for text in texts)
        return [np.frombuffer(one, dtype=np.uint8).astype(np.uint32) for one in encoded]

    def to_hugging_face(self) -> Library:
        vocab = {**BYTE_OF, BOS: self.bos_id, EOT: self.eot_id}
        return _byte_level(models.BPE(vocab=vocab, merges=[]), BOS, EOT, use_regex=False)

    def content(self) -> dict[str, Any]:
        return {"kind": self.kind}


class Bpe(Tokenizer):
    """Encode by byte-level BPE: two special tokens, the 256 bytes, then one token per merge.

    Its file is a plain Hugging Face ``tokenizer.json``.  tiktoken encodes: it merges any two
    neighbours whose joined bytes are a token, lowest rank first.  `tokenizers` gives the same ids
    if every token is the encoding of its own bytes, which holds for trained merges;
    `load_tokenizer` checks it for those of a file.
    """

    kind = "bpe"
    special: tuple[str, ...] = (BOS, EOT)
    bos_id, eot_id = 0, 1

    def __init__(self, merges: Iterable[Merge]) -> None:
        """Raise ValueError for merges that do not build on one another."""
        self.merges = [(left, right) for left, right in merges]
        tokens = dict.fromkeys(BYTE_OF)
        for left, right in self.merges:
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f"the merge '{left} {right}' does not build on those before it")
            tokens[left + right] = None
        self.merged = list(tokens)  # the 256 bytes and what the merges make of them
        self.vocab_size = len(self.merged) + len(self.special)

    @property
    def names(self) -> list[str]:
        """Return the tokens in the order of their ids."""
        return [*self.special, *self.merged]

    @functools.cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        ids = _numbered(self.names)
        spelled = {token: bytes(BYTE_OF[letter] for letter in token) for token in self.merged}
        return tiktoken.Encoding(
            self.kind,
            pat_str=_PATTERN,
            mergeable_ranks={spelled[token]: ids[token] for token in self.merged},
            # with none, tiktoken searches for an empty pattern, at half the speed
            special_tokens={token: ids[token] for token in self.special},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode in one call, during which tiktoken releases the GIL; fall back to `tokenizers`."""
        joined = EOT.join(texts)
        if joined.count(EOT) == len(texts) - 1:  # no text contains it
            # tiktoken refuses surrogates, and white space on which the pattern backtracks too far
            with contextlib.suppress(ValueError):
                ids = self._tiktoken.encode_to_numpy(
                    joined, allowed_special={EOT}, disallowed_special=()
                )
                ends = np.flatnonzero(ids == self.eot_id).tolist()
                cuts = itertools.pairwise([-1, *ends, len(ids)])
                return [ids[before + 1 : end] for before, end in cuts]
        return super().encode_batch(texts)

    def to_hugging_face(self) -> Library:
        model = models.BPE(vocab=_numbered(self.names), merges=self.merges)
        return _byte_level(model, *self.special)

    def content(self) -> dict[str, Any]:
        return {"kind": self.kind, "merges": [" ".join(merge) for merge in self.merges]}

    def serialised(self) -> str:
        return self.to_hugging_face().to_str(pretty=True)


class Gpt2(Bpe):
    """Encode with GPT-2's vocabulary, whose only special token, <|endoftext|>, comes last."""

    kind = "gpt2"
    special = (EOT,)

    def __init__(self, merges: Iterable[Merge]) -> None:
        super().__init__(merges)
        self.bos_id = self.eot_id = len(self.merged)

    @property
    def names(self) -> list[str]:
        return [*self.merged, EOT]

    def serialised(self) -> str:
        return Tokenizer.serialised(self)


# --- made and read


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of ``config``; ``bpe`` and ``char`` are trained on ``texts``.

    The same texts give the same tokenizer.  On a short text ``bpe`` may have fewer than
    ``vocab_size`` tokens.  Raises ConfigError for an empty text or a missing GPT-2 vocabulary.
    """
    if isinstance(config, schema.BpeTokenizer):
        trained = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[BOS, EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(_learnable(_not_empty(texts, config.kind)), trainer)
        return Bpe(json.loads(trained.to_str())["model"]["merges"])
    if isinstance(config, schema.CharTokenizer):
        characters: set[str] = set()
        for text in _not_empty(texts, config.kind):
            characters.update(text)
        return Char("".join(sorted(c for c in characters if unicode_only(c) == c)))
    if isinstance(config, schema.Gpt2Tokenizer):
        return _gpt2(config.vocab_dir)
    assert isinstance(config, schema.ByteTokenizer)
    return Bytes()


def _not_empty(texts: Iterable[str], kind: str) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ConfigError(f"tokenizer.kind={kind}: there is no training text to learn it from")


def _learnable(texts: Iterable[str]) -> Iterator[str]:
    for text in map(unicode_only, texts):
        start = 0
        if len(text) > _LONGEST_RUN:
            for run in _LONG_RUNS.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]


def _gpt2(vocab_dir: str | None) -> Gpt2:
    if vocab_dir is None:
        files = gpt2_files()
        return read_gpt2(files["encoder.json"], files["vocab.bpe"])
    folder = Path(vocab_dir).expanduser()
    try:
        return read_gpt2(*((folder / name).read_bytes() for name in ("encoder.json", "vocab.bpe")))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        if isinstance(error, OSError):
            reason = f"{Path(str(error.filename)).name}: {error.strerror}"
        raise ConfigError(
            f"tokenizer.vocab_dir={vocab_dir}: must be a folder with encoder.json and vocab.bpe of "
            f"GPT-2 ({reason})"
        ) from error


def read_gpt2(encoder: bytes, vocab: bytes) -> Gpt2:
    """Read the content of encoder.json and vocab.bpe.  Raises ValueError if they disagree."""
    lines = vocab.decode().split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    made = Gpt2(read_merge(line.rstrip("\r")) for line in lines if line.strip())
    if parse_json(encoder.decode()) != _numbered(made.names):
        raise ValueError("encoder.json and vocab.bpe do not belong together")
    return made


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that ``save`` wrote.  Raises ConfigError for any other file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _from_content(text, parse_json(text))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path}: not a tokenizer file of tinygpt ({one_line(error)})") from error


def _from_content(text: str, content: dict[str, Any]) -> Tokenizer:
    made: Tokenizer
    match content.get("kind"):
        case None:  # a tokenizer.json
            bpe = Bpe(map(read_merge, content["model"]["merges"]))
            # all settings must be ours, since tiktoken does the encoding
            if library_tokenizer(text).to_str() != bpe.to_hugging_face().to_str():
                raise ValueError("a byte-level BPE with other settings than ours")
            if not spells_itself(bpe):
                raise ValueError("merges that contradict one another")
            return bpe
        case "char":
            made = Char(content["alphabet"])
        case "byte":
            made = Bytes()
        case "gpt2":
            made = Gpt2(map(read_merge, content["merges"]))
        case "hf":
            start, ends = content.get("start"), content.get("ends", False)
            made = Foreign(content["tokenizer"], content["eot"], content["bos"], start, ends)
        case kind:
            raise ValueError(f"kind {kind!r}")
    if made.content() != content:
        raise ValueError("unknown keys")
    return made


def read_merge(written: Any) -> Merge:
    """Read a merge written as ``left right`` or as a list of the two."""
    parts = written.split(" ") if isinstance(written, str) else written
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"the merge {written!r} is not two tokens")
    return parts[0], parts[1]


def spells_itself(tokenizer: Bpe) -> bool:
    """Return whether every token is the encoding of its own bytes."""
    model = tokenizer.library.model
    return all(len(model.tokenize(token)) == 1 for token in tokenizer.merged)


def _byte_level(model: models.BPE, *special: str, use_regex: bool = True) -> Library:
    made = Library(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    return _with_special(made, *special)


def _with_special(made: Library, *tokens: str) -> Library:
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return made


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
