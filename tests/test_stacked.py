"""Runs that train as one: equal to lone ones but for rounding, and to no one's harm."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Command, tiny
from tests.test_engines import kill_group
from tests.test_sweeping import read_summary, start, sweep, wait_until
from tinygpt import cli
from tinygpt.config import ACTIVATIONS, AdamOptim, Config, ConfigError, ModelConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.linear import onednn_is_there, use_onednn
from tinygpt.sweeping import stacking
from tinygpt.sweeping.engines import lost
from tinygpt.sweeping.trainings import prepare
from tinygpt.training.optim import make_optimizer
from tinygpt.training.session import train
from tinygpt.training.stack import End, train_stack
from tinygpt.training.stacked import StackedAdamW, StackedGPT

QUIET = Console(quiet=True)
SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 12}
LLAMA = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "n_kv_heads": 2,
    "bias": False,
    "norm_eps": 1e-2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "untied": {"tie_weights": False, "activation": "gelu_tanh", "pad_vocab_to_multiple": 8},
    "mup": {"parametrization": "mup", "mup_base_width": 4, "norm_eps": 1e-2},
    "manual": {"attention": "manual", "bias": False, "d_ff": 1},
    **{name: {"activation": name} for name in ACTIVATIONS},
}
VOCABULARY, RUNS = 30, 3


def make_models(options: dict[str, Any], dtype: torch.dtype) -> list[GPT]:
    models = []
    for seed in range(RUNS):
        torch.manual_seed(seed)
        models.append(GPT(ModelConfig(**SIZES, **options), VOCABULARY).to(dtype))
    return models


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (RUNS, 2, 11), generator=generator)  # shorter than it may be
    return tokens[..., :-1], tokens[..., 1:]


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    return {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_model_trains_as_if_it_were_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Two of the three share a rate, and so a call of the kernel; the norms are clipped."""
    # an eps above the rounding of gradients that are zero, those of the keys' biases
    optims = [AdamOptim(learning_rate=rate, eps=1e-5) for rate in (1e-3, 1e-2, 1e-2)]
    alone, together = make_models(options, dtype), make_models(options, dtype)
    optimizers = []
    for model, optim in zip([*alone, *together], optims * 2, strict=True):
        optimizers.append(make_optimizer(model, optim, fused=True))
        for group in optimizers[-1].param_groups:
            group["initial_lr"] = group["lr"]
    stacked = StackedGPT(together)
    assert all(torch.equal(a, b) for a, b in pairs(alone, together))
    stepper = StackedAdamW(stacked, optimizers[RUNS:])
    for step in range(4):
        inputs, targets = batch(step)
        losses = stacked.losses(inputs, targets)
        stepper.zero_grad()
        losses.sum().backward()
        norms = stepper.clip(0.5)
        stepper.step()
        for k, (model, optimizer) in enumerate(zip(alone, optimizers[:RUNS], strict=True)):
            loss = F.cross_entropy(model(inputs[k]).flatten(0, 1), targets[k].flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            torch.testing.assert_close(losses[k].detach(), loss.detach(), **tolerance(dtype))
            torch.testing.assert_close(norms[k], norm, **tolerance(dtype))
    assert len(stepper.spans) == 2
    for one, other in pairs(alone, together):
        torch.testing.assert_close(one, other, **tolerance(dtype))
    for k in range(RUNS):
        one_state, other_state = optimizers[k].state_dict(), stepper.hand_over(k).state_dict()
        assert one_state["param_groups"] == other_state["param_groups"]
        torch.testing.assert_close(one_state["state"], other_state["state"], **tolerance(dtype))


def pairs(some: list[GPT], others: list[GPT]) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(some, others, strict=True):
        yield from zip(one.state_dict().values(), other.state_dict().values(), strict=True)


def test_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn_is_there():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr("tinygpt.training.stacked.LEAST_PRODUCT", 0)
    found = []
    try:
        for used in (False, True):
            use_onednn(used)
            stacked = StackedGPT(make_models({}, torch.float32))
            losses = stacked.losses(*batch(0))
            losses.sum().backward()
            found.append([losses, *(weight.grad for weight in stacked.weights.values())])
    finally:
        use_onednn(None)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_under_autocast_as_a_lone_model() -> None:
    alone, together = make_models(LLAMA, torch.float32), make_models(LLAMA, torch.float32)
    stacked, (inputs, targets) = StackedGPT(together), batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = stacked.losses(inputs, targets)
        for k, model in enumerate(alone):
            wanted = F.cross_entropy(model(inputs[k]).flatten(0, 1), targets[k].flatten())
            torch.testing.assert_close(losses[k], wanted, rtol=1e-3, atol=0.0)
    losses.sum().backward()
    assert all(w.grad is not None and w.grad.dtype == w.dtype for w in stacked.weights.values())


def test_a_frozen_place_stays_zero_and_moves_no_other_bit() -> None:
    found = []
    for freezing in (False, True):
        models = make_models({}, torch.float32)
        optimizers = [make_optimizer(m, AdamOptim(learning_rate=1e-2), fused=True) for m in models]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        stacked = StackedGPT(models)
        stepper = StackedAdamW(stacked, optimizers)
        for step in range(6):
            if freezing and step == 2:
                stacked.weights["norm_final.weight"].data[1, 3] = float("nan")
            if freezing and step == 3:
                stepper.freeze(1)
            stepper.zero_grad()
            stacked.losses(*batch(step)).sum().backward()
            stepper.clip(1.0)
            stepper.step()
        found.append([weight.detach().clone() for weight in stacked.weights.values()])
    for plain, frozen in zip(*found, strict=True):
        assert torch.equal(plain[0], frozen[0])
        assert torch.equal(plain[2], frozen[2])
        assert not frozen[1].any()


# --- whole runs


@pytest.fixture
def runs(
    corpus: Path, cache: Path, tmp_path: Path
) -> Callable[..., list[tuple[Config, list[str]]]]:
    """The runs of a study by seed and rate, of an uneven rhythm."""

    def make(
        study: str, members: list[tuple[int, float]], *more: str
    ) -> list[tuple[Config, list[str]]]:
        jobs = []
        for seed, rate in members:
            words = tiny(corpus, "hardware.micro_batch_size=4", "train.log_every=3")
            words += ["train.eval_every=1024", "train.checkpoint_every=1280", *more]
            words += [f"output_dir={tmp_path}", f"cache_dir={cache}", f"study={study}"]
            words += [f"seed={seed}", f"optim.learning_rate={rate}", f"run_name=r{seed}"]
            jobs.append((cli.compose_config(words), words))
        return jobs

    cli.register_schemas()
    return make


MEMBERS = [(1, 1e-2), (2, 1e-3), (3, 1e-2)]
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "seconds_training", "mfu"}


