"""Text from a model, one token at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinygpt.config import RunError, Sampling
from tinygpt.config.checks import check_bounds
from tinygpt.model.gpt import GPT, KVCache

# How many tokens pass between two looks whether all rows have ended.  To look is to wait for the
# device: the others, by default, are looked at every 16 tokens, and what is too much is cut off.
LOOK_EVERY = {"cpu": 1}
LARGEST = 17.0  # number drawn from Exp(1): -log of the least that rand gives, 2^-24, is 16.6
FILTERED = float("-inf")
NO_CHOICE = (
    "the model's logits are NaN or infinite: it has diverged (or the temperature is next to 0)"
)


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


def penalised(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """(B, V): the tokens of the context (B, T) made less likely, if ``penalty`` is above 1.

    Keskar et al. 2019 (CTRL) divide their logits; a negative one, which that would make likelier,
    is multiplied, as in Hugging Face's ``generate``.
    """
    B, V = logits.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, context.clamp(max=V), True)[:, :V]  # column V: what cannot be chosen
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, context: Tensor, sampling: Sampling) -> Tensor:
    """(B, V), after the context (B, T) -> (B, V): the logits to draw from, -inf: never drawn.

    The same as Hugging Face's ``generate`` makes of the same options, in its order: repetition
    penalty, temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et al. 2024).
    All that tie with the k-th stay; of those that tie at the edge of top-p, the first.
    Temperature 0 leaves the likeliest alone, of those that tie the first.
    """
    if sampling.repetition_penalty != 1:
        logits = penalised(logits, context, sampling.repetition_penalty)
    if sampling.temperature == 0:
        likeliest = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, FILTERED).scatter(1, likeliest, logits.gather(1, likeliest))
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, FILTERED)
    if sampling.top_p < 1:
        descending, ids = logits.sort(dim=-1, descending=True, stable=True)
        ascending, ids = descending.flip(-1), ids.flip(-1)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        tail[:, -1] = False  # the likeliest stays, whatever the sum rounds to
        logits = logits.masked_fill(tail.scatter(1, ids, tail), FILTERED)
    if sampling.min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), FILTERED)
    return logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, V) -> (B,): a token of each row, drawn with its probability p.

    It is the one whose p / e is largest, e drawn from Exp(1) for each token apart.  As no number
    drawn depends on the logits, a last bit of theirs changes the choice only where two p / e agree
    in all the bits before it.  Each generator draws for as many rows: one for all, or its own row.
    """
    B, V = logits.shape
    each = B // len(generators)
    drawn = [torch.rand(each, V, generator=g, device=g.device) for g in generators]
    exponential = -torch.cat(drawn).to(logits.device).log()  # never 0: rand is below 1
    exponential = exponential.clamp(max=LARGEST)  # rand can be 0, and p / inf would be
    return (logits.softmax(dim=-1) / exponential).argmax(dim=-1)


class Step(NamedTuple):
    """One more token of each text."""

    tokens: Tensor  # (B,)
    logits: Tensor  # (B, V): the model's own
    filtered: Tensor  # (B, V): those that the tokens were drawn from


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """In evaluation mode; each module is afterwards in the mode that it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@torch.no_grad()
def stream(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    *,
    stop_token: int | None = None,
    start_token: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Iterator[Step]:
    """``generate``, a step at a time; for ``generators`` see ``draw``.

    It may go on for some steps after all rows have ended: see LOOK_EVERY.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be (B, T0) with T0 >= 1, got {tuple(prompt.shape)}")
    check_bounds(sampling)
    length, max_seq_len = prompt.shape[1], model.config.max_seq_len
    look_every = LOOK_EVERY.get(prompt.device.type, 16)
    text = torch.cat((prompt, prompt.new_empty(len(prompt), max_new_tokens)), dim=1)  # (B, T)
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    broken = torch.zeros_like(ended)
    caches = None
    begun = read = -1  # where the context begins, and how far it was read
    with evaluating(model):
        for end in range(length, text.shape[1]):
            start = context_start(end, max_seq_len)
            if not use_cache or start != begun:  # all of the context is to be read
                caches = [KVCache(max_seq_len) for _ in model.blocks] if use_cache else None
                begun = read = start
            last = model.hidden(text[:, read:end], caches)[:, -1]  # (B, C)
            read = end
            logits = model.logits(last)[:, : vocab_size or model.vocab_size]
            left = filtered(logits, text[:, start:end], sampling)
            new = left.argmax(dim=-1) if sampling.temperature == 0 else draw(left, generators)
            broken |= ~left.amax(dim=-1).isfinite()
            look = (end - length + 1) % look_every == 0 or end + 1 == text.shape[1]
            if look and broken.any():
                raise RunError(NO_CHOICE)
            if stop_token is not None:
                if start_token is not None:  # of another text
                    new = new.masked_fill(new == start_token, stop_token)
                new = new.masked_fill(ended, stop_token)
                ended |= new == stop_token
            text[:, end] = new
            yield Step(new, logits, left)
            if look and stop_token is not None and ended.all():
                return


def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    start_token: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """The prompt (B, T0) and up to ``max_new_tokens`` more: (B, T0 + new).

    A row that has produced ``stop_token`` is filled up with it; when all have, the text ends.  So
    does ``start_token``, which begins another text; it becomes a ``stop_token``.
    ``vocab_size`` limits what can be chosen (null: the model's own, without its padding).
    Sampling draws from ``generator`` (null: a new one with seed 0), never from torch's global
    state, so a training run is the same whether it prints samples or not.
    ``use_cache`` keeps the keys and values of the context instead of computing them again for
    each token: much faster, and the same tokens but for two that tie within rounding.
    Raises ConfigError for an option outside its bounds (config.Sampling), RunError where a model
    has diverged to NaN.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    steps = stream(
        model,
        prompt,
        max_new_tokens,
        sampling,
        [draws],
        stop_token=stop_token,
        start_token=start_token,
        vocab_size=vocab_size,
        use_cache=use_cache,
    )
    columns = [step.tokens for step in steps]
    if stop_token is not None and columns:  # it ends with the first of nothing but stop tokens
        all_stop = (torch.stack(columns) == stop_token).all(dim=1).tolist()
        columns = columns[: all_stop.index(True) + 1] if True in all_stop else columns
    return torch.cat((prompt, *(column[:, None] for column in columns)), dim=1)
