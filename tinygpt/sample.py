"""Sample text from a trained run: ``python -m tinygpt.sample``."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Optional

from omegaconf import MISSING
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from tinygpt import cli, signals, streams
from tinygpt.config import ConfigError, Sampling, key
from tinygpt.runs import rundir

if TYPE_CHECKING:
    from torch import Tensor

    from tinygpt.data.tokenizers import Tokenizer
    from tinygpt.model.generate import Step
    from tinygpt.runs.load import TrainedRun

USAGE = """\
tinygpt sample outputs/runs/x prompt="Once upon a time" [key=value ...]

run=FOLDER              the run; run= may be left out
checkpoint=final        best, last or step_<N>; a run that has not ended: last
prompt=TEXT             how the text begins, verbatim; without it the model begins by itself
prompts=FILE            instead: a file with one prompt per line, which may be empty
max_new_tokens=200      at most: a text ends earlier if the model ends it
n=1                     texts of each prompt, with the seeds seed, seed+1, ...
seed=0                  the same prompt, seed and options give the same text, whatever other
                        texts are generated with it

applied to the next token's logits in this order, each as in Hugging Face's generate:
repetition_penalty=1.0  1.2: tokens in the context, including <|endoftext|>, are less likely
temperature=0.8         0: always the likeliest token
top_k=50                only the likeliest 50 and those tied with the last of them; null: all
top_p=1.0               0.9: only the fewest likeliest tokens that make up 90 %
min_p=0.0               0.1: only tokens with at least a tenth of the likeliest's probability

top=0                   5: shows at each step the 5 likeliest tokens, with their probability in the
                        model and in the distribution that was sampled
cache=true              keep the keys and values of the context: faster, the same text
device=auto             cpu, mps or cuda; auto: the fastest there is

A prompt follows <|endoftext|>, as documents do in training.  When the context is full, its last
half is kept.  A pipe or a file gets only the texts, with lines <|endoftext|> between them; notes
go to stderr.  A terminal shows control characters of a text as \\x1b.
"""
SIDE_BY_SIDE = 32  # most texts in one forward pass
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
SHOWN = 40  # characters of the text before a step


@dataclass
class Arguments(Sampling):
    run: str = MISSING
    checkpoint: Optional[str] = None
    prompt: str = ""
    prompts: Optional[str] = None
    max_new_tokens: int = key(200, least=1)
    n: int = key(1, least=1)
    seed: int = key(0, least=0)
    top: int = key(0, least=0)
    cache: bool = True
    device: str = key("auto", among=("auto", "cpu", "mps", "cuda"))


class Wanted(NamedTuple):
    """Hold the encoded prompt and the seed of a text to generate."""

    begun: list[int]
    seed: int


def read_prompts(arguments: Arguments) -> list[str]:
    """Return the prompts that the arguments name.  Raises ConfigError."""
    if arguments.prompts is None:
        return [arguments.prompt]
    if arguments.prompt:
        raise ConfigError(f"prompts={arguments.prompts}: either prompt= or prompts=")
    text = cli.read_text("prompts", arguments.prompts)
    if not text:
        raise ConfigError(f"prompts={arguments.prompts}: is empty")
    return text.removesuffix("\n").split("\n")


def notes(run: TrainedRun, prompts: Sequence[str], begun: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield notes on what the model reads differently from the prompts."""
    from tinygpt.model.generate import context_start

    unknown = run.tokenizer.unknown_id
    if unknown is not None and any(unknown in ids for ids in begun):
        characters = sorted({c for c in "".join(prompts) if unknown in run.tokenizer.encode(c)})
        names = ", ".join(map(repr, characters))
        shown = run.tokenizer.decode([unknown])
        yield f"not in the alphabet of this run: {names}; read, and shown, as {shown}"
    if run.tokenizer.convention:
        yield run.tokenizer.convention
    context, longest = run.model.config.max_seq_len, max(map(len, begun))
    if longest > context:
        count = sum(len(ids) > context for ids in begun)
        read = longest - context_start(longest, context)
        yield (
            f"longer than the context of {context} tokens: {count} of {len(begun)} prompts; only "
            f"the end is read, of the longest ({longest} tokens) the last {read}"
        )


def batches(texts: Sequence[Wanted]) -> Iterator[list[int]]:
    """Yield indices of texts whose prompts have equal lengths, to generate side by side."""
    by_length: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        by_length.setdefault(len(text.begun), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), SIDE_BY_SIDE):
            yield indices[start : start + SIDE_BY_SIDE]


