"""Test the report of a fit: its facts, its files, the same bytes again."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from tinygpt import cli
from tinygpt.config.counting import count_parameters
from tinygpt.config.schema import ModelConfig
from tinygpt.scaling import analysis, document, facts, measured, report, wording
from tinygpt.scaling.analysis import Analysis, analyse
from tinygpt.scaling.columns import Columns
from tinygpt.scaling.evidence import CHECKS, THRESHOLDS
from tinygpt.scaling.intervals import Interval
from tinygpt.scaling.runs import comparable, load_runs
from tinygpt.scaling.selection import preferred

STUDY = Path(__file__).parent / "fixtures" / "ff2412f" / "study"

COLUMNS = Columns("N", None, "D", None, None, "C", "loss", "seed", "name")
ALONE = {"loss": "loss", "seed": "seed", "run": "name", "n_total": "T", "d": "D", "c": "C"}


def table(sizes: int = 5, tokens: tuple[float, ...] = (1e6, 4e6, 1.6e7), seeds: int = 2) -> Any:
    random = np.random.default_rng(3)
    rows = []
    for n in (2e4 * 4.0**i for i in range(sizes)):
        for d in tokens:
            for seed in range(seeds):
                noise = np.exp(0.003 * random.standard_normal())
                loss = (1.0 + 40 / n**0.4 + 2000 / d**0.6) * noise
                row = {"name": f"{n:g}-{d:g}-{seed}", "seed": seed, "N": n, "T": n + 5e4, "D": d}
                rows.append({**row, "C": 6 * n * d, "loss": loss})
    return pd.DataFrame(rows)


def analysis_of(runs: pd.DataFrame, columns: Columns = COLUMNS, **settings: Any) -> Analysis:
    left_out = runs.iloc[:0].assign(reason="")
    return analyse(runs, left_out, columns, **settings)


@pytest.fixture(scope="module")
def joint() -> Analysis:
    return analysis_of(table(), budgets=[1e15])


@pytest.fixture(scope="module")
def alone() -> Analysis:
    """Analyse one variable with both counts of parameters, and a run left out."""
    runs = table(sizes=6, tokens=(4e6,))
    left_out = pd.DataFrame([{"name": "x", "reason": "diverged"}])
    return analyse(runs, left_out, Columns(n="N", u=None, t=None, **ALONE))


@pytest.fixture(scope="module")
def folder(joint: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    report.write(joint, path)
    return path


ORDER = ["What was measured", "Verdict", "Prediction", "The law", "Which law", "Compute-optimal"]
ORDER += ["What to run next", "Residuals", "Runs", "Checklist", "How it was computed", "Files"]


def test_the_report_answers_before_it_explains(folder: Path) -> None:
    text = (folder / "report.md").read_text().replace("The law, as far as it goes", "The law")
    assert re.findall("^## (.*)$", text, re.M) == ORDER
    assert text.index("## Prediction") < text.index("![scaling]") < text.index("## The law")


def printed(found: Analysis, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    report.show(found, Path("there"), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_same_analysis_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    figures = ("scaling", "residuals", "contours", "extrapolation", "isoflop", "frontier")
    names = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    wanted = names | {"fit.json", "report.md", "report.html", "runs.csv", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == wanted
    report.write(analysis_of(table(), budgets=[1e15]), tmp_path)
    for name in wanted - {"tensorboard"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_an_earlier_analysis_left_goes(
    joint: Analysis, alone: Analysis, tmp_path: Path
) -> None:
    stale = {"contours.png", "frontier.svg", "curves.png"}
    for name in (*stale, "mine.txt"):
        (tmp_path / name).touch()
    report.write(alone, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names & stale == set()
    assert {"mine.txt", "left_out.csv", "report.html", "scaling.png"} <= names
    report.write(joint, tmp_path)
    assert not (tmp_path / "left_out.csv").exists()


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert len(text) < 5e6
    page, code = text.split('<script type="application/json"', 1)
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    images = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(images) == 6
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert {source[1:] for source in sources if source not in images} <= anchors
    assert "url(" not in page
    assert "default-src 'none'" in page  # the browser refuses to load anything
    (packed,) = re.findall(r'id="plotly">([^<]+)<', code)
    unpacked = gzip.decompress(base64.b64decode(packed)).decode()
    assert unpacked.lstrip().startswith("/**\n* plotly")


def live_figures(folder: Path) -> dict[str, Any]:
    (found,) = re.findall(r'id="figures">([^<]+)<', (folder / "report.html").read_text())
    figures: dict[str, Any] = json.loads(found)
    return figures


def test_live_figures_show_every_run_where_it_was_measured(folder: Path, joint: Analysis) -> None:
    runs = joint.runs
    for panel, column in zip(live_figures(folder)["scaling"]["panels"], ("N", "D"), strict=True):
        points = [trace for trace in panel["traces"] if trace["mode"] == "markers"]
        said = {
            text.split("<br>")[0]: (x, y)
            for trace in points
            for text, x, y in zip(trace["text"], trace["x"], trace["y"], strict=True)
        }
        assert said.keys() == set(runs["name"])
        for name, place in said.items():
            row = runs[runs["name"] == name].iloc[0]
            assert place == pytest.approx((row[column], row["loss"]), rel=1e-5)
        text = next(text for trace in points for text in trace["text"])
        for word in ("parameters", "training tokens", "loss", "law"):
            assert word in text
        hidden = [trace["legendgroup"] for trace in panel["traces"] if trace["mode"] == "lines"]
        assert set(hidden) <= {trace["name"] for trace in points}  # a curve goes with its runs


def test_live_curves_are_those_of_the_law(folder: Path, joint: Analysis) -> None:
    panels = live_figures(folder)["scaling"]["panels"]
    for name, panel in zip(("N", "D"), panels, strict=True):
        other = "D" if name == "N" else "N"
        levels = {f"{other} = {wording.letter(float(f'{v:.3g}'))}": v for v in joint.runs[other]}
        curves = [t for t in panel["traces"] if t["mode"] == "lines" and "fill" not in t]
        assert len(curves) >= 3
        for curve in curves:
            place = {name: np.array(curve["x"]), other: levels[curve["legendgroup"]]}
            fitted = joint.fit.predict(**{k: np.broadcast_to(v, 100) for k, v in place.items()})
            assert curve["y"] == pytest.approx(fitted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_the_live_figures(folder: Path, tmp_path: Path) -> None:
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    words += ["--window-size=1280,20000", "--virtual-time-budget=20000", "--dump-dom"]
    command = ["chromium", *words, (folder / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert dom.count('class="plot-container') == 6


def test_fit_json_has_no_nan_and_all_facts(folder: Path, joint: Analysis) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((folder / "fit.json").read_text(), parse_constant=refuse)
    assert found["parameters"]["alpha"]["estimate"] == joint.fit.parameters["alpha"]
    assert found["method"]["threshold"] is None  # least squares
    assert found["method"]["converged"] is True
    best = found["selection"][0]
    assert (best["law"], best["delta_aicc"]) == (joint.fit.law.name, 0.0)
    assert [one["flops"] for one in found["budgets"]] == [1e15]
    assert found["is_evidence"] == joint.is_evidence
    assert re.fullmatch("[0-9a-f]{64}", found["data_hash"])
    ways = {way["way"]: way["interval"] for way in found["frontier"]["ways"]}
    assert list(ways) == ["parametric law", "IsoFLOP profiles"]
    line = "; ".join(f"{way}: {method}" for way, method in ways.items())
    assert f"Intervals of the {line}." in (folder / "report.md").read_text()
    assert found["frontier"]["missing"] == {"training curves": "no training curves were given"}


def test_the_data_hash_is_that_of_the_values(joint: Analysis) -> None:
    moved = table().assign(name="elsewhere")
    changed = table().assign(loss=lambda t: t["loss"] * 1.001)
    first, second, third = (
        facts.data_hash(dataclasses.replace(joint, runs=runs)) for runs in (table(), moved, changed)
    )
    assert first == second == facts.data_hash(joint)
    assert third != first


def test_the_report_says_the_numbers_of_fit_json(folder: Path) -> None:
    found = json.loads((folder / "fit.json").read_text())
    text = (folder / "report.md").read_text()
    for name, one in found["parameters"].items():
        value, ends = one["estimate"], one["interval"]
        interval = Interval(value, ends["low"], ends["high"], ends["level"], ends["method"])
        row = f"| {name} | {wording.estimate(value, interval)} | {wording.reach(interval)} |"
        assert row in text
    for one in found["predictions"]:
        assert f"| {wording.number(one['flops'])} |" in text
    assert found["data_hash"][:12] in text
    fields = {"id", "group", "title", "outcome", "figure", "threshold", "advice"}
    for check in found["checks"]:
        assert fields <= check.keys()
        if check["outcome"] == "fail":
            assert f"- FAIL: {check['title']} ({check['figure']}; needs" in text
            continue
        assert f"| {check['title']} | {check['figure']} | {check['threshold']} |" in text


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Analyse a study whose run folders exist."""
    folder = shutil.copytree(STUDY, tmp_path_factory.mktemp("runs") / "study")
    return analyse(*comparable(load_runs(folder), "final_val_loss"), Columns())


