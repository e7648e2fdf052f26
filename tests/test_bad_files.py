"""Files from elsewhere that are strange as a whole, where tests/fuzz changes them byte by byte."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import Command
from tests.fuzz.harness import Harness
from tests.fuzz.tables import read
from tests.test_fuzz import HARNESSES
from tinygpt import cli, fileio
from tinygpt.adaptation import prompted
from tinygpt.adaptation.policies import ReplayPolicy
from tinygpt.config import ConfigError, CustomData
from tinygpt.data.corpora import open_corpus, split_documents
from tinygpt.data.huggingface import read_tokenizer
from tinygpt.runs.load import load_run
from tinygpt.scaling.runs import comparable, load_runs
from tinygpt.scaling.tables import read_table

NAMED: dict[str, Harness] = {harness.name: harness for harness in HARNESSES}
RUN = Path(__file__).parent / "fuzz" / "run"


def texts(path: Path, **keys: Any) -> list[str]:
    config = CustomData(name="custom", path=str(path), **keys)
    return [document.text for _, document in split_documents(open_corpus(config), config)]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(read: Callable[[], object]) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as error:
        read()
    return str(error.value)


# --- corpora


def test_numbers_beyond_any(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "one", "n": 1e999, "m": NaN, "text": "two"}\n')
    assert texts(path) == ["two"]  # of a key given twice JSON's last counts
    written(path, '{"text": "one"}\n{"text": "two", "n": ' + "9" * 10_000 + "}\n")
    assert refused(lambda: texts(path)).startswith(f"data.path={path}: line 2 is not JSON (")


def test_a_hundred_thousand_columns(tmp_path: Path) -> None:
    """A hundred rows of them, each a dictionary, would be gigabytes."""
    names = [f"c{n}" for n in range(100_000)]
    rows = "".join(",".join([f"word{n}"] * len(names)) + "\n" for n in range(5))
    path = written(tmp_path / "wide.csv", ",".join(names) + "\n" + rows)
    assert texts(path, text_column="c7") == [f"word{n}" for n in range(5)]
    line = refused(lambda: texts(path, text_column="text"))
    assert line.endswith(f"{path} has no such column; it has {', '.join(names[:12])}, ...")


STRANGE_COLUMNS = {
    "a date of no calendar": pa.array([2**31 - 1], pa.date32()),
    "a time of no calendar": pa.array([2**62], pa.timestamp("us")),
    "a zone that is nowhere": pa.array([1], pa.timestamp("us", tz="Nowhere/City")),
    "a field twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
    "bytes that are no text": pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    ),
}


@pytest.mark.parametrize("column", STRANGE_COLUMNS.values(), ids=STRANGE_COLUMNS)
def test_parquet_of_what_python_has_not(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"], "x": column}), path)
    assert refused(lambda: texts(path)).startswith(f"data.path={path}: not readable as parquet (")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_parquet_of_any_kind_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["one", None, "two"], kind)}), path)
    assert texts(path) == ["one", "", "two"]


def test_links_and_names_of_a_folder(tmp_path: Path) -> None:
    """What is no file is passed over; a name need not be UTF-8."""
    folder = tmp_path / "folder"
    written(Path(os.fsdecode(bytes(folder) + b"/caf\xe9.txt")), "named")
    (folder / "itself.txt").symlink_to("itself.txt")
    os.mkfifo(folder / "pipe.txt")
    assert texts(folder) == texts(Path(f"{folder}/**/*.txt")) == ["named"]
    for name in ("itself.txt", "pipe.txt"):
        assert refused(partial(texts, folder / name)).endswith(": not a file")


LINES = """
import resource, sys
from tinygpt.config import CustomData
from tinygpt.data.corpora import open_corpus, split_documents
config = CustomData(name="custom", path=sys.argv[1])
open_corpus(config).fingerprint()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(len(document.text) for _, document in split_documents(open_corpus(config), config))
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["word ", "x", "\n", "\n \t", "é\u3000"])
def test_a_gigantic_line_is_read_in_pieces(tmp_path: Path, piece: str) -> None:
    """Three hundred megabytes without an end, or nothing but ends, in constant memory."""
    path, size = tmp_path / "line.txt", 300 << 20
    block = piece.encode() * ((1 << 20) // len(piece.encode()))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(block)
        file.write(b"end")
    command = [sys.executable, "-c", LINES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, megabytes = map(int, done.stdout.split())
    assert found <= path.stat().st_size
    assert found > (0 if piece.isspace() else size // 4)
    assert megabytes < 100


# --- records of runs


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("run_results", "x"),
        ("run_loaded", "x"),
        ("run_environment", "packages"),
        ("shards_index", "x"),
        ("tokenizer_own", "x"),
        ("tokenizer_foreign", "normalizer"),
        ("tokenizer_settings", "eos_token"),
        ("model_config", "rope_scaling"),
        ("model_index", "weight_map"),
        ("edit", "text"),
    ],
)
@pytest.mark.parametrize(("begin", "end"), ["[]", ('{"a":', "}")])
def test_nesting_of_any_depth(name: str, key: str, begin: str, end: str) -> None:
    """One depth is just what the reader can take and what works with its result cannot."""
    folder = NAMED[name].seed_folder()
    seed = next(path for path in sorted(folder.iterdir()) if not path.name.startswith("found"))
    content = json.dumps({**json.loads(seed.read_bytes()), "é": "é", key: "HERE"})
    for depth in (*range(1, 100, 33), *range(880, 1010, 3), 10_000):
        nested = begin * depth + "1" + end * depth
        NAMED[name].refuses(content.replace('"HERE"', nested).encode())


@pytest.mark.parametrize("text", ["seed: {}", "other: {}"])
@pytest.mark.parametrize(("begin", "end"), ["[]", ("{a: ", "}")])
def test_yaml_of_any_depth(tmp_path: Path, text: str, begin: str, end: str) -> None:
    for depth in (50, 110, 990, 5000):
        path = written(tmp_path / "a.yaml", text.format(begin * depth + "1" + end * depth))
        if depth < fileio.DEEPEST:
            assert fileio.read_yaml(path)
        else:
            assert refused(partial(fileio.read_yaml, path)).startswith(f"{path}: not a ")


def copied(folder: Path, **changes: Any) -> Path:
    """The minute run, with other results; None: without that value."""
    run = Path(folder, "run")
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(RUN, run)
    results = json.loads((run / "results.json").read_bytes()) | changes
    kept = {name: value for name, value in results.items() if value is not None}
    written(run / "results.json", json.dumps(kept))
    return run


@pytest.mark.parametrize("name", ["tokenizer_fingerprint", "status", "total_steps"])
def test_results_that_lack_what_is_used(tmp_path: Path, name: str) -> None:
    run = copied(tmp_path / "lack", **{name: None})
    assert refused(lambda: load_run(run)).startswith(f"{run}/results.json: {name}=None: must be a ")
    run = copied(tmp_path / "other", **{name: [1]})
    assert refused(lambda: load_run(run)).startswith(f"{run}/results.json: {name}=[1]: must be a ")


def test_runs_of_which_little_is_known(tmp_path: Path) -> None:
    """Two without a hash are not the same run; without a rate none is better."""
    nothing = dict.fromkeys(("config_hash", "learning_rate"))
    for name in ("one", "two"):
        copied(tmp_path / name, **nothing)
    used, left = comparable(load_runs(tmp_path), "final_val_loss")
    assert (len(used), len(left)) == (2, 0)


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, tinygpt: Command) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    run = copied(folder)
    shown = f"error: {tmp_path}/caf\\udce9/run: its name is not UTF-8; rename it\n"
    for command, argument in (("fit", f"runs={folder}"), ("sample", f"run={run}")):
        done = tinygpt(command, argument)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", shown)


