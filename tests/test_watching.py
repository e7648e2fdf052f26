"""Read what TensorBoard shows of a run, and what Weights & Biases receives."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from tensorboard import context
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.util.tensor_util import make_ndarray

from tests.conftest import tiny
from tests.test_tracking import interrupt_at, samples, stop_at
from tests.test_training import Trained
from tinygpt import cli, words
from tinygpt.config import ConfigError
from tinygpt.config.counting import flops_per_token
from tinygpt.scaling import drawing
from tinygpt.training.session import train

QUIET = Console(quiet=True)
RHYTHM = (
    "train.steps=20",
    "train.log_every=3",
    "train.eval_every=1280",  # 5 steps
    "train.checkpoint_every=1024",  # 4 steps
)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def curve(board: EventAccumulator, tag: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, values, and seconds after the first."""
    found = board.Tensors(tag)
    values = [float(make_ndarray(event.tensor_proto)) for event in found]
    times = [event.wall_time - found[0].wall_time for event in found]
    return [event.step for event in found], values, times


def texts(board: EventAccumulator) -> dict[int, str]:
    """The samples, by tokens, as they stand between the page's line breaks."""
    found = board.Tensors("samples/text_summary")
    assert len({event.step for event in found}) == len(found)
    return {e.step: e.tensor_proto.string_val[0].decode() for e in found}


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# --- the HParams page


class Page(NamedTuple):
    """What the page gets from TensorBoard's server."""

    hparams: dict[str, api_pb2.HParamInfo]
    metrics: list[str]
    groups: dict[str, api_pb2.SessionGroup]  # by run


def hparams_page(outputs: Path) -> Page:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(outputs)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(outputs))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    experiment = backend.experiment_from_metadata(
        request, "", True, backend.hparams_metadata(request, ""), None
    )
    asked = api_pb2.ListSessionGroupsRequest(
        slice_size=100,
        allowed_statuses=[
            *(api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING),
            *(api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE),
        ],
    )
    found = list_session_groups.Handler(
        request_context=request, backend_context=backend, experiment_id="", request=asked
    ).run()
    return Page(
        {info.name: info for info in experiment.hparam_infos},
        [info.name.tag for info in experiment.metric_infos],
        {group.sessions[0].name: group for group in found.session_groups},
    )


