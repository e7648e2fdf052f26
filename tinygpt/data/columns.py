"""Choose the text column of a table and read the text of each row."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tinygpt.config import ConfigError
from tinygpt.data.readers import HEAD_CHARACTERS, HEAD_ROWS, Row
from tinygpt.data.survey import Survey

WORDY = 0.5  # a column is prose if at least this share of its values has several words
SHOWN = 12  # names in a message
TURNS = (("role", "content"), ("from", "value"))  # the fields of one turn of a chat
FILE = re.compile(r"[\w ./\\-]+\.\w{1,5}")
NULLS = ("NA", "NULL", "NaN", r"\N")  # as R, SQL, pandas and Postgres write an empty cell
# Text in another column is an error if a row without the chosen one has LONG characters of it, or
# if more than the share MANY of all rows have their text there.
LONG, MANY = 80, 0.05
_MISSING = object()


class Choice(NamedTuple):
    """Hold the text columns; the texts of several are joined by blank lines."""

    columns: list[str]
    others: list[str]  # up to SHOWN text columns that were not chosen
    is_asked: bool

    def __str__(self) -> str:
        return " + ".join(self.columns)


def head_of(rows: Iterator[Row], asked: str = "auto") -> list[Row]:
    """Return enough of the first rows to choose a column from."""
    head, size, found = list[Row](), 0, False
    names = ["text"] if asked == "auto" else _asked(asked)
    for row in itertools.islice(rows, HEAD_ROWS):
        head.append(row)
        found = found or all(isinstance(_value(row, name), str) for name in names)
        size += sum(_size(value) + 8 for value in row.values())
        if (found and len(head) >= 100) or size > HEAD_CHARACTERS:
            break
    return head


def choose(head: Sequence[Row], asked: str, where: str, first: Choice | None = None) -> Choice:
    """Return the columns that ``asked`` names, or find the text column if it is ``auto``.

    ``auto`` takes ``first``, the choice for an earlier file, if it holds text here too; then a
    column called ``text`` in any case; then the prose column with the most characters.  Labels,
    ids, links, numbers and constants are not prose.  Raises ConfigError if no column qualifies or
    if lists, structs or chats hold more text.
    """
    names = list(dict.fromkeys(name for row in head for name in row))
    texts = {name: [row[name] for row in head if isinstance(row.get(name), str)] for name in names}
    lengths = {name: sum(map(len, values)) for name, values in texts.items() if values}

    def chosen(columns: list[str]) -> Choice:
        others = [name for name in lengths if lengths[name] and name not in columns]
        return Choice(columns, others[:SHOWN], is_asked=asked != "auto")

    if asked != "auto" or not head:
        for column in _asked(asked) if head else ():
            _check(column, head, names, where)
        return chosen(_asked(asked))
    if first is not None and all(texts.get(name) for name in first.columns):
        return chosen(first.columns)
    prose = {name: lengths[name] for name in lengths if _is_prose(texts[name])}

    def is_ids(name: str) -> bool:
        """Return whether a column called text holds file names, or ids beside longer prose."""
        filled = [value for value in texts[name] if value.strip()]
        is_short = max(prose.values(), default=0) > 4 * lengths.get(name, 0)
        is_files = len(lengths) > 1 and all(map(FILE.fullmatch, filled))
        return bool(filled) and (is_files or (is_short and not any(map(_is_wordy, filled))))

    by_name = [
        name
        for name in names
        if name.casefold() == "text"
        and (texts[name] or all(row.get(name) is None for row in head))
        and not is_ids(name)
    ]
    if by_name:
        return chosen(["text" if "text" in by_name else by_name[0]])
    if len(names) == 1 and lengths:
        prose = lengths
    nested = Counter[str]()
    for row in head:
        for name, value in row.items():
            if not isinstance(value, str):
                for leaf, size in _leaves(name, value):
                    nested[leaf] += size
    best = max(prose, key=lambda name: prose[name], default=None)
    inner = max(nested, key=lambda name: nested[name], default=None)
    key = f"data.text_column=auto: {where}"
    if inner is not None and nested[inner] > (0 if best is None else prose[best]):
        beside = "" if best is None else f", more than in {best}"
        other = "" if best is None else f" or data.text_column={best}"
        raise ConfigError(
            f"{key}: most text is inside {inner}{beside}; give data.text_column={inner}{other}"
        )
    if best is None:
        raise ConfigError(
            f"{key} has no text column; it has {_shown(names)}; data.text_column= takes any of them"
        )
    return chosen([best])


def _asked(asked: str) -> list[str]:
    if asked[:1] == "[" and asked[-1:] == "]":
        return [name.strip().strip("'\"") for name in asked[1:-1].split(",")]
    return [asked]


def _check(column: str, head: Sequence[Row], names: list[str], where: str) -> None:
    """Raise ConfigError if the column is missing or holds no text in any row."""
    key = f"data.text_column={column}: {where}"
    there = [(n, v) for n, row in enumerate(head, 1) if (v := _value(row, column)) is not _MISSING]
    if not there:
        raise ConfigError(f"{key} has no such column; it has {_shown(names)}")
    filled = [(number, value) for number, value in there if value is not None]
    if filled and all(_text(value, key, number) is None for number, value in filled):
        number, value = filled[0]
        raise ConfigError(f"{key}: holds no text but {value!r:.40} (row {number})")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _is_prose(values: list[str]) -> bool:
    """Return whether the values vary and are mostly not labels, ids, links or numbers."""
    different, count = len(set(values)), len(values)
    is_short = sum(map(len, values)) < 40 * count
    enough, few = (6, count / 2) if is_short else (20, count / 20)
    if (count > 1 and different == 1) or (count >= enough and different <= few):
        return False
    filled = [value for value in values if value.strip()]
    return sum(map(_is_wordy, filled)) >= WORDY * len(filled) > 0


def _is_wordy(value: str) -> bool:
    """Return whether a value has several words, or is text in a script without spaces."""
    value = value.strip()
    if re.match(r"[a-z]+://\S*$|[\w./\\-]+$", value, re.IGNORECASE | re.ASCII):
        return False
    letters = sum(character.isalpha() for character in value)
    return letters * 3 > len(value) and (len(value.split()) > 1 or not value.isascii())


def _leaves(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of characters of each field of a struct, or of the value."""
    if isinstance(value, dict) and not _turns(value):
        for key, inner in value.items():
            if isinstance(inner, str):
                yield f"{name}.{key}", len(inner) if _is_wordy(inner) else 0
            else:
                yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, _size(value)