class Writer:
    """Generate texts and show them."""

    def __init__(self, run: TrainedRun, arguments: Arguments, console: Console) -> None:
        self.run, self.arguments, self.console = run, arguments, console
        self.tokenizer = run.tokenizer

    def write(self, texts: Sequence[Wanted]) -> None:
        """Stream a single text; generate several side by side and show them in order."""
        if len(texts) == 1 or self.arguments.top:
            for index, text in enumerate(texts):
                self.show_head(index, texts)
                new = self.tokens(text)
                self.show(text.begun, list(new) if self.arguments.top else new)
            return
        done: dict[int, list[int]] = {}
        shown = 0
        for indices in batches(texts):
            columns = [s.tokens.tolist() for s in self.steps([texts[index] for index in indices])]
            done.update(zip(indices, map(list, zip(*columns, strict=True)), strict=True))
            while shown in done:
                self.show_head(shown, texts)
                self.show(texts[shown].begun, done.pop(shown))
                shown += 1

    def steps(self, texts: Sequence[Wanted]) -> Iterator[Step]:
        begun, seeds = [text.begun for text in texts], [text.seed for text in texts]
        length, cache = self.arguments.max_new_tokens, self.arguments.cache
        return self.run.stream(begun, seeds, length, self.arguments, cache)

    def tokens(self, text: Wanted) -> Iterator[int]:
        """Yield the tokens of one text; with ``top`` show the candidates of each."""
        ids = list(text.begun)
        for number, step in enumerate(self.steps([text]), start=1):
            if self.arguments.top:
                before = self.tokenizer.decode(ids[1:])[-SHOWN:]
                where = f"  after {before!r}" if before else "  at the beginning"
                self.console.print(Text.assemble((f"step {number}", "bold"), (where, "dim")))
                self.console.print(self.table(step, ids[1:]), Text())
            ids.append(int(step.tokens))
            yield ids[-1]
            if ids[-1] == self.tokenizer.eot_id:
                return

    def show_head(self, index: int, texts: Sequence[Wanted]) -> None:
        """Show a rule or <|endoftext|> between texts."""
        if self.console.is_terminal and len(texts) > 1:
            title = f"{index + 1} of {len(texts)} · seed {texts[index].seed}"
            self.console.rule(Text(title, "dim"), style="dim")
        elif index:
            self.put(self.tokenizer.decode([self.tokenizer.eot_id]) + "\n")

    def show(self, begun: Sequence[int], new: Iterable[int]) -> None:
        """Show a prompt and its new tokens as they come."""
        spoken = Unfolding(self.tokenizer)
        self.put(spoken.add(begun[1:]), "bold")
        token = None
        for token in new:
            if token == self.tokenizer.eot_id:
                break
            self.put(spoken.add([token]))
        self.put(spoken.rest())
        if self.console.is_terminal and token == self.tokenizer.eot_id:
            self.put(self.tokenizer.decode([token]), "dim")
        self.put("\n")

    def put(self, text: str, style: str = "none") -> None:
        """Print a text verbatim: in a Segment Rich leaves tabs and long lines alone."""
        if self.console.is_terminal:
            text = CONTROL.sub(lambda found: rf"\x{ord(found[0]):02x}", text)
        segment = Segment(text, self.console.get_style(style))
        self.console.print(Segments([segment]), soft_wrap=True, end="")
        if sys.stdout in streams.gone:
            raise SystemExit(0)

    def table(self, step: Step, before: Sequence[int]) -> Table:
        """Return a table of the likeliest tokens, the chosen one and the sum of the others."""

        def percent(probability: Tensor) -> str:
            return f"{probability:.2%}" if probability > 0 else "–"

        model, drawn = step.logits[0].float().softmax(-1), step.filtered[0].float().softmax(-1)
        chosen = int(step.tokens)
        shown = model.topk(min(self.arguments.top, len(model))).indices.tolist()
        shown += [chosen] * (chosen not in shown)
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for name in ("", "rank", "token", "id", "model", "drawn from"):
            table.add_column(name, justify="left" if name in ("", "token") else "right")
        for token in shown:
            mark, style = ("▶", "bold") if token == chosen else ("", None)
            rank = 1 + int((model > model[token]).sum())
            row = [mark, str(rank), self.spelled(token, before), str(token)]
            table.add_row(
                *map(Text, [*row, percent(model[token]), percent(drawn[token])]), style=style
            )
        model[shown] = drawn[shown] = 0
        row = ["", "", f"{len(model) - len(shown):,} others", ""]
        table.add_row(*row, percent(model.sum()), percent(drawn.sum()), style="dim")
        return table

    def spelled(self, token: int, before: Sequence[int] = ()) -> str:
        """Return what a token adds to the text of ``before``, quoted; special tokens unquoted."""
        tokenizer, alone = self.tokenizer, self.tokenizer.decode([token])
        if token in (tokenizer.eot_id, tokenizer.bos_id, tokenizer.unknown_id):
            return alone
        text, longer = (tokenizer.decode([*before[-SHOWN:], *more]) for more in ([], [token]))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, longer))  # noqa: B905
        return repr(longer[len(list(same)) :] or alone)


class Unfolding:
    """Decode a stream of tokens, returning text as soon as it cannot change.

    Each call decodes from the tokens shown before the last, because a decoder may treat the first
    token differently (Llama's drops its space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.sure = 0  # how many of them were shown

    def add(self, ids: Sequence[int]) -> str:
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        return self._shown(text) if self.tokenizer.is_settled(self.ids, text) else ""

    def rest(self) -> str:
        """Return the text that is left at the end."""
        return self._shown(self.tokenizer.decode(self.ids))

    def _shown(self, text: str) -> str:
        before = len(self.tokenizer.decode(self.ids[: self.sure]))
        self.ids, self.sure = self.ids[self.sure :], len(self.ids) - self.sure
        return text[before:]


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE, bare="run")
    prompts = read_prompts(arguments)
    rundir.open_run(arguments.run)
    cli.loading(sys.stderr)
    from tinygpt.runs.load import load_run  # torch: once there is something to load

    run = load_run(arguments.run, arguments.checkpoint, arguments.device)
    cli.loaded()
    begun = [run.encode_prompt(prompt) for prompt in prompts]
    for note in notes(run, prompts, begun):
        print(f"note: {note}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # as text is read
    writer = Writer(run, arguments, Console(highlight=False, markup=False))
    texts = [Wanted(ids, arguments.seed + i) for ids in begun for i in range(arguments.n)]
    try:
        writer.write(texts)
    except signals.Stopped as stopped:
        writer.put("\n")
        raise signals.Stopped(stopped.number, stopped.line.partition(";")[0]) from None


if __name__ == "__main__":
    main()
