"""Files of questions (JSON lines), read and checked.  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.config import ConfigError
from tinygpt.fileio import parse_json


@dataclass(frozen=True)
class Item:
    """A prompt and what may follow it; of a cloze, ``choices`` is its answer alone."""

    prompt: str
    choices: list[str]
    label: int = 0


@dataclass(frozen=True)
class Task:
    """A file of questions, all of one kind; ``is_cloze``: each with its one answer."""

    name: str
    items: list[Item]
    is_cloze: bool


def read_tasks(paths: list[str]) -> list[Task]:
    """Raises ConfigError, naming file and line, for what is no question; for two of one name."""
    tasks = [read_task(Path(path).expanduser()) for path in paths]
    for n, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:n]]:
            raise ConfigError(f"task={','.join(paths)}: two files named {task.name}")
    return tasks


def read_task(path: Path) -> Task:
    """Raises ConfigError, naming file and line, for what is no question."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"task={path}: not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"task={path}: cannot be read ({error.strerror})") from error
    items: list[Item] = []
    kinds: list[bool] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item, is_cloze = _item(parse_json(line))
        except ValueError as error:
            raise ConfigError(f"task={path}: line {number}: {error}") from error
        items.append(item)
        kinds.append(is_cloze)
        if is_cloze != kinds[0]:
            raise ConfigError(f"task={path}: line {number}: has answer or choices unlike line 1")
    if not items:
        raise ConfigError(f"task={path}: has no questions")
    return Task(path.stem, items, kinds[0])


def _item(row: Any) -> tuple[Item, bool]:
    """Raises ValueError for what is not one."""
    keys = set(row) if isinstance(row, dict) else set()
    if not keys >= {"prompt", "answer"} and not keys >= {"prompt", "choices", "label"}:
        raise ValueError("must have prompt and answer, or prompt, choices and label")
    prompt, is_cloze = row["prompt"], "answer" in row
    choices = [row["answer"]] if is_cloze else row["choices"]
    label = 0 if is_cloze else row["label"]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r:.40}: must be a text")
    if not isinstance(choices, list) or not (is_cloze or len(choices) > 1):
        raise ValueError(f"choices={choices!r:.40}: must be a list of two or more texts")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{'answer' if is_cloze else 'choices'}: {choice!r:.40} is no text")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"label={label!r:.40}: must be from 0 to {len(choices) - 1}")
    return Item(prompt, choices, label), is_cloze
