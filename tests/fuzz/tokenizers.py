"""Tokenizers from files: our own, GPT-2's two, and what a Hugging Face folder holds."""

from __future__ import annotations

from tests.fuzz.harness import SEEDS, Harness, file_of, scratch
from tinygpt.config import Gpt2Tokenizer
from tinygpt.data import huggingface
from tinygpt.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXT = "Once upon a time, <|endoftext|> ñ 𝄞 \x00\n\n  12 ends."


def used(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert [len(one) for one in tokenizer.encode_batch([TEXT, ""])] == [len(ids), 0]
    tokenizer.decode([*ids, tokenizer.eot_id, tokenizer.bos_id])
    tokenizer.fingerprint()
    tokenizer.save(scratch() / "saved" / "tokenizer.json")
    assert load_tokenizer(scratch() / "saved" / "tokenizer.json").encode(TEXT) == ids


def own(data: bytes) -> None:
    used(load_tokenizer(file_of("own/tokenizer.json", data)))


def gpt2(data: bytes) -> None:
    """The merges vary, the vocabulary stays."""
    vocab = (SEEDS / "tokenizer_gpt2.json").read_bytes()
    folder = file_of("gpt2/encoder.json", vocab).parent
    file_of("gpt2/vocab.bpe", data)
    used(train_tokenizer(Gpt2Tokenizer(vocab_dir=str(folder)), ()))


def foreign(data: bytes) -> None:
    file_of("foreign/tokenizer_config.json", b'{"eos_token": "<|endoftext|>"}')
    used(huggingface.read_tokenizer(file_of("foreign/tokenizer.json", data).parent))


def settings(data: bytes) -> None:
    file_of("settings/tokenizer.json", (SEEDS / "tokenizer_foreign" / "wordlevel").read_bytes())
    used(huggingface.read_tokenizer(file_of("settings/tokenizer_config.json", data).parent))


HARNESSES = [
    Harness("tokenizer_own", "json", own),
    Harness("tokenizer_gpt2", "lines", gpt2),
    Harness("tokenizer_foreign", "json", foreign),
    Harness("tokenizer_settings", "json", settings),
]
