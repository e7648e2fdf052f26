"""Generation: the choice of a token, the context rule, the cache, and what stays untouched."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinygpt.config import ModelConfig
from tinygpt.model.generate import LOOK_EVERY, context_start, continue_text, generate
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


def test_mode_comes_back_after_an_error() -> None:
    model = make().train()
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 1), 99), 1)
    assert model.training


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


def test_samples_follow_the_probabilities() -> None:
    model = make()
    with torch.no_grad():
        probabilities = (model(PROMPT[:1])[0, -1] / 4).softmax(-1)
    drawn = generate(model, PROMPT[:1].expand(20_000, -1), 1, temperature=4.0)[:, -1]
    frequencies = drawn.bincount(minlength=VOCAB) / len(drawn)
    assert torch.allclose(frequencies, probabilities, atol=0.015)


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
    ],
)
def test_nonsense_is_refused(prompt: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompt|temperature|top_k"):
        generate(make(), prompt, 1, **options)


# --- the cache -----------------------------------------------------------------------------

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


@settings(max_examples=60, deadline=None)
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
        for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3}):
            with_cache = generate(model, prompt, 25, **options)
            assert torch.equal(with_cache, generate(model, prompt, 25, use_cache=False, **options))


@settings(max_examples=40, deadline=None)
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
    text = torch.cat((PROMPT, torch.zeros(2, 5, dtype=torch.long)), dim=1)
    columns = continue_text(model, text, 3, lambda logits: logits.argmax(-1), None, True)
    first = next(columns)
    assert torch.equal(first, model(PROMPT)[:, -1].argmax(-1))
    assert torch.equal(text[:, 3], first)
    assert (text[:, 4:] == 0).all()
    rest = torch.stack([first, *columns], dim=1)
    assert torch.equal(torch.cat((PROMPT, rest), 1), generate(model, PROMPT, 5, temperature=0))


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


def test_cache_of_shared_heads_is_smaller() -> None:
    cache = KVCache(8)
    model = make_kind({"n_kv_heads": 2, "position": "learned"})
    model.blocks[0](torch.randn(3, 5, 16), None, cache)
    assert cache.keys.shape == cache.values.shape == (3, 2, 8, 4)
    assert cache.length == 5


def test_a_full_cache_takes_no_more() -> None:
    model = make()
    with pytest.raises(ValueError, match="9 tokens, but max_seq_len is 8"):
        in_pieces(model, torch.zeros(1, 9, dtype=torch.long), [8, 1])


def test_the_cache_works_in_training_mode_with_gradient_checkpointing() -> None:
    model = make(gradient_checkpointing=True).train()
    tokens = torch.randint(VOCAB, (2, 8))
    torch.testing.assert_close(in_pieces(model, tokens, [5, 3]), model.hidden(tokens))