def rows(run: Path) -> list[dict[str, float]]:
    """What was measured of the run itself; -1 where nothing was."""
    with (run / "metrics.csv").open() as file:
        return [
            {k: float(v or -1) for k, v in row.items() if k not in MEASURED}
            for row in csv.DictReader(file)
        ]


def weights(run: Path, name: str = "final") -> dict[str, Tensor]:
    path = run / "checkpoints" / f"{name}.ckpt"
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def statuses(ends: list[End]) -> list[Any]:
    return [end if isinstance(end, Exception) else end["status"] for end in ends]


def files(run: Path) -> list[str]:
    names = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    return sorted("events" if "tfevents" in name else name for name in names)


def form(value: Any) -> Any:
    """What a checkpoint is made of: keys, types and shapes."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.stride(), value.untyped_storage().nbytes())
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    return [form(item) for item in value] if isinstance(value, list | tuple) else type(value)


def test_a_stack_leaves_what_lone_runs_leave(runs: Any, tmp_path: Path) -> None:
    exact = ["train.precision=64", "train.keep_every=1280"]
    ends = train_stack(runs("stack", MEMBERS, *exact), QUIET)
    assert statuses(ends) == ["finished"] * 3
    assert [end["seed"] for end in ends if isinstance(end, dict)] == [1, 2, 3]
    for config, overrides in runs("alone", MEMBERS[:2], *exact):
        results = train(config, overrides, QUIET)
        one, other = (tmp_path / study / str(config.run_name) for study in ("alone", "stack"))
        assert files(one) == files(other)
        stacked = json.loads((other / "results.json").read_text())
        assert list(stacked) == list(results)
        assert (results["stacked"], stacked["stacked"]) == (None, 3)
        for key in set(results) - MEASURED - {"study", "stacked"}:
            wanted = results[key]
            close = pytest.approx(wanted, rel=1e-8) if isinstance(wanted, float) else wanted
            assert stacked[key] == close, key
        for row, wanted in zip(rows(other), rows(one), strict=True):
            assert row == pytest.approx(wanted, rel=1e-8)
        for name, tensor in weights(one).items():
            torch.testing.assert_close(weights(other)[name], tensor, **tolerance(torch.float64))
        saved = [torch.load(run / "checkpoints" / "step_5.ckpt") for run in (one, other)]
        assert form(saved[0]) == form(saved[1])
        assert list(saved[0]) == list(saved[1])
        assert saved[0]["loops"]["fit_loop"] == saved[1]["loops"]["fit_loop"]
        groups = [state["optimizer_states"][0]["param_groups"] for state in saved]
        for group, wanted in zip(groups[1], groups[0], strict=True):
            assert group == {**wanted, "lr": pytest.approx(wanted["lr"])}
        logs = [
            [line[24:].split(" tokens")[0] for line in (run / "run.log").read_text().splitlines()]
            for run in (one, other)
        ]
        assert logs[0][:-9] == logs[1][:-9]


def test_a_run_that_diverges_harms_no_other(runs: Any, tmp_path: Path) -> None:
    more = ["train.grad_clip_norm=null", "train.log_every=1"]
    healthy = train_stack(runs("healthy", [*MEMBERS[:2], (3, 0.02)], *more), QUIET)
    ends = train_stack(runs("ill", [*MEMBERS[:2], (3, 1e30)], *more), QUIET)
    assert statuses(healthy) == ["finished"] * 3
    assert statuses(ends) == ["finished", "finished", "diverged"]
    for name in ("r1", "r2"):
        one, other = tmp_path / "healthy" / name, tmp_path / "ill" / name
        assert rows(one) == rows(other)
        assert all(torch.equal(t, weights(other)[n]) for n, t in weights(one).items())
    assert "diverged" in (tmp_path / "ill/r3/run.log").read_text()
    assert "diverged" not in (tmp_path / "ill/r1/run.log").read_text()
    assert len(rows(tmp_path / "ill/r3")) < len(rows(tmp_path / "ill/r1"))
    again = train_stack(runs("ill", [*MEMBERS[:2], (3, 1e30)], *more), QUIET)
    assert statuses(again) == statuses(ends)


def test_one_that_stops_early_harms_no_other(runs: Any, tmp_path: Path) -> None:
    """At so small a rate no weight moves, and no evaluation is better than the first."""
    more = ["train.early_stopping_patience=1"]
    ends = train_stack(runs("s", [MEMBERS[0], (2, 1e-30), MEMBERS[2]], *more), QUIET)
    assert statuses(ends) == ["finished", "stopped_early", "finished"]
    config, overrides = runs("alone", [(2, 1e-30)], *more)[0]
    results = train(config, overrides, QUIET)
    one, other = tmp_path / "alone/r2", tmp_path / "s/r2"
    assert files(one) == files(other)
    assert isinstance(ends[1], dict)
    assert ends[1]["total_steps"] == results["total_steps"] < 12
    assert ends[1]["test_loss"] == pytest.approx(results["test_loss"])
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=0.0, atol=1e-28)


def interrupt_at(step: int, jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a stack that is sent a SIGTERM while it takes a step."""
    calls = []
    losses = StackedGPT.losses

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == step * 2:  # two passes a step
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StackedGPT, "losses", counted)
        with pytest.raises(SystemExit) as stop:
            train_stack(jobs, QUIET)
    assert stop.value.code == 128 + signal.SIGTERM


