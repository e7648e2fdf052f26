"""A report as a list of blocks, and how these look as Markdown, as HTML and on a terminal."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from tinygpt import fileio


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str  # text in backticks is code, here and in items and cells


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
    name: str  # of a figure beside the report, without ending
    caption: str


Block = Heading | Paragraph | Code | Items | Table | Picture

CSS = """
body { font: 16px/1.5 Georgia, 'Times New Roman', serif; max-width: 46em; margin: 2em auto;
  padding: 0 1em; color: #222; background: #fff; }
h1, h2, th, figcaption { font-family: Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.8em; }
table { border-collapse: collapse; font-size: .85em; margin: 1em 0; display: block;
  overflow-x: auto; }
th, td { text-align: left; padding: .25em .9em .25em 0; vertical-align: top; }
thead th { border-top: 1.5px solid; border-bottom: .75px solid; }
tbody tr:last-child td { border-bottom: 1.5px solid; }
pre { background: #f5f5f3; padding: .7em 1em; overflow-x: auto; }
code, pre { font: .85em Menlo, Consolas, monospace; }
figure { margin: 1.5em 0; } img { max-width: 100%; }
figcaption { font-size: .8em; color: #444; }
td.fail { color: #b03000; font-weight: bold; }
"""
FAIL = "FAIL"
WIDTH = 100  # of what is printed, at most


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
        case Table(header, rows):
            ruled = [header, ["---"] * len(header), *rows]
            cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in ruled]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def page(blocks: Sequence[Block], folder: Path) -> str:
    """Return the report as one HTML file that needs no other: the figures are in it."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Items(lines):
            return f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in lines)}</ul>"
        case Table(header, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
            return f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"
        case Picture(name, caption):
            png = (folder / f"{name}.png").read_bytes()
            width = int.from_bytes(png[16:20], "big") // 2  # pixels: twice as fine as the page
            return (
                f'<figure><img width="{width}" alt="{html.escape(caption)}" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )


def _cell(text: str) -> str:
    kind = ' class="fail"' if text == FAIL else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def show(blocks: Iterable[Block], folder: Path, console: Console | None = None) -> None:
    """Print the report without its figures, and its path."""
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
                table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
                for name in header:
                    whole = name == header[0]  # the names of the rows are not broken
                    table.add_column(Text(name), header_style="dim", overflow="fold", no_wrap=whole)
                for row in rows:
                    table.add_row(*(_plain(cell, "red" if cell == FAIL else "") for cell in row))
                console.print(table)
        if not isinstance(block, Heading | Picture):
            console.print()
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _plain(text: str, style: str = "") -> Text:
    return Text(text.replace("`", ""), style=style)