def checkpoint(**changes: Any) -> dict[str, Any]:
    """What is no checkpoint of the minute run, though torch reads it."""
    path = RUN / "checkpoints" / "final.ckpt"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return {**found, **changes}


def weights_as(kind: torch.dtype) -> dict[str, Any]:
    return {name: value.to(kind) for name, value in checkpoint()["state_dict"].items()}


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "whole numbers": lambda: checkpoint(state_dict=weights_as(torch.int64)),
    "complex numbers": lambda: checkpoint(state_dict=weights_as(torch.complex64)),
    "eighths of a number": lambda: checkpoint(state_dict=weights_as(torch.float8_e4m3fn)),
    "no numbers": lambda: checkpoint(state_dict=dict.fromkeys(checkpoint()["state_dict"], "x")),
    "no names": lambda: checkpoint(state_dict={5: torch.zeros(1)}),
    "a list": lambda: checkpoint(state_dict=[1]),
    "steps before the first": lambda: checkpoint(global_step=-5),
    "steps without end": lambda: checkpoint(global_step=10**400),
    "a tensor": lambda: torch.zeros(3),
}


@pytest.mark.parametrize("content", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_strange_values(content: Callable[[], Any], tmp_path: Path) -> None:
    run = copied(tmp_path)
    path = run / "checkpoints" / "final.ckpt"
    torch.save(content(), path)
    assert refused(lambda: load_run(run)) == f"{path}: this checkpoint is damaged"


def test_a_checkpoint_that_swells(tmp_path: Path) -> None:
    """A kilobyte can be a terabyte once it is unpacked."""
    run = copied(tmp_path)
    path = run / "checkpoints" / "final.ckpt"
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    assert refused(lambda: load_run(run)) == f"{path}: this checkpoint is damaged"


# --- tables for the fit

ROWS = {"params": [1e6, 2e6, 3e6], "tokens": [1e7, 3e7, 2e7], "loss": [3.0, 2.5, 2.6]}
STRANGE = {
    "a list is a loss": ({"loss": [[1], [2], [3]]}, "loss=[1]: row 1: must be a number"),
    "a table is a size": ({"params": [{"a": 1}] * 3}, "params={'a': 1}: row 1: must be a number"),
    "a rate in words": ({"learning_rate": ["a", "1", "2"]}, "learning_rate=a: row 1: must be a nu"),
    "a date is a size": ({"params": [datetime.date(2020, 1, 1)] * 3}, "params=2020-01-01: row 1"),
    "a long number": ({"params": ["9" * 5000] * 3}, f"params={'9' * 40}: row 1: must be a number"),
    "tokenizers": ({"tokenizer_fingerprint": ["a", "b", "b"]}, "runs: several tokenizers (a, b)"),
    "columns": ({f"c{n}": [1] * 3 for n in range(10_000)}, "has 10003 columns; at most 10000 are"),
}


@pytest.mark.parametrize(("columns", "line"), STRANGE.values(), ids=STRANGE)
def test_a_table_of_strange_columns(columns: dict[str, Any], line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**ROWS, **columns}), path)
    said = refused(lambda: read(".parquet", path.read_bytes()))
    assert line in said
    assert "\n" not in said


