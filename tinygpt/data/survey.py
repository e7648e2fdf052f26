"""What was read of a corpus and what was left out, so that nothing is skipped silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Survey:
    """Counts kept while a corpus is read; they end up in ``index.json`` and ``results.json``."""

    files: int = 0  # read
    skipped: Counter[str] = field(default_factory=Counter)  # reason or suffix -> files
    formats: Counter[str] = field(default_factory=Counter)  # what was detected -> files
    text_column: str | None = None
    other_columns: list[str] = field(default_factory=list)  # of text, not chosen
    documents: int = 0
    empty_documents: int = 0
    values_not_text: int = 0  # numbers, booleans and NaN in the text column, skipped
