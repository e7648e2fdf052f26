"""Tell in the report of a law within a budget what was asked, decided, predicted and found.

It reads the ``design.jsonl`` and ``prediction.json`` of the study.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tinygpt import fileio
from tinygpt.scaling import drawing
from tinygpt.scaling.document import Block, Heading, Paragraph, Picture, Table
from tinygpt.scaling.wording import count, percent

CAPTION = "The half-width of the 95 % interval at the target, after each run."


@dataclass(frozen=True)
class Story:
    """The record of a study that had a budget."""

    lines: list[dict[str, Any]]
    prediction: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Story | None:
        """Return that of the study in ``folder``; None where it had no budget."""
        path, predicted = folder / "design.jsonl", folder / "prediction.json"
        if not path.exists():
            return None
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return cls(lines, fileio.read_json(predicted) if predicted.exists() else None)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def decisions(self, live: dict[str, Any] | None = None) -> Iterator[Block]:
        """Yield what was done within the budget, run by run, and why."""
        asked, recipe = (self.of("begin")[0][name] for name in ("asked", "recipe"))
        ended = self.of("end")
        flops, minutes = asked["flops"], asked["minutes"]
        budget = f"{flops:.2g} FLOPs" if flops else f"{minutes:g} minutes"
        text = f"The budget was {budget}; it took {self.lines[-1]['at'] / 60:.1f} minutes: "
        text += f"{count(len(ended), 'run')}, chosen one after the other"
        losses = self.of("score")[0]["losses"] if self.of("score") else {}
        text += f", then {count(len(losses), 'run')} to test the prediction." if losses else "."
        text += f" The text has {recipe['one_pass']:,} training tokens"
        text += (
            ", too few for one pass: they were read several times, and the law of repeated data is "
            "among those that were fitted."
            if recipe["repeats"]
            else ", none of them read twice."
        )
        yield Heading("What was done")
        yield Paragraph(text)
        if any(line.get("half") is not None for line in ended):
            yield Picture("budget", CAPTION, live)
        ends, rows = {line["row"]: line for line in ended}, []
        for line in self.of("choose"):
            end, cost = ends.get(line["row"], {}), line["cost"]
            loss, half = end.get("loss"), end.get("half")
            row = [f"{line['at'] / 60:.1f}", line["run"]]
            row += [f"{cost:.0f} s" if cost < 1e6 else f"{cost:.1e} FLOPs"]
            row += [percent(line["expected"])]
            row += [f"{loss:.4f}" if loss is not None else end.get("status", "not ended")]
            rows.append([*row, percent(half) if half is not None else ""])
        yield Table(("minute", "run", "cost", "expected", "loss", "target, ±"), rows)
        yield Paragraph(
            "Each run was chosen to narrow the prediction at the target most for its cost. "
            "Expected: the share of the variance at the target that it should remove, by the laws "
            "known then. Target: the half-width of the 95 % interval once the run was in; it may "
            "widen where a run shows that a law was wrong."
        )

    def test(self) -> Iterator[Block]:
        """Yield the prediction that was made before the last runs began, with its outcome."""
        said, score = self.prediction, self.of("score")
        if said is None:
            return
        words = f"{said['predicted']:.4f} ({said['low']:.4f} to {said['high']:.4f})"
        what = f"d_model {said['d_model']}, {said['tokens']:,} tokens"
        text = f"Before the most expensive runs began ({what}), their loss was predicted to be "
        text += f"{words}, from {count(len(said['from_runs']), 'run')}"
        if not score:
            yield Paragraph(f"{text}. These runs have not finished.")
            return
        losses = list(score[0]["losses"].values())
        came = " and ".join(f"{loss:.4f}" for loss in losses)
        inside = sum(score[0]["inside"])
        yield Paragraph(
            f"{text}. **They reached {came}: off by {percent(abs(score[0]['error']))}**, "
            f"{inside} of {len(losses)} inside the interval."
        )

    def figure(self) -> Figure | None:
        """Draw the interval at the target against the minutes spent."""
        ends = [line for line in self.of("end") if line.get("half") is not None]
        if not ends:
            return None
        figure, (axes,) = drawing.side_by_side(1)
        minutes = [line["at"] / 60 for line in ends]
        halves = [100 * line["half"] for line in ends]
        look: Any = {"color": drawing.BLUE, "marker": "o", "ms": 3}
        axes.plot(minutes, halves, label="interval at the target", **look)
        if score := self.of("score"):
            at, error = score[0]["at"] / 60, 100 * abs(score[0]["error"])
            axes.plot([at], [error], "x", color=drawing.RED, label="error of the test")
        axes.set(yscale="log", xlabel="minutes", ylabel="± (%)")
        drawing.log_ticks(axes.yaxis)
        drawing.legend(axes, above=True, columns=2)
        return figure
