"""Generate text from a model, one token at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinygpt.config import RunError, Sampling
from tinygpt.config.checks import check_bounds
from tinygpt.model.gpt import GPT, KVCache

# Tokens between two checks whether all rows have ended.  A check waits for the device, so devices
# other than the CPU are checked every 16 tokens and the surplus is cut off.
LOOK_EVERY = {"cpu": 1}
LARGEST = 17.0  # cap on draws from Exp(1): -log of the smallest positive rand, 2^-24, is 16.6
FILTERED = float("-inf")
NO_CHOICE = (
    "the model's logits are NaN or infinite: it has diverged (or the temperature is next to 0)"
)


def context_start(length: int, max_seq_len: int) -> int:
    """Return where the context of the next token begins in a text of ``length`` tokens.

    The context grows until it is full; then the last half is kept and encoded again.  (Sliding by
    one token would change every position each time.)  The start depends on the length alone, so a
    text is the same whether generated in one call or several, with a cache or without.
    """
    stride = max_seq_len + 1 - max(1, max_seq_len // 2)  # tokens dropped when the context is full
    return stride * max(0, -(-(length - max_seq_len) // stride))


def penalised(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """Make tokens of the context (B, T) less likely in the logits (B, V) if ``penalty`` is above 1.

    Positive logits are divided by it (Keskar et al. 2019, CTRL) and negative ones multiplied, as
    in Hugging Face's ``generate``.
    """
    B, V = logits.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, context.clamp(max=V), True)[:, :V]  # column V: tokens beyond the logits
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, context: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits (B, V) to sample from, given the context (B, T); -inf is never sampled.

    The options apply as in Hugging Face's ``generate``, in its order: repetition penalty,
    temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et al. 2024).  All tokens that
    tie with the k-th are kept; of a tie at the edge of top-p, and at temperature 0, only the first.
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
        tail[:, -1] = False  # keep the likeliest token, however the sum is rounded
        logits = logits.masked_fill(tail.scatter(1, ids, tail), FILTERED)
    if sampling.min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), FILTERED)
    return logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample one token per row by its probability p: (B, V) -> (B,).

    The token with the largest p / e wins, where each e comes from Exp(1).  The random numbers do
    not depend on the logits, so rounding changes the choice only where two p / e nearly tie.
    The rows are divided evenly among the generators: one for all rows, or one each.
    """
    B, V = logits.shape
    each = B // len(generators)
    uniform = [torch.rand(each, V, generator=g, device=g.device) for g in generators]
    exponential = -torch.cat(uniform).to(logits.device).log()  # above 0, as rand is below 1
    exponential = exponential.clamp(max=LARGEST)  # rand can be 0, and p / inf is useless
    return (logits.softmax(dim=-1) / exponential).argmax(dim=-1)


class Step(NamedTuple):
    """Hold the next token of each text."""

    tokens: Tensor  # (B,)
    logits: Tensor  # (B, V), from the model
    filtered: Tensor  # (B, V), which the tokens were sampled from


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Run the block in evaluation mode, and restore the mode of each module afterwards."""
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
    """Yield the steps of ``generate``; for ``generators`` see ``draw``.

    Some steps may follow after all rows have ended (see LOOK_EVERY).
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
            if not use_cache or start != begun:  # read the whole context
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
                if start_token is not None:  # it would begin another text
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
    """Return the prompt (B, T0) followed by up to ``max_new_tokens`` tokens: (B, T0 + new).

    A row that has produced ``stop_token`` is filled up with it; the text ends when all have.
    ``start_token``, which would begin another text, counts as ``stop_token``.  ``vocab_size``
    limits the choice (None: the model's vocabulary without padding).  Random numbers come from
    ``generator`` (None: a new one with seed 0), never from torch's global state, so printing
    samples does not change a training run.  ``use_cache`` keeps the keys and values of the context:
    much faster, with the same tokens except where two tie within rounding.  Raises ConfigError for
    an option outside its bounds (config.Sampling) and RunError if the model has diverged to NaN.
    """
    options: dict[str, Any] = {"stop_token": stop_token, "start_token": start_token}
    options |= {"vocab_size": vocab_size, "use_cache": use_cache}
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    generators = [torch.Generator().manual_seed(0) if generator is None else generator]
    steps = stream(model, prompt, max_new_tokens, sampling, generators, **options)
    columns = [step.tokens for step in steps]
    if stop_token is not None and columns:  # cut behind the first column of stop tokens alone
        all_stop = (torch.stack(columns) == stop_token).all(dim=1).tolist()
        columns = columns[: all_stop.index(True) + 1] if True in all_stop else columns
    return torch.cat((prompt, *(column[:, None] for column in columns)), dim=1)
