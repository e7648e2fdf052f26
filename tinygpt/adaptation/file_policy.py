"""Edits that were written before, from a file of JSON lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt.adaptation.config import OuterConfig
from tinygpt.adaptation.documents import Document
from tinygpt.adaptation.edits import SelfEdit, read
from tinygpt.adaptation.policies import Policy, Proposal
from tinygpt.config import ConfigError, RunError
from tinygpt.fileio import parse_json

COSTS = ("prompt_tokens", "tokens")


class ReplayPolicy:
    """Each line has an ``edit`` and whose it is: ``doc_sha256``, the SHA-256 of the document's
    text, or ``doc_id`` alone.  It may say what the edit cost, in ``prompt_tokens`` and ``tokens``;
    other keys are passed over."""

    backend = "file"
    parameters: int | None = None
    ops: Sequence[str] = ("continue",)  # whatever its texts are
    sft_tokens = 0

    def __init__(self, path: str, documents: Sequence[Document] = ()) -> None:
        """Raises ConfigError for a line that is none, naming its number, and where one of
        ``documents`` has no edit."""
        self.model = path
        self._found: dict[str, list[Proposal]] = {}
        try:
            lines = Path(path).expanduser().read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"policy.path={path}: cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    of, proposal = _read(line)
                except ConfigError as error:
                    raise ConfigError(f"policy.path={path}: line {number}: {error}") from error
                self._found.setdefault(of, []).append(proposal)
        try:
            for document in documents:
                self._of(document)
        except RunError as error:
            raise ConfigError(str(error)) from error

    def _of(self, document: Document) -> list[Proposal]:
        for name in (document.sha256, document.doc_id):
            if name in self._found:
                return self._found[name]
        raise RunError(f"policy.path={self.model}: has no edit of the document {document.doc_id}")

    def propose(
        self, document: Document, count: int, *, seed: int, explore: float
    ) -> list[Proposal]:
        """In the order of the file, the first of them by the seed; there is nothing to explore."""
        found = self._of(document)
        return [found[(seed + n) % len(found)] for n in range(count)]

    def with_text(self, edit: SelfEdit, document: Document, *, seed: int) -> Proposal:
        """With the text of the first edit that has any."""
        if edit.source == "doc":
            return Proposal(dataclasses.replace(edit, text=[]))
        chosen = next((one for one in self._of(document) if one.edit.text), None)
        if chosen is None:
            where = f"policy.path={self.model}"
            raise RunError(f"{where}: has no text for the document {document.doc_id}")
        return dataclasses.replace(chosen, edit=dataclasses.replace(edit, text=chosen.edit.text))

    def sft(
        self, examples: Sequence[tuple[Document, SelfEdit]], config: OuterConfig, *, seed: int
    ) -> Policy:
        raise RunError("policy.kind=file: its edits are written; it cannot be trained")

    def save(self, folder: Path) -> None:
        """Nothing: the file stays as it is."""

    def load(self, folder: Path) -> Policy:
        return self


def _read(line: bytes) -> tuple[str, Proposal]:
    """Whose edit it is, and the edit."""
    try:
        values = parse_json(line.decode())
    except ValueError as error:
        raise ConfigError(f"not JSON ({error})") from error
    if not isinstance(values, dict) or "edit" not in values:
        raise ConfigError("must be an object with an edit")
    of = values.get("doc_sha256") or values.get("doc_id")
    if not isinstance(of, str):
        raise ConfigError("must say whose edit it is, by doc_sha256 or doc_id")
    costs = {name: _count(name, values.get(name, 0)) for name in COSTS}
    return of, Proposal(read(values["edit"]), **costs)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name}={value!r:.60}: must be a number of tokens, at least 0")
    return value
