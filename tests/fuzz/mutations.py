"""Damage to a valid input: by its structure where it has one, by its bytes always.

What finds faults in a reader is a file that is nearly right.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, -(2**63), 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "0", "-1", "null", "nan", "\ud800", "\0", "é" * 9),
    *("a\nb", "../../x", "/", "~", "<|endoftext|>", "${oc.env:HOME}", "???", "a,b", '"', "\ufeff"),
    *([], {}, [[]], [{}], [None], {"": None}, ["a", "a"], [0, 0.0]),
]
WORDS = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n\n", b"\r\n", b'"'),
    *(b'""', b",", b"{", b"}", b"[", b"]", b"[" * 3000, b"x" * 5000, b"=", b"${", b"'", b"\\"),
    *(b"null", b"nan", b"1e999", b"-1", b"9" * 5000, b"\\ud800", b"<|endoftext|>", b"\x1b[2J"),
    *(b"+", b"~", b"@", b":", b"_target_", b"hydra.", b"- ", b"? ", b"&a", b"*a"),
]


def mutated(data: bytes, random: Random, kind: str) -> bytes:
    """Another input of ``kind`` (a key of KINDS), changed in one to four places."""
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        data = (KINDS[kind] if random.random() < 0.7 else of_bytes)(data, random)
    return data


def of_bytes(data: bytes, random: Random) -> bytes:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    match random.randrange(7):
        case 0:
            return data[:first]
        case 1:
            return data[:first] + data[last:]
        case 2:
            return data[:last] + data[first:]
        case 3:
            return data[:first] + random.choice(WORDS) + data[first:]
        case 4:
            return data[:first] + random.choice(WORDS) + data[last:]
        case 5:
            return data[:first] + random.randbytes(random.randrange(1, 9)) + data[first:]
        case _:
            changed = bytearray(data or b"x")
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
            return bytes(changed)


def of_tree(value: Any, random: Random) -> Any:
    """One node of nested lists and tables taken away, doubled, renamed or given another value."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        if type(value) in (int, float) and random.random() < 0.5:
            return value * random.choice((-1, 0, 2)) + random.choice((-1, 0, 1))
        if isinstance(value, str) and random.random() < 0.5:
            return of_bytes(value.encode("utf-8", "replace"), random).decode("utf-8", "replace")
        return random.choice(VALUES)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    place = random.randrange(len(items))
    name, inner = items[place]
    action = random.random()
    if action < 0.7:
        items[place] = (name, of_tree(inner, random))
    elif action < 0.8:
        del items[place]
    elif action < 0.9:
        items.insert(place, (random.choice(["", "x", "_target_", *map(str, value)]), inner))
    else:
        items[place] = (name, random.choice(items)[1])
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]


def of_json(data: bytes, random: Random) -> bytes:
    try:
        changed = of_tree(json.loads(data), random)
        text = json.dumps(changed, ensure_ascii=random.random() < 0.5)
    except (ValueError, RecursionError):
        return of_bytes(data, random)
    return text.encode("utf-8", "surrogatepass")


def of_yaml(data: bytes, random: Random) -> bytes:
    try:
        value = yaml.load(data, Loader=yaml.CSafeLoader)
        text = yaml.dump(of_tree(value, random), Dumper=yaml.CSafeDumper)
        return str(text).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return of_bytes(data, random)


def by_line(change: Callable[[bytes, Random], bytes]) -> Callable[[bytes, Random], bytes]:
    """A line changed, taken away, doubled or moved."""

    def of_lines(data: bytes, random: Random) -> bytes:
        lines = data.split(b"\n")
        place = random.randrange(len(lines))
        match random.randrange(6):
            case 0:
                del lines[place]
            case 1:
                lines.insert(random.randrange(len(lines)), lines[place])
            case _:
                lines[place] = change(lines[place], random)
        return b"\n".join(lines)

    return of_lines


def of_csv(data: bytes, random: Random) -> bytes:
    """A cell changed, one too many or too few, a column doubled."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
    except (ValueError, csv.Error):
        return of_bytes(data, random)
    row = random.choice(rows) if rows else []
    place = random.randrange(len(row) + 1)
    match random.randrange(5):
        case 0:
            del row[place:]
        case 1:
            row.insert(place, str(random.choice(VALUES)))
        case 2:
            for one in rows:
                one.insert(place, one[-1] if one else "")
        case _:
            row[place : place + 1] = [str(random.choice(VALUES))]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=random.choice(("\n", "\r\n"))).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def of_zip(data: bytes, random: Random) -> bytes:
    """A member changed, its checksum being right again: what torch saves."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = {name: packed.read(name) for name in packed.namelist()}
    except Exception:  # whatever a broken archive leads zipfile to
        return of_bytes(data, random)
    pickles = [name for name in members if name.endswith(".pkl")]
    name = random.choice(pickles if pickles and random.random() < 0.7 else [*members, "x"])
    members[name] = of_bytes(members.get(name, b""), random)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in members.items():
            packed.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def of_safetensors(data: bytes, random: Random) -> bytes:
    """The header changed as the JSON that it is, with its length."""
    size = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + size], random)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "bytes": of_bytes,
    "lines": by_line(of_bytes),
    "json": of_json,
    "jsonl": by_line(of_json),
    "yaml": of_yaml,
    "csv": of_csv,
    "zip": of_zip,
    "safetensors": of_safetensors,
}
