"""Read the options, runs, output folder and questions of an evaluation.

Nothing here imports torch or numpy, so that a mistake is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from tinygpt import fileio
from tinygpt.config import PRECISIONS, ConfigError, checks, key
from tinygpt.runs import rundir


@dataclass
class OtherText:
    """Name a text to score instead of the run's own, with the keys of ``data=custom``."""

    path: Optional[str] = None
    separator: str = "auto"
    text_column: str = "auto"
    encoding: Optional[str] = None
    delimiter: Optional[str] = None
    header: Optional[bool] = None


@dataclass
class Options:
    """Hold what is computed for each run, and on which device."""

    checkpoints: list[str] = field(default_factory=list)  # empty: final, or last if unfinished
    split: str = key("val", among=("val", "test"))
    data: OtherText = field(default_factory=OtherText)
    stride: Optional[int] = key(None, least=1)  # null: the context
    baseline: bool = False
    task: list[str] = field(default_factory=list)
    quantize: Optional[str] = key(None, among=("int8",))
    prune: Optional[float] = key(None, above=0.0, below=1.0)
    samples: int = key(0, least=0)
    seed: int = key(0, least=0)  # of the samples
    device: str = key("auto", among=("auto", "cpu", "mps", "cuda"))
    precision: str = key("auto", among=PRECISIONS)  # auto: as in training
    threads: Optional[int] = key(None, least=1, most=4096)  # null: as in training
    cache_dir: Optional[str] = None

    def check(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        checks.check_text(self.data)
        for name, default in vars(OtherText()).items():
            value = getattr(self.data, name)
            if self.data.path is None and value != default:
                raise ConfigError(f"data.{name}={value}: needs data.path=")
        if "all" in self.checkpoints and len(self.checkpoints) > 1:
            raise ConfigError(f"checkpoints={','.join(self.checkpoints)}: all includes the others")


def find(runs: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the runs in ``runs``, folders of runs or run folders, and those without a checkpoint.

    Raises ConfigError if there is nothing to score.
    """
    ready: list[Path] = []
    without: list[Path] = []
    for name in runs:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ConfigError(f"runs={name}: no such folder")
        inside = rundir.find_runs(path)
        if not inside:
            raise rundir.no_runs(path)
        for one in inside:
            (ready if rundir.RunDir(one).kept() else without).append(one)
        if path in without:
            raise ConfigError(f"runs={name}: has no checkpoint")
    if not ready:
        raise ConfigError(f"runs={','.join(map(str, runs))}: none of them has a checkpoint")
    return list(dict.fromkeys(ready)), without


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-length:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return names


def text_name(split: str, path: str | None) -> str:
    """Return the subfolder of ``evaluation/`` for a text, empty for the validation split."""
    if path is None:
        return "" if split == "val" else split
    place = os.path.abspath(os.path.expanduser(path))
    name = re.sub("[^A-Za-z0-9._-]+", "-", os.path.basename(place)).strip(".-") or "text"
    return f"{name[:60]}-{fileio.digest(place)[:6]}"  # tells files of the same name apart


def folder_for(paths: Sequence[Path], output_dir: str | None, text: str = "") -> Path:
    """Return where results go: ``evaluation/`` in the run, or in the folder that holds them all.

    Raises ConfigError if it cannot be written.
    """
    if output_dir is None:
        if len({path.is_absolute() for path in paths}) > 1:
            paths = [path.absolute() for path in paths]
        parents = [path.parent for path in paths] if len(paths) > 1 else paths
        output_dir = os.path.join(os.path.commonpath(parents), "evaluation", text)
    folder = Path(output_dir).expanduser()
    fileio.check_writable("output_dir", folder)
    return folder


@dataclass(frozen=True)
class Question:
    """Hold a prompt and what may follow it: several choices, or the one answer of a cloze."""

    prompt: str
    choices: list[str]
    label: int = 0

    @property
    def is_cloze(self) -> bool:
        return len(self.choices) == 1


@dataclass(frozen=True)
class Task:
    """Hold the questions of a file, either all cloze or all multiple choice."""

    name: str
    questions: list[Question]


def read_tasks(paths: list[str]) -> list[Task]:
    """Read several files.  Raises ConfigError as ``read_task`` does, or if two share a name."""
    tasks: dict[str, Task] = {}
    for task in (read_task(Path(path).expanduser()) for path in paths):
        if task.name in tasks:
            raise ConfigError(f"task={','.join(paths)}: two files named {task.name}")
        tasks[task.name] = task
    return list(tasks.values())


def read_task(path: Path) -> Task:
    """Read a JSON lines file.  Raises ConfigError, with the line number, for a bad question."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"task={path}: not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"task={path}: cannot be read ({error.strerror})") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(fileio.parse_json(line)))
            if questions[-1].is_cloze != questions[0].is_cloze:
                raise ValueError("must have answer or choices as line 1 does")
        except ValueError as error:
            raise ConfigError(f"task={path}: line {number}: {error}") from error
    if not questions:
        raise ConfigError(f"task={path}: has no questions")
    return Task(path.stem, questions)


def _question(row: Any) -> Question:
    """Return the question in a row.  Raises ValueError if there is none."""
    keys = set(row) if isinstance(row, dict) else set()
    if not keys >= {"prompt", "answer"} and not keys >= {"prompt", "choices", "label"}:
        raise ValueError("must have prompt and answer, or prompt, choices and label")
    prompt, is_cloze = row["prompt"], "answer" in row
    choices = [row["answer"]] if is_cloze else row["choices"]
    label = 0 if is_cloze else row["label"]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r:.40}: must be text")
    if not isinstance(choices, list) or not (is_cloze or len(choices) > 1):
        raise ValueError(f"choices={choices!r:.40}: must be a list of two or more texts")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{'answer' if is_cloze else 'choices'}: {choice!r:.40} is not text")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"label={label!r:.40}: must be from 0 to {len(choices) - 1}")
    return Question(prompt, choices, label)