def test_text_of_a_table_that_is_none(tmp_path: Path) -> None:
    """Arrow hands it over unread; whoever looks at it first would fail."""
    path = tmp_path / "a.parquet"
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    name = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    pq.write_table(pa.table({**ROWS, "name": name}), path)
    assert refused(lambda: read_table(path)).startswith(f"table={path}: cannot be read (")


def test_a_tokenizer_that_swells(tmp_path: Path) -> None:
    seed = NAMED["tokenizer_foreign"].seed_folder() / "wordlevel"
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
    steps = {"type": "Sequence", "normalizers": [step] * 9}
    written(
        tmp_path / "tokenizer.json",
        json.dumps(json.loads(seed.read_bytes()) | {"normalizer": steps}),
    )
    written(tmp_path / "tokenizer_config.json", '{"eos_token": "<|endoftext|>"}')
    assert refused(lambda: read_tokenizer(tmp_path)).endswith(
        "(makes 1000000000 characters of one)"
    )


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("params > 10**10**10", "**"),
        ("params > 9**99999999", "**"),
        ("params > (10**999)**999", ")**"),
        ("name.str.pad(2000000000) == 'a'", ".pad("),
        ("name.str.repeat(2000000000) == 'a'", ".repeat("),
    ],
)
def test_a_condition_without_end(where: str, what: str) -> None:
    table = pd.DataFrame({**ROWS, "name": ["a", "b", "c"]})
    said = refused(lambda: comparable(table, "loss", where))
    assert said == f"where={where}: {what} has no place in it"
    for powers in ("params >= 10**6", "(tokens / params)**2 > 1", "params < 2 ** 40.5"):
        assert len(comparable(table, "loss", powers)[0]) == 3


# --- words

LONG = [
    "model.d_model=" + "1" * 5000,
    "model.d_model=[" + "1," * 40_000 + "1]",
    "model." * 3000 + "x=1",
    "data.path=" + "${oc.env:" * 5000,
    "seed=" + "{a:" * 400 + "1" + "}" * 400,
    "seed=" + "[" * 3000,
    "experiment=" + "x" * 300,
]


@pytest.mark.parametrize("word", LONG, ids=lambda word: word[:20])
@pytest.mark.parametrize("multirun", [False, True])
def test_a_word_without_end(word: str, multirun: bool) -> None:
    line = refused(
        lambda: (
            cli.sweeps(cli.RUN, [word], multirun=True) if multirun else cli.compose_config([word])
        )
    )
    assert line.startswith(word[:20])


def test_what_a_file_says_moves_no_cursor(tmp_path: Path, tinygpt: Command) -> None:
    path = written(tmp_path / "a.csv", "params,tokens,loss\n1,\x1b[2J\x07,3\n")
    columns = ("columns.n=params", "columns.d=tokens", "columns.loss=loss")
    done = tinygpt("fit", f"table={path}", *columns)
    assert done.returncode == 2
    assert done.stderr == "error: tokens=\\x1b[2J\\x07: row 1: must be a number\n"


@pytest.mark.parametrize("value", ["many", [1], -1, 1e9])
def test_a_policy_of_no_length(value: Any, tmp_path: Path) -> None:
    written(tmp_path / "config.json", json.dumps({"n_positions": value}))
    line = refused(lambda: prompted._context(str(tmp_path)))
    assert line.startswith(f"policy.path={tmp_path}: max_position_embeddings={value!r}: must be a ")


def test_edits_nested_too_deeply(tmp_path: Path) -> None:
    path = written(tmp_path / "edits.jsonl", "[" * 100_000)
    line = refused(lambda: ReplayPolicy(str(path)))
    assert line == f"policy.path={path}: line 1: not JSON (nested too deeply)"
