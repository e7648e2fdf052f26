"""Text of the user's own, as every preparation of data begins: opened, read, split, encoded."""

from __future__ import annotations

from functools import partial

from tests.fuzz.harness import Harness, file_of
from tinygpt.config import CustomData
from tinygpt.data.corpora import open_corpus, split_documents


def read(suffix: str, data: bytes) -> None:
    config = CustomData(name="custom", path=str(file_of(f"text{suffix}", data)))
    corpus = open_corpus(config)
    corpus.fingerprint()
    for _, document in split_documents(corpus, config):
        document.text.encode()  # any tokenizer can


HARNESSES = [
    Harness("corpus_txt", "lines", partial(read, ".txt")),
    Harness("corpus_jsonl", "jsonl", partial(read, ".jsonl")),
    Harness("corpus_csv", "csv", partial(read, ".csv")),
    Harness("corpus_parquet", "bytes", partial(read, ".parquet")),
]