def _size(value: Any) -> int:
    """Return the number of characters in a value, at any depth."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, bytes):
        try:
            return 0 if b"\0" in value else len(value.decode())
        except UnicodeDecodeError:
            return 0
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _value(row: Any, column: str) -> Any:
    """Return the value at a name or path such as ``a.b.c``; for a list, that of each element."""
    if isinstance(row, list):
        found = [_value(one, column) for one in row]
        return _MISSING if all(one is _MISSING for one in found) else found
    if not isinstance(row, dict):
        return _MISSING
    for name in (column, *prefixes(column)):
        if name in row:
            rest = column[len(name) + 1 :]
            return _value(row[name], rest) if rest and row[name] is not None else row[name]
    return _MISSING


def prefixes(column: str) -> list[str]:
    """Return the table columns that may contain the path: ``a``, ``a.b`` and ``a.b.c``."""
    return list(itertools.accumulate(column.split("."), "{}.{}".format))


def texts(rows: Iterator[Row], choice: Choice, where: str, survey: Survey) -> Iterator[str]:
    """Yield the text of each row, empty if it is null; count and skip values that are not text.

    The strings of a list become lines.  The turns of a chat, ``{role, content}`` or
    ``{from, value}``, become paragraphs ``role: content``.  Raises ConfigError, naming the row,
    for a struct, for bytes that are not UTF-8, and if many rows have their text in another column.
    """
    number, with_text = 0, 0
    beside, instead, samples = Counter[str](), Counter[str](), dict[str, list[str]]()

    def refuse(rows: str, name: str) -> ConfigError:
        return ConfigError(
            f"data.text_column=auto: {where}: {rows} no {choice} but a text in {name}; "
            f"data.text_column=[{','.join([*choice.columns, name])}] takes whichever a row has, "
            f"data.text_column={choice} only its own"
        )

    for number, row in enumerate(rows, start=1):
        values = [(c, v) for c in choice.columns if (v := _value(row, c)) is not _MISSING]
        filled = [(column, value) for column, value in values if value is not None]
        found = [_text(v, f"data.text_column={c}: {where}", number) for c, v in filled]
        found = ["" if text in NULLS else text for text in found]
        survey.values_not_text += found.count(None)
        if not choice.is_asked:
            with_text += any(found)
            for name, value in row.items():
                if not isinstance(value, str) or not value:
                    continue
                if not values and len(value) >= LONG and _is_wordy(value):
                    raise refuse(f"row {number} has", name)
                if any(found):
                    beside[name] += 1
                elif _is_wordy(value):
                    instead[name] += 1
                    if instead[name] <= HEAD_ROWS:
                        samples.setdefault(name, []).append(value[:LONG])
        if not filled or found.count(None) < len(found):
            yield "\n\n".join(text for text in found if text)
    for name, count in instead.items():
        is_other_name = count > number * MANY and beside[name] * 2 <= with_text
        if is_other_name and _is_prose(samples[name]):
            raise refuse(f"{count:,} of {number:,} rows have", name)


def _text(value: Any, key: str, number: int) -> str | None:
    """Return the text of a value, or None for numbers, booleans and lists of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key}: row {number} holds bytes that are not UTF-8") from error
    if isinstance(value, dict):
        if turns := _turns(value):
            return "\n\n".join(filter(None, map(_message, turns)))
        if (said := _message(value)) is not None:
            return said
        leaves = [leaf for leaf, size in _leaves("", value) if size]
        column = key.partition("=")[2].partition(":")[0]
        raise ConfigError(
            f"{key}: row {number} holds a struct of {_shown([*map(str, value)])}; name one, as "
            f"data.text_column={column}{(leaves or ['.' + next(iter(value), 'field')])[0]}"
        )
    if isinstance(value, list | tuple):
        parts = [_text(one, key, number) for one in value if one is not _MISSING]
        found = [part for part in parts if part is not None]
        if {str, dict} <= set(map(type, value)):  # a sentence with links in it
            return "".join(found)
        if any(isinstance(one, dict) for one in value):  # a chat
            return "\n\n".join(filter(None, found))
        return "\n".join(found) if found or not value else None
    return None


