"""``python -m tinygpt.sample``: the same text by every way to it, and what a terminal shows."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from tests.conftest import Command, tiny
from tinygpt import cli, sample
from tinygpt.config import Sampling
from tinygpt.data.library import Foreign
from tinygpt.data.tokenizers import Bytes, Tokenizer
from tinygpt.model.generate import LOOK_EVERY
from tinygpt.runs.load import TrainedRun, load_run
from tinygpt.sample import Arguments, Unfolding, Wanted, Writer
from tinygpt.training.session import train

EOT = "<|endoftext|>"
Said = Callable[..., tuple[str, str]]
LOADING = "loading …\n"


@pytest.fixture(scope="module")
def runs(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run folders by tokenizer; the vocabulary of one is padded."""
    folder = tmp_path_factory.mktemp("outputs")
    asked = {
        "byte": ["train.keep_every=1024"],
        "char": ["tokenizer=char", "model.pad_vocab_to_multiple=64"],
        "bpe": ["tokenizer=bpe", "tokenizer.vocab_size=300", "model.position=rope"],
    }
    for name, more in asked.items():
        places = (f"output_dir={folder}", f"cache_dir={cache}", f"run_name={name}")
        overrides = [*tiny(corpus), *more, *places]
        train(cli.compose_config(overrides), overrides, Console(quiet=True))
    return {name: str(folder / "runs" / name) for name in asked}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What the command writes to stdout and stderr; in this process, torch being here already."""

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["sample", *words])
        left = 0
        try:
            sample.main()
        except SystemExit as leaving:
            left = int(leaving.code or 0)
        out, err = capsys.readouterr()
        assert left == code, err
        return out, err.removeprefix(LOADING)

    return run


# --- one text ------------------------------------------------------------------------------


def test_the_same_command_writes_the_same_text(runs: dict[str, str], tinygpt: Command) -> None:
    words = ("sample", f"run={runs['bpe']}", "prompt=The cat, 'x=1' {went}", "max_new_tokens=40")
    done = tinygpt(*words, "seed=3", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "loading ...\n")  # as ASCII spells it
    assert tinygpt(*words, "seed=3").stdout == done.stdout
    # the text alone, as three lines of Python give it
    text = load_run(runs["bpe"]).generate("The cat, 'x=1' {went}", 40, seed=3)
    assert done.stdout == text + "\n"
    assert text.startswith("The cat, 'x=1' {went}")
    assert len(text) > 40


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_options_mean_the_same_in_python(runs: dict[str, str], kind: str, said: Said) -> None:
    options: dict[str, Any] = {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
    }
    words = [f"{name}={value}" for name, value in options.items()]
    run = load_run(runs[kind])
    for prompt in ("", "The dog"):
        out, err = said(f"run={runs[kind]}", f"prompt={prompt}", "max_new_tokens=50", *words)
        assert (out, err) == (run.generate(prompt, 50, **options) + "\n", "")
        # also past the context, which is of 32 tokens
        uncached = said(
            f"run={runs[kind]}", f"prompt={prompt}", "max_new_tokens=50", *words, "cache=false"
        )
        assert uncached == (out, "")
    assert run.generate("The dog", 50, seed=1) != run.generate("The dog", 50, seed=2)


def test_a_text_is_read_as_the_beginning_of_a_document(runs: dict[str, str]) -> None:
    run = load_run(runs["byte"])
    for prompt in ("", "Story"):
        begun = [run.tokenizer.eot_id, *prompt.encode()]
        with torch.no_grad():
            likeliest = int(run.model(torch.tensor([begun]))[0, -1].argmax())
        expected = run.tokenizer.decode([*begun[1:], likeliest])
        assert run.generate(prompt, 1, temperature=0) == expected


def test_a_text_ends_where_the_model_ends_it(runs: dict[str, str]) -> None:
    run = load_run(runs["bpe"])
    texts = [run.generate("The cat", 50, seed=seed) for seed in range(20)]
    lengths = {len(text) for text in texts}
    assert len(lengths) > 2
    assert not any(EOT in text for text in texts)
    for terminal in (True, False):  # only there the end is shown
        shown = on_page(run, [Wanted(run.encode_prompt("The cat"), 0)], terminal, max_new_tokens=50)
        assert shown.removesuffix("\n").endswith(EOT) == terminal


def test_on_a_gpu_too_nothing_comes_after_the_end(
    runs: dict[str, str], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is seen only at every 16th token that a text has ended."""
    words = (f"run={runs['bpe']}", "prompt=The cat", "max_new_tokens=50")
    both = [said(*words, more) for more in ("top=2", "n=2")]
    assert both[0][0].count("step ") < 50
    monkeypatch.setitem(LOOK_EVERY, "cpu", 16)
    assert both == [said(*words, more) for more in ("top=2", "n=2")]
    text = load_run(runs["bpe"]).generate("The cat", 50)
    assert said(*words)[0] == text + "\n"
    assert EOT not in text


