"""Render a report, a list of blocks, as Markdown, as HTML and on a terminal."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from tinygpt import fileio
from tinygpt.scaling import interactive


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str  # may have `code` and [links](path) as in Markdown; so may items and cells


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    name: str  # of a file beside the report, without .png
    caption: str
    live: dict[str, Any] | None = None  # the traces of an interactive one


@dataclass(frozen=True)
class Folded:
    """Hold blocks that a reader can unfold; the terminal prints only their title."""

    title: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Code | Items | Table | Picture | Folded

# A target is an anchor or a path, never a URL with a scheme: names of runs come from outside.
LINK = re.compile(r"\[([^\[\]]*)\]\((#?[\w./%-]+)\)")
# The page loads nothing from elsewhere.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
FAIL = "FAIL"
WIDTH = 100  # characters of a printed line, at most


def write(blocks: Sequence[Block], folder: Path) -> list[str]:
    """Write report.md and report.html beside the figures, and return their names."""
    fileio.write_text(folder / "report.md", markdown(blocks))
    fileio.write_text(folder / "report.html", page(blocks, folder))
    return ["report.md", "report.html"]


def markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            return f"```\n{text}\n```"
        case Items(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Picture(name, caption):
            return f"![{name}]({name}.png)\n\n{caption}"
        case Folded(title, blocks):
            inner = markdown(blocks)
            return f"<details><summary>{html.escape(title)}</summary>\n\n{inner}\n</details>"
        case Table(header, rows):
            ruled = [header, ["---"] * len(header), *rows]
            cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in ruled]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def page(blocks: Sequence[Block], folder: Path) -> str:
    """Return the report as a self-contained HTML page, with the figures from ``folder`` in it."""
    headings = [block for block in blocks if isinstance(block, Heading)]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = [one.text for one in headings if one.level == 2]
    links = "".join(f'<li><a href="#{slug(text)}">{_inline(text)}</a></li>' for text in sections)
    parts = [_html(block, folder) for block in blocks]
    parts.insert(1, f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if links else "")
    body = "\n".join(parts)
    figures = {one.name: one.live for one in blocks if isinstance(one, Picture) and one.live}
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(headings[0].text)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{interactive.script(figures)}</body>\n</html>\n"
    )


def slug(text: str) -> str:
    """Return the anchor of a heading, the same as on GitHub."""
    return re.sub(r"[^\w-]", "", text.lower().replace(" ", "-"))


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{slug(text)}">{_inline(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Items(lines):
            return f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in lines)}</ul>"
        case Folded(title, blocks):
            inner = "\n".join(_html(one, folder) for one in blocks)
            return f"<details><summary>{_inline(title)}</summary>\n{inner}\n</details>"
        case Table(header, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            head = f"<thead><tr>{top}</tr></thead>\n" if any(header) else ""
            marks = {FAIL: ' class="fail"'}
            cells = [[f"<td{marks.get(c, '')}>{_inline(c)}</td>" for c in row] for row in rows]
            body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in cells)
            return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
        case Picture(name, caption, live):
            png = (folder / f"{name}.png").read_bytes()
            width = int.from_bytes(png[16:20], "big") // 2  # pixels of the page: half the image's
            mark = f' data-figure="{html.escape(name)}"' if live else ""
            return (
                f'<figure{mark}><img width="{width}" alt="{html.escape(caption)}" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )


def _inline(text: str) -> str:
    text = html.escape(text).replace(" %", "\u00a0%")
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return LINK.sub(r'<a href="\2">\1</a>', text)


def show(blocks: Iterable[Block], folder: Path, console: Console | None = None) -> None:
    """Print the report without its figures, then its path."""
    console = console or Console(highlight=False, markup=False)
    console.width = min(console.width, WIDTH)
    for block in blocks:
        match block:
            case Heading(text, level):
                console.print(Text(text, style="bold" if level > 1 else "bold underline"))
            case Paragraph(text):
                console.print(_plain(text))
            case Code(text):
                console.print(Padding(Text(text, style="cyan"), (0, 0, 0, 2), expand=False))
            case Items(lines):
                for line in lines:
                    console.print(Padding(_plain(line), (0, 0, 0, 2), expand=False))
            case Table(header, rows):
                table = RichTable(box=None, show_header=any(header), pad_edge=False)
                table.padding = (0, 2, 0, 0)
                for at, name in enumerate(header):
                    whole = at == 0  # names of rows are not broken
                    table.add_column(Text(name), header_style="dim", overflow="fold", no_wrap=whole)
                for row in rows:
                    table.add_row(*(_plain(cell, "red" if cell == FAIL else "") for cell in row))
                console.print(table)
            case Folded(title):
                console.print(f"{_plain(title)}: in the report")
        if not isinstance(block, Heading | Picture):
            console.print()
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _plain(text: str, style: str = "") -> Text:
    return Text(LINK.sub(r"\1", text.replace("`", "").replace("**", "")), style=style)
