"""Text from a model, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tinygpt.model.gpt import GPT


def context_start(length: int, max_seq_len: int) -> int:
    """Where the context of the next token begins, when ``length`` tokens are there.

    The context grows from the first token until it is full; when one more token would not fit,
    the last half is kept and encoded anew, and it grows again.  (To slide by one token would
    change every position, each time.)  The start depends on the length alone, so it makes no
    difference whether a text was generated in one call or in several, with a cache or without.
    """
    kept = max(1, max_seq_len // 2)
    stride = max_seq_len + 1 - kept  # tokens dropped, each time one more would not fit
    return stride * max(0, -(-(length - max_seq_len) // stride))


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """(B, V) -> (B,): the likeliest token at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(dim=-1).to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The prompt (B, T0) and up to ``max_new_tokens`` more: (B, T0 + new).

    A row that has produced ``stop_token`` is filled up with it; when all have, the text ends.
    ``vocab_size`` limits what can be chosen (null: the model's own, without its padding).
    Sampling draws from ``generator`` (null: a new one with seed 0), never from torch's global
    state, so a training run is the same whether it prints samples or not.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be (B, T0) with T0 >= 1, got {tuple(prompt.shape)}")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    choices = model.vocab_size if vocab_size is None else vocab_size

    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # fsdp goes on training in what it gathers here: no inference_mode
            tokens = prompt  # (B, T)
            ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
            for _ in range(max_new_tokens):
                start = context_start(tokens.shape[1], model.config.max_seq_len)
                last = model.hidden(tokens[:, start:])[:, -1]  # (B, C)
                logits = model.logits(last)[:, :choices]
                new = next_token(logits, temperature, top_k, generator)  # (B,)
                if stop_token is not None:
                    new = new.masked_fill(ended, stop_token)
                    ended |= new == stop_token
                tokens = torch.cat((tokens, new[:, None]), dim=1)
                if stop_token is not None and ended.all():
                    break
    finally:
        for module, training in was_training.items():
            module.training = training
    return tokens