# --- several -------------------------------------------------------------------------------


def test_a_text_is_the_same_alone_and_beside_others(
    runs: dict[str, str], said: Said, tmp_path: Path
) -> None:
    prompts = ["The cat", "", "Story 7", "A hen ⟨é⟩", "The dog", "The cat"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    words = (f"run={runs['bpe']}", "max_new_tokens=40", "top_p=0.95", "top_k=null")
    out, _ = said(*words, f"prompts={file}", "n=3", "seed=5")
    alone = [
        said(*words, f"prompt={prompt}", f"seed={seed}")[0]
        for prompt in prompts
        for seed in (5, 6, 7)
    ]
    assert out == f"{EOT}\n".join(alone)
    assert len(set(alone)) == 15  # all differ but those of the prompt that is there twice


# --- what the model does not read as it was given ------------------------------------------


def test_unknown_characters_are_named_and_shown(
    runs: dict[str, str], said: Said, tmp_path: Path
) -> None:
    out, err = said(f"run={runs['char']}", "prompt=a日😀 cat日", "max_new_tokens=1")
    assert err == (
        "note: not in the alphabet of this run: '日', '😀'; read, and shown, as <|unk|>\n"
    )
    assert out.startswith("a<|unk|><|unk|> cat<|unk|>")
    file = tmp_path / "prompts.txt"
    file.write_text("ok\nß?", encoding="utf-8")
    assert "run: '?', 'ß'; read" in said(f"run={runs['char']}", f"prompts={file}")[1]


def test_a_prompt_longer_than_the_context_is_noted(
    runs: dict[str, str], said: Said, tmp_path: Path
) -> None:
    long = "The cat went to the hill and saw it."  # 36 bytes and the end of text before them
    out, err = said(f"run={runs['byte']}", f"prompt={long}", "max_new_tokens=1", "temperature=0")
    assert err == (
        "note: longer than the context of 32 tokens: 1 of 1 prompts; only the end is read, "
        "of the longest (37 tokens) the last 20\n"
    )
    run = load_run(runs["byte"])
    with torch.no_grad():
        logits = run.model(torch.tensor([list(long.encode()[-20:])]))[0, -1]
    assert out == run.tokenizer.decode([*long.encode(), int(logits.argmax())]) + "\n"
    file = tmp_path / "prompts.txt"
    file.write_text(f"{long}\nshort\n{long}x")
    assert ": 2 of 3 prompts;" in said(f"run={runs['byte']}", f"prompts={file}")[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run=nowhere"], "run=nowhere: no such folder"),
        (["run=x", "temperature=hot"], "temperature=hot: must be a number"),
        (["run=x", "top_p=1.5"], "top_p=1.5: must be at most 1"),
        (["run=x", "device=tpu"], "device=tpu: must be one of auto, cpu, mps, cuda"),
        (["run=x", "max_tokens=9"], "max_tokens: no such key; did you mean max_new_tokens?"),
        (["run=x", "prompts=none"], "prompts=none: cannot be read (No such file or directory)"),
        (["run=x", "prompts=none", "prompt=a"], "prompts=none: either prompt= or prompts="),
        (["run=x", "prompts=empty.txt"], "prompts=empty.txt: is empty"),
        (["run=x", "prompts=latin.txt"], "prompts=latin.txt: not UTF-8 text (byte 1)"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("aé".encode("latin-1"))
    assert said(*words, code=2) == ("", f"error: {line}\n")


def test_a_device_that_is_not_there(runs: dict[str, str], said: Said) -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    _, err = said(f"run={runs['byte']}", f"device={absent}", code=2)
    assert err.startswith(f"error: device={absent}: this machine or this build of torch has none; ")
    assert "usable here: auto, " in err


def test_a_model_that_has_diverged_is_one_line(
    runs: dict[str, str], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(runs["byte"])
    with torch.no_grad():
        run.model.token_embedding.weight.fill_(torch.nan)
    monkeypatch.setattr("tinygpt.runs.load.load_run", lambda *_: run)
    for more in ([], ["n=3"], ["top=2"], ["temperature=0"]):
        out, err = said(f"run={runs['byte']}", *more, code=1)
        assert out == ""
        assert err.startswith("error: the model's logits are NaN or infinite: it has diverged")


# --- what a terminal shows -----------------------------------------------------------------


def on_page(run: TrainedRun, texts: list[Wanted], terminal: bool = True, **arguments: Any) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    Writer(run, Arguments(run="x", **arguments), console).write(texts)
    return file.getvalue()


STORY = "Once upon a time, there was a boy named Tim. Él vió 日本 👩\u200d🚀 e\u0301 \ufffd  x \n"
DECODERS: dict[str, Any] = {
    "llama": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(cleanup=True),
    "suffix": decoders.BPEDecoder("s"),
    "joining": decoders.Sequence([decoders.Fuse(), decoders.Replace("e▁", "E")]),
    "none": None,
}


@functools.cache
def llama_like(decoder: str = "llama") -> Foreign:
    """Words behind ``▁``, single characters, and bytes for all others; it puts ``<s>`` first."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    words = ["▁Once", "▁upon", "▁a", "▁time", "▁boy"]
    begun = [word[:n] for word in words for n in range(2, len(word) + 1)]
    tokens = [*special, *"▁abcdefhimnoprstuwOTy,.", *begun, "##ing", "ing"]
    vocab = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    merges = [(token[:-1], token[-1]) for token in dict.fromkeys(begun)]
    made = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if DECODERS[decoder] is not None:
        made.decoder = DECODERS[decoder]
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Foreign(json.loads(made.to_str()), "</s>", "<s>", "<s>")


def spoken(tokenizer: Tokenizer, ids: Sequence[int], prompt: int = 0) -> list[str]:
    """What is shown as the tokens come; each piece stands when the next is shown."""
    text = Unfolding(tokenizer)
    return [text.add(ids[:prompt]), *(text.add([i]) for i in ids[prompt:]), text.rest()]


@given(st.lists(st.integers(0, 257)) | st.text().map(lambda text: list(text.encode())))
def test_pieces_are_whole_characters_and_add_up(ids: list[int]) -> None:
    tokenizer, shown = Bytes(), ""
    for piece in spoken(tokenizer, ids):
        shown += piece
        assert tokenizer.decode(ids).startswith(shown)
    assert shown == tokenizer.decode(ids)


def test_a_character_waits_for_its_last_byte() -> None:
    assert spoken(Bytes(), list("é😀a".encode())) == ["", "", "é", "", "", "", "😀", "a", ""]


@pytest.mark.parametrize("decoder", DECODERS)
@given(data=st.data())
def test_any_tokens_are_shown_as_they_are_decoded_together(
    decoder: str, data: st.DataObject
) -> None:
    """Also bytes that spell nothing, and spaces at any place."""
    tokenizer = llama_like(decoder)
    spelled = [*range(1, 3), *map(int, (3 + 0xC3, 3 + 0xA9, 3 + 0xF0, 3 + 0x41))]
    ids = st.sampled_from(spelled) | st.integers(259, tokenizer.vocab_size - 1)
    drawn = data.draw(st.lists(ids, max_size=30))
    prompt = data.draw(st.integers(0, len(drawn)))
    assert "".join(spoken(tokenizer, drawn, prompt)) == tokenizer.decode(drawn)


def test_words_behind_a_mark_keep_their_spaces() -> None:
    tokenizer = llama_like()
    ids = tokenizer.encode(STORY)
    assert tokenizer.decode(ids) == STORY
    pieces = spoken(tokenizer, ids)
    assert "".join(pieces) == STORY
    assert pieces[:6] == ["", "Once", " upon", " a", " time", ","]  # as they come
    assert "👩\u200d🚀" in "".join(pieces)
    page = Writer.__new__(Writer)
    page.tokenizer = tokenizer
    time, rocket = tokenizer.encode("a time")[1], tokenizer.encode("🚀")[1:]
    assert page.spelled(time, tokenizer.encode("Once")) == "' time'"
    assert page.spelled(time) == "'time'"  # as a text that begins with it
    assert page.spelled(rocket[3], [time, *rocket[:3]]) == "'🚀'"
    assert page.spelled(rocket[0], [time]) == "'\ufffd'"
    assert page.spelled(tokenizer.eot_id) == "</s>"


def test_a_lone_text_comes_token_by_token(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shown = load_run(runs["char"]), list[str]()
    monkeypatch.setattr(Writer, "put", lambda _self, text, _style=None: shown.append(text))
    page = Writer(run, Arguments(run="x"), Console(file=StringIO()))
    page.show(run.encode_prompt("The"), (shown.append("|") or token for token in (4, 5, 6)))  # type: ignore[func-returns-value]
    assert (
        "".join(shown) == "The" + "".join(f"|{run.tokenizer.decode([i])}" for i in (4, 5, 6)) + "\n"
    )


def test_markup_is_text_and_control_characters_do_not_reach_a_terminal(
    runs: dict[str, str], said: Said
) -> None:
    run = load_run(runs["byte"])
    prompt = "[red]x[/red] :smile:\x1b[31m\x07\x9b2J\r\x7f\ta"
    texts = [Wanted(run.encode_prompt(prompt), seed) for seed in range(3)]
    options: dict[str, Any] = {"temperature": 5.0, "top_k": None}  # any byte
    for arguments in (options, {**options, "top": 3, "max_new_tokens": 5}):
        shown = on_page(run, texts, **arguments)
        assert shown.count("[red]x[/red] :smile:\\x1b[31m\\x07\\x9b2J\\x0d\\x7f\ta") >= 3
        styles = shown.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[2m", "")
        controls = {c for c in styles if not c.isprintable() and c not in "\n\t"}
        assert not {c for c in controls if ord(c) < 0xA0}
        assert "2 of 3 · seed 1" in shown
    # in a file a text is what it is
    assert said(f"run={runs['byte']}", f"prompt={prompt}")[0].startswith(prompt)


def test_the_table_shows_what_is_drawn_from(runs: dict[str, str], said: Said) -> None:
    words = (f"run={runs['char']}", "prompt=The c", "max_new_tokens=3")
    options = ("top_k=null", "temperature=1.7", "top_p=0.5", "repetition_penalty=2")
    out, _ = said(*words, *options, "top=4")
    assert out.endswith("\n\n" + said(*words, *options)[0])  # the text itself stays the same
    run = load_run(runs["char"])
    begun = run.encode_prompt("The c")
    sampling = Sampling(2.0, 1.7, None, 0.5)
    steps = list(run.stream([begun], [0], 3, sampling))
    sections = out.split("\n\n")[:3]
    for number, (step, section) in enumerate(zip(steps, sections, strict=True), start=1):
        title, head, *rows, others = section.splitlines()
        before = run.tokenizer.decode([*begun[1:], *(int(s.tokens) for s in steps[: number - 1])])
        assert title == f"step {number}  after {before!r}"
        assert head.split() == ["rank", "token", "id", "model", "drawn", "from"]
        model, drawn = step.logits[0].softmax(-1), step.filtered[0].softmax(-1)
        likeliest = model.argsort(descending=True).tolist()
        chosen = int(step.tokens)
        listed = likeliest[:4] + [chosen] * (chosen not in likeliest[:4])
        for token, row in zip(listed, rows, strict=True):
            text = repr(run.tokenizer.decode([token]))
            share = f"{drawn[token]:.2%}" if drawn[token] > 0 else "–"
            rank = likeliest.index(token) + 1
            words_ = ["▶"] * (token == chosen) + [str(rank), *text.split(), str(token)]
            assert row.split() == [*words_, f"{model[token]:.2%}", share]
        rest = 1 - float(model[listed].sum())
        assert others.split()[:2] == [str(len(model) - len(listed)), "others"]
        assert float(others.split()[2].rstrip("%")) == pytest.approx(100 * rest, abs=0.011)


def test_special_tokens_stand_without_quotes(runs: dict[str, str]) -> None:
    run = load_run(runs["char"])
    page = Writer(run, Arguments(run="x"), Console(file=StringIO()))
    space = run.tokenizer.encode(" ")[0]
    assert [page.spelled(i) for i in (0, 1, 2, space)] == ["<|unk|>", "<|bos|>", EOT, "' '"]


def test_on_a_real_terminal(runs: dict[str, str]) -> None:
    """The prompt is bold, what follows is not; control characters are spelled out."""
    ours, theirs = pytest.importorskip("pty").openpty()
    words = [f"run={runs['byte']}", "prompt=The\x1b[red]", "max_new_tokens=30", "temperature=0"]
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
    env |= {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    program = [sys.executable, "-m", "tinygpt.sample", *words]
    with subprocess.Popen(program, stdout=theirs, env=env) as done:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux: the other end is closed
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert done.returncode == 0
    new = load_run(runs["byte"]).generate("The\x1b[red]", 30, temperature=0)[9:]
    assert new.isprintable()
    assert shown.decode() == f"\x1b[1mThe\\x1b[red]\x1b[0m{new}\r\n"