def test_what_was_measured_comes_from_the_run_folders(studied: Analysis) -> None:
    _, rows = measured.measured(studied)
    assert isinstance(rows, document.Table)
    facts = {str(name): str(value) for name, value in rows.rows}
    assert facts["runs"] == "9 fitted"
    assert facts["corpus"] == "custom (corpus.txt)"
    assert facts["tokenizer"] == "byte, vocabulary 258"
    assert facts["sizes"].startswith("3 from ")
    assert facts["sizes"].endswith("parameters without embeddings (d_model 8, 16, 32)")
    assert facts["lengths"] == "3 from 6,400 to 25,600 training tokens"
    assert facts["date"] == "2026-11-29"
    assert facts["hardware"].startswith("cpu, 1 thread, precision 32; Linux")
    assert "tinygpt 0.1.0" in facts["version"]
    _, rows = measured.measured(studied, "there.csv")
    assert isinstance(rows, document.Table)
    assert ["table", f"`there.csv`, 9 rows, {len(studied.runs.columns)} columns"] in rows.rows


def test_runs_are_linked_from_where_the_report_lies(studied: Analysis) -> None:
    folder = Path(studied.runs["folder"].iloc[0]).parent / "fit"
    blocks = list(measured.runs(studied, folder))
    written = document.markdown(blocks), document.page(blocks, folder)
    for text, link in zip(written, (r"\]\(([^)]+)\)", r'href="(\.\.[^"]+)"'), strict=True):
        links = re.findall(link, text)
        assert len(links) == 9
        assert all((folder / one / "results.json").resolve().exists() for one in links)


