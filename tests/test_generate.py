"""Generation: the choice of a token, the context rule, the cache, and what stays untouched."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare
from torch import Tensor

from tinygpt.config import ModelConfig, RunError, Sampling
from tinygpt.model.generate import LOOK_EVERY, context_start, draw, filtered, generate, stream
from tinygpt.model.gpt import GPT, KVCache

VOCAB = 11


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost small tensors more than they give, ten times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(vocab_size: int = VOCAB, scale: float = 20, **changes: Any) -> GPT:
    settings = {"n_layers": 1, "d_model": 8, "n_heads": 2, "max_seq_len": 8, **changes}
    torch.manual_seed(3)
    model = GPT(ModelConfig(**settings), vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # far from uniform, so that choices differ
    return model.eval()


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_greedy_is_the_argmax_loop_with_half_windows(position: str) -> None:
    model = make(position=position)
    tokens, window = PROMPT, PROMPT
    for _ in range(20):
        if window.shape[1] > 8:  # one more than fits: the last half goes on
            window = window[:, -4:]
        new = model(window)[:, -1].argmax(-1, keepdim=True)
        tokens, window = torch.cat((tokens, new), 1), torch.cat((window, new), 1)
    assert torch.equal(generate(model, PROMPT, 20, temperature=0), tokens)


@given(st.integers(1, 40), st.integers(1, 200))
def test_context_rule(max_seq_len: int, length: int) -> None:
    start, after = context_start(length, max_seq_len), context_start(length + 1, max_seq_len)
    kept = max(1, max_seq_len // 2)
    if length <= max_seq_len:
        assert start == 0
    assert kept <= length - start <= max_seq_len or start == 0
    # the context grows by the new token, or, when that no longer fits, shrinks to the last half
    full = length - start == max_seq_len
    assert length + 1 - after == (kept if full else length - start + 1)


def test_one_call_or_two_give_the_same_text() -> None:
    model = make()
    generator = torch.Generator().manual_seed(1)
    first = generate(model, PROMPT, 9, generator=generator)
    assert torch.equal(
        generate(model, first, 9, generator=generator),
        generate(model, PROMPT, 18, generator=torch.Generator().manual_seed(1)),
    )


def test_a_prompt_longer_than_the_context_is_kept_whole_in_the_output() -> None:
    model = make()
    prompt = torch.arange(30)[None] % VOCAB
    out = generate(model, prompt, 2, temperature=0)
    assert out.shape == (1, 32)
    assert torch.equal(out[:, :30], prompt)
    assert generate(make(max_seq_len=1), prompt, 3).shape == (1, 33)


def test_seeds() -> None:
    model = make()

    def text(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return generate(model, PROMPT, 30, generator=generator)

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))
    assert torch.equal(text(None), text(0))
    assert not torch.equal(text(1)[0, 3:], text(1)[1, 3:])


def test_training_state_is_untouched() -> None:
    model = make(dropout=0.5).train()
    model.blocks[0].eval()  # a part that someone has frozen stays as it is
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    out = generate(model, PROMPT, 12)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(out, generate(model.eval(), PROMPT, 12))  # and dropout was off
    # the text may be trained on
    model(out[:, :8]).sum().backward()


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    model = make(vocab_size=3, pad_vocab_to_multiple=64, tie_weights=False)
    with torch.no_grad():
        model.head.weight[3:] = 100 * model.head.weight[:1]  # the padding shouts
    prompt = torch.zeros(8, 1, dtype=torch.long)
    assert model(prompt).argmax(-1).min() >= 0
    for temperature in (0.0, 1.0, 100.0):
        out = generate(model, prompt, 30, temperature=temperature, top_k=50)
        assert out.max() < 3
    assert generate(model, prompt, 30, temperature=100.0, vocab_size=2).max() == 1


def test_top_k_and_temperature() -> None:
    model = make()
    greedy = generate(model, PROMPT, 25, temperature=0)
    assert torch.equal(generate(model, PROMPT, 25, top_k=1), greedy)
    assert torch.equal(generate(model, PROMPT, 25, temperature=1e-4), greedy)
    assert not torch.equal(generate(model, PROMPT, 25, temperature=3.0), greedy)
    # every token drawn is among the two likeliest
    one = PROMPT[:1].expand(200, -1)
    drawn = generate(model, one, 1, temperature=1000.0, top_k=2)[:, -1]
    likeliest = model(PROMPT[:1])[0, -1].topk(2).indices
    assert set(drawn.tolist()) == set(likeliest.tolist())


def test_stop_token() -> None:
    model = make()
    free = generate(model, PROMPT, 40)
    stop = int(free[0, 8])
    out = generate(model, PROMPT, 40, stop_token=stop)
    for row, free_row in zip(out[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        end = row.index(stop) if stop in row else len(row)
        assert row[:end] == free_row[:end]
        assert set(row[end:]) <= {stop}
    assert out.shape[1] == 43 or (out[:, -1] == stop).all()
    single = generate(model, PROMPT[:1], 40, stop_token=stop)
    assert single[0, 3:].tolist().index(stop) == single.shape[1] - 4  # nothing after it


def test_looking_seldom_whether_all_have_ended_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    prompt = torch.arange(8)[:, None]
    free = generate(model, prompt, 40)
    stops = [int(free[0, 4]), int(free[3, 9]), VOCAB]  # the last is never met
    for rows in (prompt, prompt[:1]):
        often = [generate(model, rows, 40, stop_token=stop) for stop in stops]
        monkeypatch.setitem(LOOK_EVERY, "cpu", 16)
        seldom = [generate(model, rows, 40, stop_token=stop) for stop in stops]
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(often, seldom, strict=True))
    assert often[0].shape[1] < 41  # and the one row did end early


def test_no_new_tokens() -> None:
    assert torch.equal(generate(make(), PROMPT, 0), PROMPT)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}),
        (torch.zeros(3, dtype=torch.long), {}),
        (PROMPT, {"temperature": -1.0}),
        (PROMPT, {"top_k": 0}),
        (PROMPT, {"top_p": 0.0}),
        (PROMPT, {"top_p": 1.1}),
        (PROMPT, {"min_p": -0.1}),
        (PROMPT, {"min_p": 1.1}),
        (PROMPT, {"repetition_penalty": 0.0}),
        (PROMPT, {"temperature": float("nan")}),
    ],
)
def test_nonsense_is_refused(prompt: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options) or "prompt"):
        generate(make(), prompt, 1, **options)


# --- what the next token is drawn from -----------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.2, 5.0),
        "temperature": st.floats(0.05, 20.0),
        "top_k": st.integers(1, 40),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
    },
)
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": None}
# whole numbers tie
LOGITS = st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float)


def by_hugging_face(logits: Tensor, context: Tensor, sampling: Sampling) -> Tensor:
    """Its filters one after the other; ``generate`` leaves out a top_p of 1, as here."""
    processing = pytest.importorskip("transformers.generation.logits_process")
    steps = [
        processing.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        processing.TemperatureLogitsWarper(sampling.temperature),
        processing.TopKLogitsWarper(sampling.top_k or logits.shape[1]),
        *[processing.TopPLogitsWarper(p) for p in [sampling.top_p] if p < 1],
        processing.MinPLogitsWarper(sampling.min_p),
    ]
    for step in steps:
        logits = step(context, logits)
    return logits


@settings(max_examples=200)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=LOGITS),
    OPTIONS,
    st.data(),
)
def test_the_filters_are_those_of_hugging_face(
    values: Any, options: dict[str, Any], data: st.DataObject
) -> None:
    logits, sampling = torch.from_numpy(values), Sampling(**{**NEUTRAL, **options})
    tokens = st.integers(0, logits.shape[1] - 1)
    length = data.draw(st.integers(1, 5))
    context = torch.tensor(
        [data.draw(st.lists(tokens, min_size=length, max_size=length)) for _ in logits]
    )
    ours, theirs = filtered(logits, context, sampling), by_hugging_face(logits, context, sampling)
    # of those that tie at the edge of top-p theirs are any, as their sort is not stable
    assert torch.equal(ours.sort().values, theirs.sort().values)
    for row, mine, its in zip(logits, ours, theirs, strict=True):
        assert len(row.unique()) < len(row) or torch.equal(mine, its)
    assert torch.equal(logits, torch.from_numpy(values))  # and the model's are left as they were


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7, "top_p": 0.6, "temperature": 1.7},
        {"top_p": 0.7, "min_p": 0.2, "temperature": 0.3},
        {"repetition_penalty": 1.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 2.5},
    ],
)
def test_they_come_in_the_order_of_hugging_faces_generate(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **sizes, initializer_range=1.0, bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
    ).eval()
    prompt = torch.randint(1, 40, (4, 6))
    asked = {"do_sample": True, "top_k": 0, **options, "max_new_tokens": 1}
    shown = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, **asked, **shown)
    ours = filtered(out.logits[0], prompt, Sampling(**{**NEUTRAL, **options}))
    assert torch.equal(ours, out.scores[0])
    assert 0 < ours.isfinite().sum() < ours.numel()


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])

    def kept(**options: Any) -> list[int]:
        left = filtered(logits, torch.zeros(1, 1, dtype=torch.long), Sampling(**options))
        return left[0].isfinite().nonzero()[:, 0].tolist()

    assert kept(top_k=2) == [0, 1, 2, 3]  # all that tie with the second
    assert kept(**NEUTRAL, top_p=0.75) == [0, 1]  # 0.70, and one of the three with 0.095
    assert kept(**NEUTRAL, min_p=0.13) == [0, 1, 2, 3]
    assert kept(temperature=0) == [1]
    logits = logits.clamp(max=1.0)
    assert kept(temperature=0) == kept(**NEUTRAL, top_p=1e-6) == [0]


def test_the_penalty_is_for_what_the_context_has() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    sampling = Sampling(**NEUTRAL, repetition_penalty=2.0)
    left = filtered(logits, torch.tensor([[0, 1, 0], [2, 2, 9]]), sampling)  # 9 is no choice
    assert left.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 0.5]]
    # of a text that has outgrown the context, only by the part that is read
    model = make(scale=5)
    steps = stream(model, PROMPT, 20, dataclasses.replace(sampling, temperature=0), [])
    text = PROMPT
    for step in steps:
        read = text[:, context_start(text.shape[1], 8) :]
        assert torch.equal(step.tokens, filtered(step.logits, read, sampling).argmax(-1))
        text = torch.cat((text, step.tokens[:, None]), dim=1)


@settings(max_examples=6)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_draws_for_samples_in_training_stay_as_they_were(seed: int, batch: int) -> None:
    """top_k=50, temperature=0.8, one generator: bit for bit p / Exp(1), as it is written here."""
    model = make(vocab_size=60, scale=5)
    text = torch.arange(3 * batch).view(batch, 3)
    generator = torch.Generator().manual_seed(seed)
    out = generate(model, text, 5, temperature=0.8, top_k=50, generator=generator)
    generator.manual_seed(seed)
    for _ in range(5):
        logits = model(text)[:, -1] / 0.8
        logits[logits < logits.topk(50).values[:, -1:]] = -torch.inf
        waits = -torch.rand(batch, 60, generator=generator).log()
        text = torch.cat((text, (logits.softmax(-1) / waits).argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, text)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 6, "temperature": 1.3},
        {"top_p": 0.85, "temperature": 2.0},
        {"top_k": 8, "top_p": 0.9, "temperature": 1.5},
    ],
)
def test_20_000_draws_follow_the_exact_filtered_distribution(options: dict[str, Any]) -> None:
    model = make(vocab_size=40, scale=5)
    with torch.no_grad():
        logits = model(PROMPT[:1])[0, -1].double().numpy()
    exact = np.exp(logits / options["temperature"])  # in float64, by the definitions
    by_rank = exact.argsort()[::-1]
    exact[by_rank[options.get("top_k", 40) :]] = 0
    exact /= exact.sum()
    nucleus = np.searchsorted(exact[by_rank].cumsum(), options.get("top_p", 1.0)) + 1
    exact[by_rank[nucleus:]] = 0
    exact /= exact.sum()
    assert 3 < (exact > 0).sum() < 40
    drawn = generate(model, PROMPT[:1].expand(20_000, -1), 1, **options)[:, -1].numpy()
    counts = np.bincount(drawn, minlength=40)
    assert counts[exact == 0].sum() == 0
    expected = 20_000 * exact
    rare = expected < 5  # too few for the test's approximation: together
    cells = np.stack([counts, expected])
    pooled = cells[:, rare & (exact > 0)].sum(axis=1, keepdims=True)
    cells = np.hstack([cells[:, ~rare], pooled[:, pooled[1] > 0]])
    assert cells.shape[1] > 3
    assert chisquare(cells[0], cells[1]).pvalue > 0.001


def test_what_is_filtered_out_is_not_drawn_even_if_rand_gives_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size))
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf]])
    assert draw(logits, [torch.Generator()]).tolist() == [2]


def test_a_row_with_its_own_generator_is_as_if_alone() -> None:
    model = make(scale=5)
    prompt = torch.randint(VOCAB, (6, 5))
    sampling = Sampling(temperature=1.5, top_p=0.9)

    def rows(*which: int) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in which]
        steps = stream(model, prompt[list(which)], 20, sampling, generators)
        return torch.stack([step.tokens for step in steps], dim=1)

    together = rows(*range(6))
    assert all(torch.equal(rows(i)[0], together[i]) for i in range(6))
    assert torch.equal(rows(4, 1), together[[4, 1]])


@pytest.mark.parametrize("look_every", [1, 4, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_model_is_an_error(
    monkeypatch: pytest.MonkeyPatch, look_every: int, temperature: float, value: float
) -> None:
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    model = make(tie_weights=False).train()
    with torch.no_grad():
        model.head.weight[3] = value
    for length in (1, 6):
        with pytest.raises(RunError, match="NaN or infinite: it has diverged"):
            generate(model, PROMPT, length, temperature=temperature, top_k=2, stop_token=0)
    assert model.training


# --- the cache -----------------------------------------------------------------------------

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"top_k": 3},
    {"temperature": 2.0, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
]
KINDS = [
    {"position": position, "attention": attention, "n_kv_heads": n_kv_heads}
    for position in ("learned", "rope")
    for attention in ("sdpa", "manual")
    for n_kv_heads in (4, 2, 1)
]


def make_kind(kind: dict[str, Any], **changes: Any) -> GPT:
    """One in which a rounding stays one; at scale 20 it can grow a hundredfold in a layer."""
    return make(scale=5, **{"n_layers": 2, "d_model": 16, "n_heads": 4, **kind, **changes})


def in_pieces(model: GPT, tokens: Tensor, lengths: list[int]) -> Tensor:
    """The hidden states, where a cache was fed the tokens in pieces of these lengths."""
    caches = [KVCache(model.config.max_seq_len) for _ in model.blocks]
    return torch.cat([model.hidden(piece, caches) for piece in tokens.split(lengths, dim=1)], 1)


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 8), min_size=1), st.sampled_from([1, 3]))
def test_hidden_states_do_not_depend_on_the_pieces(
    kind: dict[str, Any], lengths: list[int], batch: int
) -> None:
    model = make_kind(kind, max_seq_len=sum(lengths))
    tokens = torch.randint(VOCAB, (batch, sum(lengths)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model.to(dtype)
        whole, pieces = model.hidden(tokens), in_pieces(model, tokens, lengths)
        assert (pieces - whole).abs().max() < tolerance * whole.abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("batch", [1, 8])
def test_same_tokens_with_and_without_the_cache(kind: dict[str, Any], batch: int) -> None:
    model = make_kind(kind)
    for length in (1, 5, 8, 9, 20):  # the context is 8
        prompt = torch.randint(VOCAB, (batch, length))
        for options in SAMPLINGS:
            with_cache = generate(model, prompt, 25, **options)
            assert torch.equal(with_cache, generate(model, prompt, 25, use_cache=False, **options))


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 20), st.integers(0, 20), st.data())
def test_same_tokens_for_any_lengths(
    kind: dict[str, Any], max_seq_len: int, length: int, new: int, data: st.DataObject
) -> None:
    model = make_kind(kind, max_seq_len=max_seq_len)
    batch = data.draw(st.integers(1, 3))
    prompt = torch.randint(VOCAB, (batch, length))
    stop_token = data.draw(st.none() | st.integers(0, VOCAB - 1))
    options: dict[str, Any] = {"temperature": 3.0, "stop_token": stop_token}
    out = generate(model, prompt, new, **options)
    assert torch.equal(out, generate(model, prompt, new, use_cache=False, **options))


def test_each_token_is_read_once_until_the_context_is_full() -> None:
    model = make()
    read: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _m, args: read.append(args[0].shape[1]))
    generate(model, PROMPT, 12)
    assert read == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]  # of 9 tokens, then of 14, the last 4
    read.clear()
    generate(model, PROMPT, 12, use_cache=False)
    assert read == [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]


def test_columns_come_one_by_one() -> None:
    model = make()
    model.train()
    steps = stream(model, PROMPT, 5, Sampling(temperature=0), [torch.Generator()])
    first = next(steps)
    assert torch.is_grad_enabled()  # the caller's own state between two steps
    assert torch.equal(first.logits, model(PROMPT)[:, -1])
    assert torch.equal(first.tokens, first.logits.argmax(-1))
    columns = torch.stack([first.tokens, *(step.tokens for step in steps)], dim=1)
    assert torch.equal(torch.cat((PROMPT, columns), 1), generate(model, PROMPT, 5, temperature=0))
    steps = stream(model, PROMPT, 5, Sampling(), [torch.Generator()])
    next(steps)
    assert not model.training
    steps.close()  # type: ignore[attr-defined]
    assert model.training


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_cache_under_autocast(position: str) -> None:
    """bfloat16 keys and values are cached as such; its rounding may choose other tokens."""
    model = make_kind({"position": position})
    tokens = torch.randint(VOCAB, (2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, pieces = model.hidden(tokens), in_pieces(model, tokens, [3, 1, 1, 2, 1])
        cache = KVCache(8)
        model.blocks[0](torch.randn(2, 3, 16), None, cache)
        out = generate(model, tokens, 20)
    assert cache.keys.dtype == torch.bfloat16
    assert (pieces - whole).abs().max() < 0.1 * whole.abs().max()
    assert out.shape == (2, 28)


def test_a_full_cache_takes_no_more() -> None:
    model = make()
    with pytest.raises(ValueError, match="9 tokens, but max_seq_len is 8"):
        in_pieces(model, torch.zeros(1, 9, dtype=torch.long), [8, 1])


def test_the_cache_works_in_training_mode_with_gradient_checkpointing() -> None:
    model = make(gradient_checkpointing=True).train()
    tokens = torch.randint(VOCAB, (2, 8))
    torch.testing.assert_close(in_pieces(model, tokens, [5, 3]), model.hidden(tokens))
