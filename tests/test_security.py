"""What comes from elsewhere is data, never code; and nothing leads out of its folder."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from tests.conftest import ROOT, Command
from tests.fuzz.folders import RUN
from tests.fuzz.models import GPT2
from tinygpt import cli
from tinygpt.config import ConfigError
from tinygpt.data.huggingface import read_tokenizer
from tinygpt.data.tokenizers import load_tokenizer
from tinygpt.model.huggingface import read_weights
from tinygpt.runs import rundir
from tinygpt.runs.load import load_run
from tinygpt.scaling import document
from tinygpt.scaling.runs import comparable
from tinygpt.training.trainer import AtomicCheckpoints

SOURCES = {
    path: ast.parse(path.read_text())
    for folder in ("tinygpt", "hydra_plugins")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


# --- pickles


class Code:
    """Unpickled it makes a file, as it could do anything."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def code(tmp_path: Path) -> Code:
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Code(sprung)))
    sprung.rmdir()  # the trap works
    return Code(sprung)


def refused(reader: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        reader(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    "save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))]
)
def test_a_checkpoint_with_code_is_refused(tmp_path: Path, code: Code, save: Any) -> None:
    run = shutil.copytree(RUN, tmp_path / "run")
    weights = torch.load(RUN / "checkpoints/final.ckpt", weights_only=True)
    last = run / "checkpoints" / "final.ckpt"
    save({**weights, "more": code}, last)
    assert refused(load_run, run).startswith(f"{last}: ")
    assert refused(AtomicCheckpoints().load_checkpoint, last).startswith(f"{last}: ")
    assert not code.canary.exists()


def test_pickled_weights_of_hugging_face_are_not_opened(tmp_path: Path, code: Code) -> None:
    folder = shutil.copytree(GPT2, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": code}, folder / "pytorch_model.bin")
    assert "pickled" in refused(read_weights, folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model.bin"}}'
    )
    assert "pytorch_model.bin: " in refused(read_weights, folder)
    assert not code.canary.exists()


def test_a_pickled_tokenizer_is_refused(tmp_path: Path, code: Code) -> None:
    (tmp_path / "tokenizer.json").write_bytes(pickle.dumps(code))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refused(load_tokenizer, tmp_path / "tokenizer.json")
    refused(read_tokenizer, tmp_path)
    assert not code.canary.exists()


# --- configurations


@pytest.mark.parametrize(
    "word",
    [
        "+model._target_=os.mkdir",
        "+logger.x={_target_: os.mkdir}",
        "hydra.sweeper._target_=os.mkdir",
        "hydra.launcher._target_=os.mkdir",
        "+hydra.sweeper.sampler={_target_: os.mkdir, path: sprung}",
        "+hydra.callbacks.x={_target_: os.mkdir, path: sprung}",
        "+hydra.callbacks.x.y=[{_target_: os.mkdir}]",
        "+hydra.callbacks.x._target_=${study}",
        '+hydra.job_logging.handlers.x={"()": os.mkdir, path: sprung}',
        "+hydra.job_logging.handlers.x.class=logging.config.fileConfig",
        "+hydra.job_logging.handlers.x.stream=ext://os.mkdir",
        "+sweep.smoke.x={_target_: os.mkdir}",
    ],
)
def test_a_configuration_names_no_code(word: str) -> None:
    for multirun in (False, True):
        line = refused(cli.sweeps, cli.RUN, [word, "study=os.mkdir"], multirun)
        assert line.endswith(": names code that no configuration may call") or "cannot be" in line


def test_what_ships_is_allowed() -> None:
    choices = [[], ["experiment=width"], ["hydra/sweeper=basic", "hydra/launcher=basic"]]
    choices += [["hydra/job_logging=default", "hydra/hydra_logging=default"]]
    choices += [["hydra/job_logging=disabled"], ["hydra/job_logging=stdout"]]
    for words in choices:
        cli.sweeps(cli.RUN, words, multirun=True)


def test_nothing_is_called_by_the_command(tinygpt: Command, tmp_path: Path) -> None:
    words = "+hydra.callbacks.x={_target_: os.mkdir, path: sprung}"
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Code(tmp_path / "sprung")))
    (tmp_path / "config.yaml").write_text(
        "hydra: {callbacks: {x: {_target_: os.mkdir, path: sprung}}}"
    )
    for given in ([words], [f"--config-dir={tmp_path}"], ["--experimental-rerun", "x.pickle"]):
        ran = tinygpt("run", *given)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "where",
    [
        "@pd.io.common.os.mkdir('sprung') == 1",
        "loss.to_csv('sprung') == 1",
        "loss.__class__ == 1",
        "name == '\\'' or @pd.io.common.os.mkdir('x') or name == '\\''",
    ],
)
def test_a_condition_calls_nothing(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    table = pd.DataFrame({"loss": [1.0, 2.0], "name": ["a", "b"]})
    assert "has no place in it" in refused(comparable, table, "loss", where)
    assert not list(tmp_path.iterdir())


def test_a_condition_may_look() -> None:
    table = pd.DataFrame({"loss": [1.0, 2.0], "name": ["a@x", "b"], "n .to(": [1, 2]})
    for where in (
        "name == 'a@x'",
        "name.str.startswith('a')",
        "`n .to(` < 2",
        "loss.between(0, 1)",
    ):
        assert len(comparable(table, "loss", where)[0]) == 1


# --- paths


@pytest.mark.parametrize("key", ["study", "run_name", "data.name"])
@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc/x", "a/b", ".", ".hidden", "a\\b", "a\nb", "~"]
)
def test_names_stay_in_their_folder(key: str, name: str) -> None:
    quoted = name.replace("\\", "\\\\")
    assert refused(cli.compose_config, [f'{key}="{quoted}"']).startswith(key)