def test_an_interrupted_stack_goes_on_as_if_undisturbed(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert statuses(train_stack(runs("whole", MEMBERS), QUIET)) == ["finished"] * 3
    interrupt_at(7, runs("cut", MEMBERS), monkeypatch)
    assert not list((tmp_path / "cut").glob("*/results.json"))
    assert "stopped by SIGTERM at step 7" in (tmp_path / "cut/r2/run.log").read_text()
    assert statuses(train_stack(runs("cut", MEMBERS), QUIET)) == ["finished"] * 3
    for name in ("r1", "r2", "r3"):
        one, other = tmp_path / "whole" / name, tmp_path / "cut" / name
        assert rows(one) == rows(other)
        assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()
        assert all(torch.equal(t, weights(other)[n]) for n, t in weights(one).items())


def test_stacked_and_alone_take_over_from_each_other(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun in a stack, one goes on alone; and the other two in a stack without it."""
    interrupt_at(5, runs("mixed", MEMBERS), monkeypatch)
    config, overrides = runs("mixed", MEMBERS)[0]
    assert train(config, overrides, QUIET)["status"] == "finished"
    assert statuses(train_stack(runs("mixed", MEMBERS), QUIET)) == ["finished"] * 3
    for config, overrides in runs("alone", MEMBERS):
        train(config, overrides, QUIET)
        one, other = tmp_path / "alone" / str(config.run_name), tmp_path / "mixed"
        for row, wanted in zip(rows(other / one.name), rows(one), strict=True):
            assert row == pytest.approx(wanted, rel=1e-3)
    sizes = [json.loads((tmp_path / f"mixed/r{n}/results.json").read_text()) for n in (1, 2, 3)]
    assert [results["stacked"] for results in sizes] == [None, 2, 2]


def test_one_that_cannot_begin_hides_no_other(runs: Any, tmp_path: Path) -> None:
    jobs = runs("s", MEMBERS)
    (tmp_path / "s" / "r2").mkdir(parents=True)
    (tmp_path / "s" / "r2" / "checkpoints").write_text("in the way")
    (tmp_path / "s" / "r2" / "run.log").touch()
    first, second, third = train_stack(jobs, QUIET)
    assert isinstance(second, Exception)
    assert statuses([first, third]) == ["finished", "finished"]


def test_one_that_cannot_write_hides_no_other(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt.rundir import MetricsFile

    append = MetricsFile.append

    def fail(self: MetricsFile, row: Any) -> None:
        if "r2" in str(self.path) and row["step"] > 3:
            raise OSError("the disk is gone")
        append(self, row)

    monkeypatch.setattr(MetricsFile, "append", fail)
    ends = train_stack(runs("s", MEMBERS), QUIET)
    assert [type(end) for end in ends] == [dict, OSError, dict]
    assert "the disk is gone" in (tmp_path / "s/r2/error.json").read_text()
    assert "Traceback" in (tmp_path / "s/r2/run.log").read_text()
    assert "Traceback" not in (tmp_path / "s/r1/run.log").read_text()


# --- which runs, and the command


def test_which_runs_train_as_one(corpus: Path, cache: Path, tmp_path: Path) -> None:
    words = tiny(corpus, f"cache_dir={cache}", f"output_dir={tmp_path}", "seed=1,2,3,4,5")
    words += ["optim.learning_rate=1e-3,2e-3", "model.d_model=8,16", "model.dropout=0,0.1"]
    jobs = sweep(*words)
    prepare(jobs, QUIET)
    for asked, sizes in (("off", [1] * 40), ("4", [1] * 20 + [3, 3, 4] * 2), ("auto", [])):
        jobs[0].config.sweep.stack = asked
        said: list[str] = []
        found = stacking.groups(jobs, said.append)
        assert sorted(job.label for group in found for job in group) == sorted(
            job.label for job in jobs
        )
        for group in found:
            assert len({job.config.model.d_model for job in group}) == 1
        if sizes:
            assert sorted(map(len, found)) == sorted(sizes)
        else:
            assert max(map(len, found)) > 4
        line = "sweep.stack=4: 20 runs train alone: model.dropout=0.1, not 0"
        assert said == ([line] if asked == "4" else [])
        assert stacking.could_stack(jobs) == 20
        assert [o.status for o in lost(found[0], "killed", "x")] == ["killed"] * len(found[0])


@pytest.mark.parametrize("value", ["1", "0", "-2", "all", "2.5", "true"])
def test_what_a_stack_may_be(value: str) -> None:
    cli.register_schemas()
    with pytest.raises(ConfigError) as error:
        cli.compose_config([f"sweep.stack={value}"])
    assert "must be off, auto or a number of runs, at least 2" in str(error.value)
    assert str(error.value).lower().startswith(f"sweep.stack={value}")
    with pytest.raises(ConfigError, match=r"sweep\.stack=auto: needs --multirun"):
        cli.check_single(cli.compose_config(["sweep.stack=auto"]), ["sweep.stack=auto"])


def test_a_sweep_of_stacks(tinygpt: Command, corpus: Path, tmp_path: Path) -> None:
    words = tiny(corpus, "--multirun", "seed=1,2,3,4", "fit=false")
    one = tinygpt("run", *words, "sweep.stack=4", "study=one")
    assert one.returncode == 0, one.stderr
    assert "4 runs: 4 finished" in one.stdout
    local = ["sweep.stack=auto", "launcher=local", "launcher.n_jobs=2", "study=two"]
    two = tinygpt("run", *words, *local)
    assert two.returncode == 0, two.stderr
    found = [read_summary(tmp_path / "outputs" / name) for name in ("one", "two")]
    assert [row["stacked"] for row in found[0]] == ["4"] * 4
    assert [row["stacked"] for row in found[1]] == ["2"] * 4
    for row, other in zip(*found, strict=True):
        wanted = pytest.approx(float(row["final_val_loss"]), rel=1e-4)
        assert float(other["final_val_loss"]) == wanted


@pytest.mark.slow
def test_a_stack_killed_at_any_moment_loses_nothing(
    tinygpt: Command, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    words = tiny(corpus, "--multirun", "seed=1,2,3", "train.steps=1500", "fit=false")
    words += ["train.checkpoint_every=2560", "train.eval_every=25_600", "sweep.stack=3"]
    whole = tinygpt("run", *words, "study=whole")
    assert whole.returncode == 0, whole.stderr
    chance = random.Random(0)
    killed = tmp_path / "outputs/killed"
    for _ in range(5):
        process, begun = start([*words, "study=killed"], tmp_path, cache), time.time()
        wait_until(lambda: any(p.stat().st_mtime > begun for p in killed.glob("*/metrics.csv")))  # noqa: B023
        time.sleep(chance.uniform(0.0, 1.2))
        kill_group(process)
    assert not list(killed.glob("*/results.json"))
    done = tinygpt("run", *words, "study=killed")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [read_summary(tmp_path / "outputs" / name) for name in ("whole", "killed")]
    for row, other in zip(*found, strict=True):
        assert (row["run_name"], row["status"]) == (other["run_name"], other["status"])
        for name in ("final_val_loss", "best_val_loss", "final_train_loss", "test_loss"):
            assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-3)
