"""What was read of a corpus and what was left out, so that nothing is skipped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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

    def restart(self) -> None:
        """Forget what was counted while the text was read, which begins anew."""
        self.formats.clear()
        self.documents = self.empty_documents = self.values_not_text = 0

    def facts(self) -> dict[str, Any]:
        """Return the fields as ``index.json`` keeps them."""
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Survey:
        """Return the survey that ``facts`` came from."""
        counters = {name: Counter(facts[name]) for name in ("skipped", "formats")}
        return cls(**{**facts, **counters})

    def lines(self) -> list[str]:
        """Return what a command prints: what was read, what was left out, which column it was."""
        read = [_many(self.files, "file")] if self.files else []
        left_out = [_many(self.empty_documents, "empty document")] if self.empty_documents else []
        if self.values_not_text:
            left_out.append(_many(self.values_not_text, "value") + " not text")
        left_out = counted(self.skipped) + left_out
        skipped = f"; skipped {', '.join(left_out)}" if left_out else ""
        found = [f"text: {', '.join([*read, _many(self.documents, 'document')])}{skipped}"]
        formats = "; ".join(self.formats)
        if self.text_column is not None:
            others = f" (not {', '.join(self.other_columns)})" if self.other_columns else ""
            found.append(f"text column: {self.text_column}{others}{formats and '; '}{formats}")
        elif formats:
            found.append(f"format: {formats}")
        return found


def results(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what ``results.json`` says of a survey; all null for a corpus that is not read."""
    names = (
        *("text_files", "text_files_skipped", "text_column", "text_columns_other", "text_formats"),
        *("documents_read", "documents_empty", "values_not_text"),
    )
    if facts is None:
        return dict.fromkeys(names)
    survey = Survey.read(facts)
    values = (
        survey.files or None,
        ", ".join(counted(survey.skipped)) or None,
        survey.text_column,
        ", ".join(survey.other_columns) or None,
        "; ".join(survey.formats) or None,
        *(survey.documents, survey.empty_documents, survey.values_not_text),
    )
    return dict(zip(names, values, strict=True))


SHOWN = 8  # reasons


def counted(skipped: Counter[str]) -> list[str]:
    """Return ``2 .png``, ``1 empty file`` ..., the most frequent first."""
    several = skipped.most_common()
    found = [_many(count, reason) for reason, count in several[:SHOWN]]
    rest = sum(count for _, count in several[SHOWN:])
    return found + ([f"{_many(rest, 'other')}"] if rest else [])


def _many(count: int, thing: str) -> str:
    is_suffix = thing.startswith(".") or thing == "without suffix"
    return f"{count:,} {thing}{'s' * (count != 1 and not is_suffix)}"
