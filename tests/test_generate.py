"""Generation: the choice of a token, the context rule, and what must stay untouched."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinygpt.config import ModelConfig
from tinygpt.model.generate import context_start, generate
from tinygpt.model.gpt import GPT

VOCAB = 11


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost small tensors more than they give, ten times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(vocab_size: int = VOCAB, **changes: Any) -> GPT:
    settings = {"n_layers": 1, "d_model": 8, "n_heads": 2, "max_seq_len": 8, **changes}
    torch.manual_seed(3)
    model = GPT(ModelConfig(**settings), vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # far from uniform, so that choices differ
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