def composed(command: str) -> dict[str, Any]:
    python, dash, module, *words = shlex.split(command)
    assert [python, dash, module] == ["python", "-m", "tinygpt.run"]
    return dataclasses.asdict(cli.compose_config(words))


def test_the_run_to_do_next_can_be_pasted(studied: Analysis) -> None:
    found = studied
    assert found.next_run is not None
    command = measured.next_command(found)
    assert command is not None
    config = composed(command)
    size = count_parameters(ModelConfig(**config["model"]), 258).non_embedding
    assert size == pytest.approx(found.next_run.place["N"], rel=0.35)  # widths come in steps
    assert config["train"]["tokens"] == pytest.approx(found.next_run.place["D"], abs=256)
    assert config["train"]["steps"] is None
    assert config["seed"] > found.runs["seed"].max()
    known = yaml.safe_load(Path(found.runs["folder"].iloc[0], "config.yaml").read_text())
    for group in ("data", "tokenizer", "optim", "schedule"):
        shared = config[group].keys() & known[group].keys()
        assert {k: config[group][k] for k in shared} == {k: known[group][k] for k in shared}
    assert measured.next_command(dataclasses.replace(found, next_run=None)) is None


@pytest.mark.parametrize(
    "words",
    [
        ["data=tinystories", "tokenizer=char", "optim=muon", "schedule=wsd", "model=medium"],
        ["data=custom", "data.path=my text.txt", "data.separator=\\n\\n", "optim=sgd"],
        ["optim=lion", "optim.betas=[0.8,0.9]", "train.epochs=2", "model.position=rope"],
        ["optim=adafactor", "model.bias=false", "train.sample_prompt='a, b=c'", "tokenizer=gpt2"],
    ],
)
def test_the_command_of_a_run_gives_its_configuration(words: list[str]) -> None:
    config = dataclasses.asdict(cli.compose_config([*words, "study=s", "seed=7"]))
    assert composed(measured.command_of(config)) == config


