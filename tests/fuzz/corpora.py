"""Text of the user's own, as every preparation of data begins: opened, read, split, encoded."""

from __future__ import annotations

from functools import partial

from tests.fuzz.harness import Harness, file_of
from tinygpt.config import CustomData
from tinygpt.data.corpora import open_corpus, split_documents

PACKED = ("gz", "bz2", "xz", "zst", "zip")


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
    Harness("corpus_json", "jsonl", partial(read, ".json")),
    Harness("corpus_tsv", "csv", partial(read, ".tsv")),
    *(Harness(f"corpus_{kind}", "bytes", partial(read, f".csv.{kind}")) for kind in PACKED),
    Harness("corpus_parquet", "bytes", partial(read, ".parquet")),
]