def test_a_checkpoint_is_one_of_the_run(tmp_path: Path) -> None:
    run = shutil.copytree(RUN, tmp_path / "run")
    shutil.copy(run / "checkpoints" / "final.ckpt", tmp_path / "x.ckpt")
    (run / "checkpoints" / "step_x.ckpt").touch()
    for name in ("../../x", str(tmp_path / "x"), "step_x"):
        assert refused(load_run, run, name).startswith(f"checkpoint={name}: not in ")


def test_parts_of_a_model_lie_in_its_folder(tmp_path: Path) -> None:
    folder = shutil.copytree(GPT2, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = folder / "model.safetensors.index.json"
        index.write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
        assert refused(read_weights, folder) == f"{index}: not an index of weights"


# --- pages


def test_pages_escape_what_they_are_told(tmp_path: Path) -> None:
    from tinygpt.scaling.document import Code, Heading, Items, Paragraph, Picture, Table

    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    (tmp_path / "x.png").write_bytes(bytes(32))
    blocks: list[document.Block] = [
        *(Heading(evil, 1), Paragraph(f"a `{evil}` b"), Code(evil), Items([evil])),
        *(Table([evil], [[evil]]), Picture("x", evil)),
    ]
    page = document.page(blocks, tmp_path)
    assert "<script" not in page
    assert "<img src" not in page
    assert page.count("&lt;script&gt;") == 9  # the title and a caption stand twice


def test_samples_are_code_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tinygpt.training.loggers import Board

    board = Board(tmp_path, {}, 1, 0.0)
    board.log_text("<script>alert(1)</script>\n# a\x0b[b](javascript:c)\n", 1)
    board.close("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (written,) = events.Tensors("samples/text_summary")
    lines = written.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("    ") for line in lines)


# --- our own code


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_evaluates_text_or_starts_a_shell() -> None:
    for path, tree in SOURCES.items():
        for call in calls(tree):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in ("eval", "exec", "compile", "__import__"), path
            assert name not in ("os.system", "os.popen", "pd.eval", "pd.read_pickle"), path
            assert given.get("shell", "False") == "False", path
            assert given.get("allow_pickle", "False") == "False", path
            if name == "torch.load":
                assert given["weights_only"] == "True", path
            if name == "yaml.load":
                assert {**given, "Loader": given.get("Loader", "")}["Loader"] == "_Loader", path


def test_nothing_unpickles_and_only_libraries_download() -> None:
    unpickling = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
    network = {"urllib", "http", "requests", "httpx", "socket", "ftplib", "aiohttp"}
    for path, tree in SOURCES.items():
        names = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            + [alias.name for alias in node.names if isinstance(node, ast.Import)]
        }
        assert not names & unpickling, path
        if names & network:  # it asks whether anybody answers, and reads nothing
            assert path.name == "network.py"
            requests = [c for c in calls(tree) if ast.unparse(c.func) == "urllib.request.Request"]
            assert all("method='HEAD'" in ast.unparse(request) for request in requests)
            assert ".read()" not in ast.unparse(tree)


def test_a_run_s_configuration_does_not_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    path = tmp_path / "config.yaml"
    for prompt in ("${oc.env:SECRET}", "costs ${5}", "\\${oc.env:SECRET}", "\\\\${oc.env:SECRET}"):
        config = cli.compose_config([])
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        values = yaml.safe_load(text)
        values["train"]["sample_prompt"] = prompt
        path.write_text(yaml.safe_dump(values))
        assert rundir.read_config(path).train.sample_prompt == prompt
        for tables in ({"hardware": prompt}, {"logger": {"mlflow": prompt}}):
            path.write_text(yaml.safe_dump({**values, **tables}))
            with pytest.raises(ConfigError, match="not the configuration of a run"):
                rundir.read_config(path)