def test_shared_trunks_say_what_they_saved(joint: Analysis) -> None:
    runs = joint.runs.assign(run_name=joint.runs["name"], total_steps=100, flops_exact=1e15)
    branched = runs.assign(branched_from=None, branched_at_step=np.nan)
    assert facts.shared_trunks(runs) is None
    assert facts.shared_trunks(branched) is None
    branched.loc[branched.index[1:4], "branched_from"] = branched["run_name"].iloc[0]
    branched.loc[branched.index[1:4], "branched_at_step"] = [20, 40, 60]
    branched.loc[branched.index[4], "branched_from"] = "a trunk that is not here"
    branched.loc[branched.index[4], "branched_at_step"] = 50
    found, total = facts.shared_trunks(branched), len(runs) * 1e15
    expected = {"flops": total - 1.2e15, "independent_flops": total, "saved": 1.2e15 / total}
    assert found == pytest.approx(expected)
    blocks = measured.runs(dataclasses.replace(joint, runs=branched))
    text = document.markdown(list(blocks))
    assert f"({wording.percent(expected['saved'])}) against independent runs." in text
    assert "trunk" not in document.markdown(list(measured.runs(joint)))


def test_what_fails_comes_first(alone: Analysis, tmp_path: Path) -> None:
    failing = analysis_of(table(sizes=6, tokens=(4e6,)), law="power")
    assert not failing.is_evidence
    text = _text(failing)
    titles = [check.title for check in failing.checks if check.passed is False]
    for said in (text, " ".join(printed(failing).split())):
        assert said.index("not evidence yet") < said.index("The law, as far")
        assert all(said.index(f"“{title}”") < said.index("L = A / x^alpha") for title in titles)
        places = [said.index(f"FAIL: {title}") for title in titles]
        assert max(places) < said.index("Checks that pass")


def _text(found: Analysis) -> str:
    return document.markdown(report.compose(found, {}))


def test_where_all_passes_it_says_so(alone: Analysis) -> None:
    text = _text(alone)
    assert alone.is_evidence
    assert "not evidence yet" not in text
    assert "rounds them to what each interval supports" in text
    untested = sum(check.outcome == "not tested" for check in alone.checks)
    passed = sum(check.outcome == "pass" for check in alone.checks)
    were = "was" if untested == 1 else "were"
    assert f"no check fails, {untested} of {len(alone.checks)} {were} not tested**." in text
    assert f"{passed} pass, 0 fail, " in text  # what was not tested is not passed
    assert "FAIL" not in text
    assert "left out: 1 of 13 (diverged): row 0" in text
    assert "|  | estimate | 95 % interval | embeddings counted | 95 % interval |" in text


@pytest.mark.parametrize("runs", [3, 4])
def test_few_runs_make_a_report_too(runs: int, tmp_path: Path) -> None:
    few = table(sizes=runs, tokens=(4e6,), seeds=1)
    found = analysis_of(few)
    report.write(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"{runs} runs at {runs} different points" in text
    assert "nan" not in text
    assert printed(found)


def test_unique_tokens_make_a_third_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(analysis, "_intervals", lambda *_: {})  # these two take seconds
    monkeypatch.setattr(analysis, "frontier", lambda *_, **__: None)
    runs = table().assign(U=lambda t: np.where(t["seed"] == 0, t["D"], t["D"] / 2))
    columns = Columns("N", None, "D", "U", None, "C", "loss", "seed", "name")
    report.write(analysis_of(runs, columns, law="data_constrained"), tmp_path)
    assert "unique tokens" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("width", [60, 300])
def test_the_terminal_is_wide_enough(joint: Analysis, width: int) -> None:
    text = printed(joint, width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert "report: there/report.html" in text
    assert joint.fit.law.name in text


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (0.42234, 0.39154, 0.45451, "0.422, 0.392 to 0.455"),
        (2180.75, 1194.4, 4106.2, "2200, 1200 to 4100"),
        (1.77549, 1.77541, 1.77561, "1.77549, 1.77541 to 1.77561"),
        (3.2e10, 3.1e10, 3.35e10, "3.20e10, 3.10e10 to 3.35e10"),
        (0.98, -np.inf, 1.5, "0.98, below 1.50, no lower end"),
        (0.32, -3e-5, np.inf, "0.32, above 0, no upper end"),
        (16.0, 0.0, np.inf, "16, not set by the data"),
        (0.1, -0.2, 0.4, "0.10, -0.20 to 0.40"),
        (1.73e9, 1e-5, 2.9182186e25, "2e9, 1.0e-5 to 2.9e25"),
    ],
)
def test_digits_are_those_the_interval_supports(
    value: float, low: float, high: float, says: str
) -> None:
    interval = Interval(value, low, high, 0.95, "profile")
    assert f"{wording.estimate(value, interval)}, {wording.reach(interval)}" == says


