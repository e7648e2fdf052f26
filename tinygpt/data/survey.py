"""Count what is read and skipped of a corpus, so that nothing is skipped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 8  # reasons in a message


@dataclass
class Survey:
    """Hold the counts for ``index.json`` and ``results.json``."""

    files: int = 0  # read
    skipped: Counter[str] = field(default_factory=Counter)  # files by reason or suffix
    formats: Counter[str] = field(default_factory=Counter)  # files by detected format
    text_column: str | None = None
    other_columns: list[str] = field(default_factory=list)  # text columns that were not chosen
    documents: int = 0
    empty_documents: int = 0
    values_not_text: int = 0  # numbers, booleans and NaN in the text column

    def restart(self) -> None:
        """Reset what is counted while the text is read."""
        self.formats.clear()
        self.documents = self.empty_documents = self.values_not_text = 0

    def facts(self) -> dict[str, Any]:
        """Return the fields as ``index.json`` keeps them."""
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Survey:
        """Return the survey with these ``facts``."""
        values: dict[str, Any] = dict(facts)
        values |= {k: Counter(v) for k, v in facts.items() if isinstance(v, dict)}
        return cls(**values)

    def lines(self) -> list[str]:
        """Return the lines that commands print on files, text column and format."""
        read = [many(self.files, "file")] if self.files else []
        skipped = counted(self.skipped)
        if self.empty_documents:
            skipped.append(many(self.empty_documents, "empty document"))
        if self.values_not_text:
            skipped.append(many(self.values_not_text, "value") + " not text")
        beside = f"; skipped {', '.join(skipped)}" if skipped else ""
        found = [f"text: {', '.join([*read, many(self.documents, 'document')])}{beside}"]
        formats = "; ".join(self.formats)
        if self.text_column is not None:
            others = f" (not {', '.join(self.other_columns)})" if self.other_columns else ""
            found.append(f"text column: {self.text_column}{others}{formats and '; '}{formats}")
        elif formats:
            found.append(f"format: {formats}")
        return found


def results(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entries of ``results.json``; all None for a corpus without a survey."""
    survey = Survey.read(facts or {})
    values = {
        "text_files": survey.files or None,
        "text_files_skipped": ", ".join(counted(survey.skipped)) or None,
        "text_column": survey.text_column,
        "text_columns_other": ", ".join(survey.other_columns) or None,
        "text_formats": "; ".join(survey.formats) or None,
        "documents_read": survey.documents,
        "documents_empty": survey.empty_documents,
        "values_not_text": survey.values_not_text,
    }
    return dict.fromkeys(values) if facts is None else values


def counted(skipped: Counter[str]) -> list[str]:
    """Return counts such as ``2 .png`` and ``1 empty file``, the most frequent first."""
    several = skipped.most_common()
    rest = sum(count for _, count in several[SHOWN:])
    found = [many(count, reason) for reason, count in several[:SHOWN]]
    return [*found, many(rest, "other")] if rest else found


def many(count: int, thing: str) -> str:
    """Return ``1 file`` or ``2 files``."""
    is_suffix = thing.startswith(".") or thing == "without suffix"
    return f"{count:,} {thing}{'s' * (count != 1 and not is_suffix)}"
