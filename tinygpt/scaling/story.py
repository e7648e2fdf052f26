"""Report what a study with a budget decided, predicted and found, from its own record."""

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
    """Hold the record of a study that had a budget."""

    lines: list[dict[str, Any]]  # of design.jsonl
    prediction: dict[str, Any] | None  # of prediction.json

    @classmethod
    def read(cls, folder: Path) -> Story | None:
        """Return the record in ``folder``, or None if the study had no budget."""
        path, predicted = folder / "design.jsonl", folder / "prediction.json"
        if not path.exists():
            return None
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return cls(lines, fileio.read_json(predicted) if predicted.exists() else None)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def decisions(self, live: dict[str, Any] | None = None) -> Iterator[Block]:
        """Yield which runs were made within the budget, and why."""
        asked, recipe = (self.of("begin")[0][name] for name in ("asked", "recipe"))
        ended = self.of("end")
        flops, minutes = asked["flops"], asked["minutes"]
        budget = f"{flops:.2g} FLOPs" if flops else f"{minutes:g} minutes"
        text = f"The budget was {budget}; the study took {self.lines[-1]['at'] / 60:.1f} minutes: "
        text += f"{count(len(ended), 'run')}, chosen one after the other"
        losses = self.of("score")[0]["losses"] if self.of("score") else {}
        text += f", and {count(len(losses), 'run')} to test the prediction." if losses else "."
        text += f" The text has {recipe['one_pass']:,} training tokens, "
        repeated = "too few for one pass: they were read several times, and the laws that were "
        repeated += "fitted include that of repeated data."
        text += repeated if recipe["repeats"] else "none of them read twice."
        yield Heading("What was done")
        yield Paragraph(text)
        if any(line.get("half") is not None for line in ended):
            yield Picture("budget", CAPTION, live)
        ends, rows = {line["row"]: line for line in ended}, []
        for line in self.of("choose"):
            end, cost = ends.get(line["row"], {}), line["cost"]
            loss, half = end.get("loss"), end.get("half")
            row = [f"{line['at'] / 60:.1f}", line["run"]]
            row += [
                f"{cost:.0f} s" if cost < 1e6 else f"{cost:.1e} FLOPs",
                percent(line["expected"]),
            ]
            row += [f"{loss:.4f}" if loss is not None else end.get("status", "not ended")]
            rows.append([*row, percent(half) if half is not None else ""])
        yield Table(("minute", "run", "cost", "expected", "loss", "target, ±"), rows)
        yield Paragraph(
            "Each run was chosen to narrow the prediction at the target most for its cost. "
            "Expected: the share of the variance at the target that the run should remove, by the "
            "laws fitted so far. Target: the half-width of the 95 % interval after the run; it may "
            "widen if a run shows that a law was wrong."
        )

    def test(self) -> Iterator[Block]:
        """Yield the prediction that was made before the last runs began, and its outcome."""
        made, score = self.prediction, self.of("score")
        if made is None:
            return
        what = f"d_model {made['d_model']}, {made['tokens']:,} tokens"
        text = f"Before the test began ({what}), its loss was predicted to be "
        text += f"{made['predicted']:.4f} ({made['low']:.4f} to {made['high']:.4f}), "
        text += f"from {count(len(made['from_runs']), 'run')}"
        if not score:
            yield Paragraph(f"{text}. The test has not finished.")
            return
        losses, inside = score[0]["losses"].values(), score[0]["inside"]
        reached = " and ".join(f"{loss:.4f}" for loss in losses)
        text += f". **It reached {reached}: off by {percent(abs(score[0]['error']))}**, "
        yield Paragraph(f"{text}{sum(inside)} of {len(losses)} inside the interval.")

    def figure(self) -> Figure | None:
        """Draw the interval at the target against the minutes spent; None if there is none."""
        ends = [line for line in self.of("end") if line.get("half") is not None]
        if not ends:
            return None
        figure, (axes,) = drawing.side_by_side(1)
        minutes, halves = zip(
            *((line["at"] / 60, 100 * line["half"]) for line in ends), strict=True
        )
        look: Any = {"color": drawing.BLUE, "marker": "o", "ms": 3}
        axes.plot(minutes, halves, label="interval at the target", **look)
        if score := self.of("score"):
            at, error = score[0]["at"] / 60, 100 * abs(score[0]["error"])
            axes.plot([at], [error], "x", color=drawing.RED, label="error of the test")
        axes.set(yscale="log", xlabel="minutes", ylabel="± (%)")
        drawing.log_ticks(axes.yaxis)
        drawing.legend(axes, above=True, columns=2)
        return figure