def test_the_equation_can_be_used(joint: Analysis) -> None:
    text = wording.equation(joint.fit.optimum.law, joint.fit.parameters)
    text = text.removeprefix("L = ").replace("^", "**")
    place = {"N": 1e6, "D": 1e7}
    by_hand = eval(text, {"__builtins__": {}}, place)
    assert by_hand == pytest.approx(float(joint.fit.predict(**place)[0]), rel=1e-3)
    vanished = {**joint.fit.parameters, "E": 1.6e-9}  # where a fit that wants none ends
    assert wording.equation(joint.fit.optimum.law, vanished).startswith("L = 0 + ")


def test_laws_that_cannot_be_told_apart_say_which_is_shown(joint: Analysis) -> None:
    best = joint.candidates[0]
    second = dataclasses.replace(joint.candidates[1], aicc=best.aicc + 1.0)
    tied = [best, second, *joint.candidates[2:]]
    plain = preferred(tied)
    shown = dataclasses.replace(joint, candidates=tied, chosen=plain)
    rule = "of the laws within 2 AICc of the best, the first listed is shown"
    assert rule in document.markdown(list(report.selection(shown)))
    other = best if plain is second else second
    asked = dataclasses.replace(shown, chosen=other)
    text = document.markdown(list(report.selection(asked)))
    assert rule not in text
    assert f"{other.law}, which was asked for." in text


def test_an_e_above_the_lowest_loss_is_explained(alone: Analysis) -> None:
    lowest = float(alone.runs["loss"].min())

    def said(constant: float, low: float, high: float) -> str:
        parameters = {**alone.fit.parameters, "E": constant}
        fit = dataclasses.replace(alone.fit)
        fit.__dict__["parameters"] = parameters
        one = Interval(constant, low, high, 0.95, "profile")
        changed = dataclasses.replace(alone, fit=fit, intervals={**alone.intervals, "E": one})
        return document.markdown(list(report.law(changed)))

    above = said(lowest * 1.01, lowest, lowest * 1.02)
    assert "E lies above the lowest loss measured" in above
    assert "not a bound on each" in above
    assert "E is not known" not in above
    below = said(lowest * 0.9, 0.0, lowest)
    assert "E lies above" not in below
    assert "E is not known from these runs: anything below" in below


def test_an_outlier_is_named_in_the_report_and_in_fit_json() -> None:
    runs = table(sizes=6, tokens=(4e6,))
    name = runs["name"].iloc[-1]
    runs["loss"] = runs["loss"].where(runs["name"] != name, 1.2 * runs["loss"])
    found = analysis_of(runs, Columns(n="N", u=None, t=None, **ALONE))
    section = document.markdown(list(report.single_runs(found)))
    assert f"| {name} |" in section
    assert section.count("sets the law") == 1
    told = facts.facts(found)["single_runs"]
    assert [one["run"] for one in told if one["sets_law"]] == [name]
    assert len(told) == len(runs)
    assert told[0]["run"] == name
    assert told[0]["off_siblings"] == pytest.approx(0.2, abs=0.02)


def test_the_page_lists_every_check_with_its_threshold() -> None:
    page = (Path(__file__).parents[1] / "docs" / "laws.md").read_text()
    for rows in THRESHOLDS.values():
        for id, threshold in rows.items():
            limit, _, why = threshold.partition(": ")
            assert f"| {CHECKS[id][0].format(what='x')} | {limit} | {why} |" in page, id
    assert CHECKS.keys() == {id for rows in THRESHOLDS.values() for id in rows}
