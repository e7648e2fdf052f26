"""Run ``python -m tinygpt.evaluate``: score trained runs and set them side by side."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Optional

from rich.console import Console

from tinygpt import cli
from tinygpt.config import ConfigError, RunError
from tinygpt.evaluating.options import Options, find, folder_for, read_tasks, text_name

USAGE = """\
tinygpt evaluate outputs/runs/x [key=value ...]

runs=FOLDER[,FOLDER]    runs, or folders of runs; runs= may be left out
checkpoints=final       for each run: final best last step_N, separated by commas; all: every step
split=val               or test: of the run's own corpus
data=custom data.path=FILE    a file, a folder or a glob instead, all of it, with the run's own
                        tokenizer; data.separator= data.text_column= as in training
stride=TOKENS           each window begins this many tokens after the one before it, and its last
                        stride targets count: each target once, where it has the most context.
                        Default: the windows of training, and so exactly the loss it recorded
baseline=true           also score the same model untrained, initialized by the run's own seed
task=FILE[,FILE]        questions, JSON lines: {"prompt": ..., "answer": ...}, or
                        {"prompt": ..., "choices": [...], "label": 0}, by likelihood as in
                        lm-evaluation-harness: accuracy by the sum, accuracy_norm by the sum per
                        byte.  A space is put in between; a long prompt loses its beginning
quantize=int8           the loss with the weights of linear layers in int8, one scale per row
prune=0.5               the loss without the smallest half of those weights
samples=20 seed=0       text from the model: distinct-n, repetition and KL divergence from the text
                        scored, next to the same amount of real text
device=auto             cpu mps cuda; precision=auto threads=null: as in training
output_dir=FOLDER       default: evaluation/ in the run, or in the folder that holds several runs;
                        split=test and every other text have a subfolder of their own

Efficiency is the gain, ln(vocabulary) - loss, per training FLOP, parameter and hour.  Runs on the
embedded corpus are asked its facts.  Writes evaluation_results.csv and .json, and figures.  Runs
that cannot be scored are named at the end, and the exit code is 1.
"""


@dataclass
class Arguments(Options):
    runs: list[str] = field(default_factory=list)
    output_dir: Optional[str] = None


@cli.one_line_errors
def main() -> None:
    chosen = [word for word in sys.argv[1:] if word.startswith("data=")]
    others = [word for word in sys.argv[1:] if word not in chosen]
    arguments = cli.read_arguments(Arguments, others, USAGE, bare="runs")
    for word in chosen:
        if word != "data=custom":
            raise ConfigError(f"{word}: must be custom; without it the run's own corpus is scored")
    if chosen and arguments.data.path is None:
        raise ConfigError("data.path: must be given, as data.path=FILE, a folder or a glob")
    if not arguments.runs:
        raise ConfigError("runs: must be given, as runs=outputs/runs/x")
    arguments.check()
    read_tasks(arguments.task)
    paths, without = find(arguments.runs)
    text = text_name(arguments.split, arguments.data.path)
    folder = folder_for(paths, arguments.output_dir, text)
    cli.announce("loading")
    console = Console(markup=False)
    with console.status("starting") as status:
        from tinygpt.evaluating import runs, table  # torch takes seconds
        from tinygpt.training.console import folded

        refused: list[str] = []
        tell = status.update if console.is_terminal else cli.announce
        made = runs.evaluate(paths, arguments, tell, refused.append)
        if not made:
            raise ConfigError(refused[0])
        written = table.write(made, folder, dataclasses.asdict(arguments), refused)
        written += table.draw(made, folder)
    table.show(made, console)
    starts = {one.scores["run"]: one.scores["document_start"] for one in made}
    for run, start in starts.items():
        if start is not None:
            print(f"note: {run}: documents start with {start}, as the tokenizer's folder does it")
    for path in without:
        print(f"note: {path} has no checkpoint")
    print("\n" + folded(", ".join([str(written[0]), *(path.name for path in written[1:])]), 2))
    if refused:
        raise RunError(f"{len(refused)} of {len(paths)} runs not scored: {'; '.join(refused)}")


if __name__ == "__main__":
    main()