def _turns(value: Row) -> list[Row]:
    """Return the turns of a chat stored as a list of roles and a list of contents."""
    for names in TURNS:
        lists = [value.get(name) for name in names]
        if all(isinstance(one, list) for one in lists):
            return [dict(zip(names, turn, strict=False)) for turn in zip(*lists, strict=False)]
    return []


def _message(value: Row) -> str | None:
    """Return ``role: content`` for a turn of a chat, None for any other struct."""
    for role, content in TURNS:
        if role in value and content in value:
            said = value[content]
            if isinstance(said, list):  # parts, {type: text, text: ...}
                pieces = [one.get("text") if isinstance(one, dict) else one for one in said]
                said = "\n".join(piece for piece in pieces if isinstance(piece, str))
            if said is None or isinstance(said, str):
                return f"{value[role]}: {said or ''}".rstrip()
    if isinstance(value.get("type"), str) and isinstance(value.get("text"), str):
        return str(value["text"])
    return None


def chosen_before(head: Sequence[Row], asked: str) -> str:
    """Return the column that version 0.1 chose; with any other, the documents differ."""
    if asked != "auto":
        return asked
    lengths = Counter[str]()
    for row in head[:100]:
        for name, value in row.items():
            if isinstance(value, str):
                lengths[name] += len(value)
    return "text" if "text" in lengths else max(lengths, key=lambda n: lengths[n], default="")
