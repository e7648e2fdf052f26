"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinygpt.model.gpt import GPT, KVCache

# How many tokens pass between two looks whether all rows have ended.  To look is to wait for the
# device: the others, by default, are looked at every 16 tokens, and what is too much is cut off.
LOOK_EVERY = {"cpu": 1}


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
    """(B, V) -> (B,): the likeliest token at temperature 0, else a sample.

    A sample is the token whose p / e is largest, e drawn from Exp(1) for each token apart: so it
    is drawn with probability p.  As no number drawn depends on the logits, a last bit of theirs
    changes the choice only where two p / e agree in all the bits before it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    uniform = torch.rand(logits.shape, generator=generator, device=generator.device)
    exponential = -uniform.to(logits.device).log()  # inf, never 0: rand is below 1
    return (logits.softmax(dim=-1) / exponential).argmax(dim=-1)


def continue_text(
    model: GPT,
    text: Tensor,
    length: int,
    choose: Callable[[Tensor], Tensor],
    stop_token: int | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    """Fill ``text`` (B, T) from ``length`` on; yield each new column of tokens (B,).

    ``choose`` gets the logits (B, V) at the last position and gives the tokens that follow.
    It may go on for some columns after all rows have ended: see LOOK_EVERY.
    """
    max_seq_len = model.config.max_seq_len
    look_every = LOOK_EVERY.get(text.device.type, 16)
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    caches = None
    begun = read = -1  # where the context begins, and how far it was read
    for end in range(length, text.shape[1]):
        start = context_start(end, max_seq_len)
        if not use_cache or start != begun:  # all of the context is to be read
            caches = [KVCache(max_seq_len) for _ in model.blocks] if use_cache else None
            begun = read = start
        last = model.hidden(text[:, read:end], caches)[:, -1]  # (B, C)
        read = end
        new = choose(model.logits(last))  # (B,)
        if stop_token is not None:
            new = new.masked_fill(ended, stop_token)
            ended |= new == stop_token
        text[:, end] = new
        yield new
        if stop_token is not None and (end - length + 1) % look_every == 0 and ended.all():
            return


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
    use_cache: bool = True,
) -> Tensor:
    """The prompt (B, T0) and up to ``max_new_tokens`` more: (B, T0 + new).

    A row that has produced ``stop_token`` is filled up with it; when all have, the text ends.
    ``vocab_size`` limits what can be chosen (null: the model's own, without its padding).
    Sampling draws from ``generator`` (null: a new one with seed 0), never from torch's global
    state, so a training run is the same whether it prints samples or not.
    ``use_cache`` keeps the keys and values of the context instead of computing them again for
    each token: much faster, and the same tokens but for two that tie within rounding.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be (B, T0) with T0 >= 1, got {tuple(prompt.shape)}")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1")
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    choices = model.vocab_size if vocab_size is None else vocab_size

    def choose(logits: Tensor) -> Tensor:
        return next_token(logits[:, :choices], temperature, top_k, draws)

    end = prompt.shape[1]
    text = torch.cat((prompt, prompt.new_empty(len(prompt), max_new_tokens)), dim=1)  # (B, T)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # fsdp goes on training in what it gathers here: no inference_mode
            for _ in continue_text(model, text, end, choose, stop_token, use_cache):
                end += 1
    finally:
        for module, training in was_training.items():
            module.training = training
    if stop_token is not None:  # the text ends with its first column of nothing but stop tokens
        stops = (text[:, prompt.shape[1] : end] == stop_token).all(dim=0).nonzero()[:, 0].tolist()
        end = prompt.shape[1] + stops[0] + 1 if stops else end
    return text[:, :end]
