"""Train a tokenizer, encode and decode: ``python -m tinygpt.tokenizer``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from tinygpt.cli import one_line_errors, read_arguments, read_text, show_help
from tinygpt.config import (
    BpeTokenizer,
    CharTokenizer,
    ConfigError,
    CustomData,
    TokenizerConfig,
    key,
)
from tinygpt.config.checks import check_text
from tinygpt.data.corpora import FileCorpus, first_bytes, split_documents
from tinygpt.data.huggingface import open_tokenizer
from tinygpt.data.tokenizers import train_tokenizer

USAGE = """\
usage: tinygpt tokenizer COMMAND key=value ...
  train   path=FILE|FOLDER|GLOB [kind=bpe|char] [vocab_size=1024] [train_bytes=50000000]
          [out=tokenizer.json] and any key of data=custom, such as separator= or text_column=
  encode  tokenizer=FILE_OR_RUN_FOLDER text="Once upon a time" | path=FILE
  decode  tokenizer=FILE_OR_RUN_FOLDER ids=1,2,3
train reads all of the text except what val_fraction=, test_fraction=, val_file= and test_file=
hold out.  encode prints the ids on one line, separated by commas, as decode expects them."""


@dataclass
class TrainArguments(CustomData):
    """Hold the keys of ``data=custom`` and those of the tokenizer."""

    name: str = "custom"
    val_fraction: float = key(0.0, least=0.0, below=1.0)
    test_fraction: float = key(0.0, least=0.0, below=1.0)
    kind: str = key("bpe", among=("bpe", "char"))
    vocab_size: int = key(1024, least=258)
    train_bytes: int = key(50_000_000, least=1)
    out: str = "tokenizer.json"


@dataclass
class EncodeArguments:
    tokenizer: str = MISSING
    text: Optional[str] = None
    path: Optional[str] = None


@dataclass
class DecodeArguments:
    tokenizer: str = MISSING
    ids: list[int] = field(default_factory=list)


def train(argv: Sequence[str]) -> None:
    words = [item.removeprefix("data.") for item in argv]  # messages name data.separator
    arguments = read_arguments(TrainArguments, words, USAGE)
    check_text(arguments)
    config: TokenizerConfig = CharTokenizer()
    if arguments.kind == "bpe":
        config = BpeTokenizer(vocab_size=arguments.vocab_size)
    corpus = FileCorpus(arguments)
    survey = corpus.survey

    def texts() -> Iterator[str]:
        for split, document in split_documents(corpus, arguments):
            survey.documents += bool(document.text)
            survey.empty_documents += not document.text
            if split == "train":
                yield document.text

    tokenizer = train_tokenizer(config, first_bytes(texts(), arguments.train_bytes))
    tokenizer.save(Path(arguments.out))
    print(*survey.lines(), sep="\n")
    print(f"{arguments.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    if isinstance(config, BpeTokenizer) and tokenizer.vocab_size < config.vocab_size:
        note = f"note: vocab_size={config.vocab_size}: the text is too short to learn so many"
        print(note, file=sys.stderr)


def encode(argv: Sequence[str]) -> None:
    arguments = read_arguments(EncodeArguments, argv, USAGE)
    if (arguments.text is None) == (arguments.path is None):
        raise ConfigError("text, path: exactly one of the two must be given")
    tokenizer = open_tokenizer("tokenizer", arguments.tokenizer)
    text = arguments.text or ""
    if arguments.path is not None:
        text = read_text("path", arguments.path, newline="")
    ids = tokenizer.encode(text)
    print(",".join(map(str, ids)))
    if tokenizer.unknown_id is not None and (unknown := ids.count(tokenizer.unknown_id)):
        print(f"note: {unknown} of {len(ids)} characters are unknown", file=sys.stderr)


def decode(argv: Sequence[str]) -> None:
    arguments = read_arguments(DecodeArguments, argv, USAGE)
    print(open_tokenizer("tokenizer", arguments.tokenizer).decode(arguments.ids))


@one_line_errors
def main() -> None:
    commands = {"train": train, "encode": encode, "decode": decode}
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        show_help(USAGE)
        return
    if name not in commands:
        raise ConfigError(f"{name}: must be one of {', '.join(commands)}; --help shows how")
    commands[name](rest)


if __name__ == "__main__":
    main()