@pytest.fixture(scope="module")
def outputs(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two runs, a run by itself, and one that diverged."""
    folder = tmp_path_factory.mktemp("outputs")

    def words(*more: str) -> list[str]:
        return tiny(corpus, f"output_dir={folder}", f"cache_dir={cache}", *more)

    jobs = [words("study=one", f"optim.learning_rate={rate}", "seed=1") for rate in (1e-3, 1e-2)]
    alone = words("study=two", "run_name=alone", "model.position=rope", "optim.betas=[0.9,0.99]")
    alone += ["schedule.warmup_steps=2", "seed=1", "optim.learning_rate=1e-3"]
    ill = words("study=two", "run_name=ill", "optim=sgd", "optim.learning_rate=1e30", "seed=1")
    ill += ["train.grad_clip_norm=null"]
    for job in (*jobs, alone, ill):
        train(cli.compose_config(job), job, QUIET)
    return folder


def test_every_run_is_a_line_of_the_hparams_page(outputs: Path) -> None:
    page = hparams_page(outputs)
    runs = {str(p.parent.relative_to(outputs)): p for p in outputs.glob("*/*/results.json")}
    assert page.groups.keys() == runs.keys()
    assert len(runs) == 4
    assert all(len(group.sessions) == 1 for group in page.groups.values())
    for name, path in runs.items():
        results = json.loads(path.read_text())
        group = page.groups[name]
        values = {value.name.tag: value.value for value in group.metric_values}
        wanted = {
            "(final)/loss": results["final_val_loss"],
            "(final)/loss_best": results["best_val_loss"],
            "(final)/loss_bits_per_byte": results["final_val_bits_per_byte"],
            "(final)/loss_test": results["test_loss"],
            "(final)/token_accuracy": results["final_val_accuracy"],
            "(final)/tokens_per_second": results["tokens_per_second"],
        }
        finals = {tag: value for tag, value in values.items() if tag.startswith("(final)/")}
        known = {tag: value for tag, value in wanted.items() if value is not None}
        assert finals == pytest.approx(known, rel=1e-6)
        ended = {"finished": api_pb2.STATUS_SUCCESS, "diverged": api_pb2.STATUS_FAILURE}
        assert group.sessions[0].status == ended[results["status"]]
        size = group.hparams["trained.model_parameters"].number_value
        assert size == results["model_parameters"]
        assert group.hparams["optim.learning_rate"].number_value == results["learning_rate"]


def test_the_page_shows_first_in_what_runs_differ_and_how_they_ended(outputs: Path) -> None:
    page = hparams_page(outputs / "one")
    differing = {name for name, info in page.hparams.items() if info.differs}
    assert differing == {"optim.learning_rate"}
    shown = ["loss", "loss_best", "loss_bits_per_byte", "loss_test", "token_accuracy"]
    assert page.metrics[:5] == [f"(final)/{name}" for name in shown]
    assert max(page.hparams) == "trained.train_tokens"  # sizes come after every key
    all_runs = hparams_page(outputs)
    differing = {name for name, info in all_runs.hparams.items() if info.differs}
    assert {"optim.learning_rate", "optim.betas", "optim.kind", "model.position"} <= differing
    assert not any(name.startswith(("hardware.", "logger.")) for name in all_runs.hparams)


def test_the_pages_begin_with_the_losses_and_end_with_the_results(outputs: Path) -> None:
    found = read(outputs / "two" / "alone").Tags()["tensors"]
    tags = [tag for tag in found if "/" in tag and not tag.startswith(("samples", "_hparams"))]
    # there a slash is before a digit, and that before any other character
    groups = sorted({tag.split("/")[0] for tag in tags}, key=lambda g: (not g[0].isdigit(), g))
    assert groups == ["1 loss", "2 loss by MFLOPs", "3 train", "4 val", "(final)"]
    assert {"1 loss/train", "1 loss/val", "4 val/accuracy", "3 train/learning_rate"} <= set(tags)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_run_has_one_name_also_if_an_earlier_version_began_it(
    is_older: bool, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    trained = Trained(tmp_path, cache, tiny(corpus, *RHYTHM, "logger=tensorboard"))
    stop_at(11, trained)
    if is_older:
        (trained.path / "tensorboard").mkdir()
        for file in trained.path.glob("events.*"):
            file.rename(trained.path / "tensorboard" / file.name)
    folder = trained.path / "tensorboard" if is_older else trained.path
    trained.go()
    for _ in range(2):
        runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Runs()
        assert list(runs) == [str(folder.relative_to(tmp_path))]
        trained.go("force=true")
    assert len(list(folder.glob("events.*"))) == 1


def test_what_is_null_has_no_value_and_a_list_is_text(outputs: Path) -> None:
    groups = hparams_page(outputs).groups
    alone, ill = groups["two/alone"].hparams, groups["two/ill"].hparams
    assert alone["optim.betas"].string_value == "[0.9, 0.99]"
    assert alone["schedule.warmup_steps"].number_value == 2
    assert "schedule.warmup_steps" not in ill
    assert "train.grad_clip_norm" in alone
    assert "train.grad_clip_norm" not in ill
    assert alone["model.tie_weights"].bool_value is True


# --- curves and texts


def test_a_printed_line_speaks_of_all_since_the_last(
    corpus: Path, cache: Path, tmp_path: Path
) -> None:
    more = ["train.steps=60", "train.log_every=2", "train.eval_every=5120", "logger=csv"]
    names = ["run_name=r", f"output_dir={tmp_path}", f"cache_dir={cache}"]
    overrides = tiny(corpus, *more, *names)
    file = io.StringIO()
    train(cli.compose_config(overrides), overrides, Console(file=file, width=80))
    lines = [line for line in file.getvalue().splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    pattern = r"step +(\d+)/60 +(\d+)%  .*val [\d.]+(?:  (\S+) tokens/s)?(?:  (\S+) left)?"
    printed = [match.groups() for line in lines if (match := re.fullmatch(pattern, line))]
    assert [row[:2] for row in printed] == [("0", "0"), ("20", "33"), ("40", "66"), ("60", "100")]
    assert [row[3] is None for row in printed] == [True, False, False, True]
    seconds = {row["step"]: float(row["seconds"]) for row in table(tmp_path / "runs" / "r")}
    for (before, *_), (step, _, rate, _) in itertools.pairwise(printed):
        whole = 20 * 256 / (seconds[step] - seconds[before])
        assert float(words.plain(rate)) == pytest.approx(whole, rel=0.05)


def test_an_interrupted_run_is_there_once(corpus: Path, cache: Path, tmp_path: Path) -> None:
    """Also for who was looking on."""
    trained = Trained(tmp_path, cache, tiny(corpus, *RHYTHM, "logger=tensorboard"))
    stop_at(11, trained)
    looking = read(trained.path)
    assert curve(looking, "1 loss/train")[0][-1] == 10 * 256
    interrupt_at(14, trained)
    trained.go()
    before = {file: file.read_bytes() for file in trained.path.glob("events.*")}
    trained.go()  # which finds it finished
    assert {file: file.read_bytes() for file in trained.path.glob("events.*")} == before

    rows, written = table(trained.path), samples(trained.path)
    assert list(written) == [0, 2560, 5120]
    config = cli.compose_config(trained.words)
    per_token = flops_per_token(config.model, 258)
    for board in (read(trained.path), looking.Reload()):
        for column in ("train_loss", "val_loss"):
            split = column.removesuffix("_loss")
            measured = [row for row in rows if row[column]]
            tokens = [int(row["tokens"]) for row in measured]
            steps, values, times = curve(board, f"1 loss/{split}")
            assert steps == tokens
            assert values == pytest.approx([float(row[column]) for row in measured], rel=1e-6)
            seconds = [float(row["seconds"]) for row in measured]
            assert times == pytest.approx([second - seconds[0] for second in seconds], abs=1e-3)
            mflops = curve(board, f"2 loss by MFLOPs/{split}")[0]
            assert mflops == [round(t * per_token / 1e6) for t in tokens]
        found = texts(board)
        assert list(found) == list(written)
        assert all(found[tokens].split() == text.split() for tokens, text in written.items())


def test_a_sample_is_shown_as_it_is_whatever_it_looks_like(tmp_path: Path) -> None:
    from tinygpt.training.loggers import WIDTH, Board

    board = Board(tmp_path, {}, 10, 0.0)
    board.log_text("# no heading\n\n*stars* " + "long " * 100, 7)
    board.close("success")
    lines = texts(read(tmp_path))[7].splitlines()
    assert lines[0] == "    # no heading"
    assert all(line.startswith("    ") or not line for line in lines)  # code, to Markdown
    assert max(map(len, lines)) <= WIDTH + 4


# --- figures of a fit


def test_the_same_fit_again_replaces_its_figures(tmp_path: Path) -> None:
    for name, height in (("scaling", 20), ("residuals", 30)):
        matplotlib.image.imsave(tmp_path / f"{name}.png", np.zeros((height, 40, 3)))
    drawing.write_events(tmp_path, ["scaling", "residuals"])
    looking = read(tmp_path / "tensorboard")
    matplotlib.image.imsave(tmp_path / "scaling.png", np.ones((10, 40, 3)))
    for _ in range(3):
        drawing.write_events(tmp_path, ["scaling"])
        looking.Reload()
    assert sum(path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir()) == 1
    for board in (read(tmp_path / "tensorboard"), looking):
        (event,) = board.Tensors("fit/scaling")
        width, height, png = event.tensor_proto.string_val
        assert (width, height) == (b"40", b"10")
        assert png == (tmp_path / "scaling.png").read_bytes()
    assert "fit/residuals" not in read(tmp_path / "tensorboard").Tags()["tensors"]


# --- Weights & Biases


class FakeWandb:
    """The part of its module that is used; keeps what each run is told."""

    Error = RuntimeError

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []

    def init(self, **given: Any) -> FakeRun:
        self.runs.append(FakeRun(given))
        return self.runs[-1]

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def Table(self, columns: list[str], data: list[Any]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]


class FakeRun:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.step = given, 0
        self.config: Any = SimpleNamespace(update=self.note_config)
        self.params: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str | None] = {}
        self.history: dict[int, dict[str, Any]] = {}
        self.exit_code: int | None = None
        self.folder = Path(given["dir"]) / "wandb" / f"offline-run-{id(self)}"
        self.folder.mkdir(parents=True)

    def note_config(self, params: dict[str, Any], allow_val_change: bool) -> None:
        self.params.update(params)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= max(self.history, default=0)  # it drops what comes late
        self.history.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_is_told_the_same(
    corpus: Path, cache: Path, tmp_path: Path, wandb: FakeWandb
) -> None:
    trained = Trained(tmp_path, cache, tiny(corpus, *RHYTHM, "logger=wandb"))
    interrupt_at(14, trained)
    trained.go()
    first, second = wandb.runs
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.given["id"] == second.given["id"]
    assert second.given["mode"] == "offline"
    assert [path.parent.parent for path in trained.path.glob("wandb/offline-run-*")] == [
        trained.path
    ]

    rows = table(trained.path)
    assert list(second.history) == [int(row["tokens"]) for row in rows]
    for row in rows:
        told = second.history[int(row["tokens"])]
        assert told["tokens"] == int(row["tokens"])
        assert told["seconds"] == float(row["seconds"])
        assert told.get("train/loss") == (float(row["train_loss"]) if row["train_loss"] else None)
        assert told.get("val/loss") == (float(row["val_loss"]) if row["val_loss"] else None)
    last = second.history[20 * 256]
    assert last["flops"] == trained.results["flops_exact"]
    written = samples(trained.path).items()
    assert last["samples"] == [{"tokens": tokens, "text": text} for tokens, text in written]
    assert second.axes == {"tokens": None, "flops": None, "seconds": None, "*": "tokens"}
    names = ("final_val_loss", "best_val_loss", "final_val_bits_per_byte", "final_val_accuracy")
    for name in (*names, "test_loss", "tokens_per_second", "status"):
        assert second.summary[name] == trained.results[name]
    assert second.params["model.d_model"] == 16
    assert second.params["model_parameters"] == trained.results["model_parameters"]


def test_two_runs_of_one_process_are_two_runs_there(
    corpus: Path, cache: Path, tmp_path: Path, wandb: FakeWandb
) -> None:
    for seed in (1, 2):
        Trained(
            tmp_path, cache, tiny(corpus, "logger=wandb", f"seed={seed}", f"run_name={seed}")
        ).go()
    assert len({run.given["id"] for run in wandb.runs}) == 2
    assert all(run.given["reinit"] == "create_new" for run in wandb.runs)
    assert [run.exit_code for run in wandb.runs] == [0, 0]
    assert wandb.runs[0].summary["final_val_loss"] != wandb.runs[1].summary["final_val_loss"]


def test_online_only_what_is_new_is_told(
    corpus: Path, cache: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tmp_path, cache, tiny(corpus, *RHYTHM, "logger=wandb"))
    interrupt_at(14, trained)
    shutil.rmtree(trained.path / "wandb")
    init = wandb.init

    def resumed(**given: Any) -> FakeRun:
        run = init(**given)
        run.step = 12 * 256 + 1
        return run

    monkeypatch.setattr(wandb, "init", resumed)
    trained.go("logger.wandb.offline=false")
    assert wandb.runs[-1].given["mode"] == "online"
    tokens = [int(row["tokens"]) for row in table(trained.path)]
    assert list(wandb.runs[-1].history) == [t for t in tokens if t > 12 * 256]


def test_what_weights_and_biases_refuses_is_one_line(
    corpus: Path, cache: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> FakeRun:
        raise wandb.Error("api_key not configured\nand more")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"^logger.wandb: api_key not configured$"):
        Trained(tmp_path, cache, tiny(corpus, "logger=wandb")).go()
