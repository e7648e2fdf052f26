"""What is measured without a Trainer: matrix products, attention, generation, tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, autograd
from torch.nn import functional as F

from tinygpt.config import BpeTokenizer, ByteTokenizer, CharTokenizer, Config, TokenizerConfig
from tinygpt.data import corpora
from tinygpt.data.tokenizers import Tokenizer, train_tokenizer
from tinygpt.measuring.turns import Clock, Lap
from tinygpt.model.generate import generate
from tinygpt.model.gpt import GPT, manual_attention, score_divisor
from tinygpt.training.calibration import AUTOCAST
from tinygpt.training.trainer import Device

Work = Callable[[int], Mapping[str, Lap]]
SIDE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # of the matrices, large enough for full speed
TEXT_BYTES = 1_000_000


def dtype_of(device: Device) -> torch.dtype:
    """What the matrix products of this precision are computed in."""
    return (
        torch.float64 if device.precision == "64" else AUTOCAST.get(device.precision, torch.float32)
    )


def matrix_product(device: Device, clock: Clock) -> Work:
    """FLOPs of a large product of square matrices: what this device can do at best."""
    if device.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # as the Trainer does
    side, dtype = SIDE[device.accelerator], dtype_of(device)
    a, b, out = (torch.randn(side, side, device=device.accelerator).to(dtype) for _ in range(3))

    def work(steps: int) -> dict[str, Lap]:
        clock.start()
        for _ in range(steps):
            torch.mm(a, b, out=out)
        return {"gemm": clock.lap(steps * 2 * side**3)}

    torch.mm(a, b, out=out)
    return work


def attention(config: Config, device: Device, clock: Clock) -> Work:
    """Forward and backward of causal attention alone at the model's shape, as many heads of keys
    and values as of queries, by torch's fused kernel and written out."""
    model = config.model
    batch = config.train.batch_tokens // model.max_seq_len
    shape = (batch, model.n_heads, model.max_seq_len, model.d_model // model.n_heads)
    q, k, v = (
        torch.randn(shape, device=device.accelerator, dtype=dtype_of(device), requires_grad=True)
        for _ in range(3)
    )
    gradient, divisor = torch.randn_like(q), score_divisor(model)

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / divisor)

    def written_out() -> Tensor:
        return manual_attention(q, k, v, 0.0, divisor)

    ways = {"sdpa": fused, "manual": written_out}

    def work(steps: int) -> dict[str, Lap]:
        laps = {}
        for name, way in ways.items():
            clock.start()
            for _ in range(steps):
                autograd.grad(way(), (q, k, v), gradient)
            laps[name] = clock.lap(steps)
        return laps

    work(1)
    return work


def generation(config: Config, vocab_size: int, device: Device, clock: Clock) -> Work:
    """One text until the context is full, with and without the cache of keys and values."""
    model = GPT(config.model, vocab_size).to(device.accelerator)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device.accelerator)
    count = config.model.max_seq_len - 1
    autocast = AUTOCAST.get(device.precision)

    def work(steps: int) -> dict[str, Lap]:
        laps = {}
        for name, use_cache in (("cached", True), ("uncached", False)):
            with torch.autocast(device.accelerator, autocast, enabled=autocast is not None):
                clock.start()
                generate(model, prompt, count, use_cache=use_cache)
                laps[name] = clock.lap(count)
        return laps

    return work


def tokenization(config: Config, vocab_size: int, clock: Clock) -> tuple[Work, int]:
    """Encoding the stories of the embedded corpus; and how many tokens its text gave the BPE."""
    corpus = corpora.open_corpus(config.data)
    documents = (document.text for document in corpus.documents("train"))
    texts = list(corpora.first_bytes(documents, TEXT_BYTES))
    kinds: list[TokenizerConfig] = [
        BpeTokenizer(vocab_size=vocab_size),
        CharTokenizer(),
        ByteTokenizer(),
    ]
    tokenizers: list[Tokenizer] = [train_tokenizer(kind, texts) for kind in kinds]
    size = sum(len(text.encode()) for text in texts)

    def work(steps: int) -> dict[str, Lap]:
        laps = {}
        for tokenizer in tokenizers:
            clock.start()
            tokenizer.encode_batch(texts)
            laps[tokenizer.kind] = clock.lap(size)
        return laps

    return work, tokenizers[0].vocab_size
