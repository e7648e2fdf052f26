"""Whatever is wrong is said in one line, with exit code 2 (1 where it happens late), and nothing
broken is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import tiny
from tinygpt import cli
from tinygpt.config import BpeTokenizer, ConfigError, CustomData
from tinygpt.data import shards
from tinygpt.data.corpora import open_corpus
from tinygpt.data.files import find_files
from tinygpt.fileio import write_text
from tinygpt.runs.rundir import MetricsFile, RunDir
from tinygpt.sweeping.jobs import compose_jobs, expand
from tinygpt.sweeping.kinds import TRAINING
from tinygpt.training.session import train

# What time and host decide.
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "seconds_training", "mfu"}


@dataclass
class Said:
    code: int
    line: str


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs what ``python -m tinygpt.run`` runs, in this process; it must end in one line."""

    @cli.one_line_errors
    def command(words: list[str]) -> None:
        train(cli.compose_config(words), words, Console(file=io.StringIO()))

    def run(*words: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            command(list(words))
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert isinstance(left.value.code, int)
        return Said(left.value.code, said.err.removeprefix("error: ").rstrip("\n"))

    return run


def trained(*words: str) -> dict[str, Any]:
    return train(cli.compose_config(words), list(words), Console(file=io.StringIO()))


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in MEASURED}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of one's own, with the session's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYGPT_CACHE", str(cache))
    return tmp_path


# --- what the configuration alone shows

MLFLOW = "logger=mlflow logger.mlflow.tracking_uri="
CUSTOM = "data=custom data.path=x "
CHOICES = ": no such choice; there are "
NAMES = ": must be letters, digits, '.', '_', '-' only, as it names a folder"

SCHEMA = [
    # misspelt keys
    ("model.d_modle=64", "model.d_modle: no such key; did you mean model.d_model"),
    ("modle=tiny", "modle: no such key; did you mean model"),
    ("learning_rate=1", "learning_rate=1: no such key; did you mean optim.learning_rate=1?"),
    ("model.foo.bar=3", "model.foo: no such key"),
    ("out=x", "out: no such key; did you mean output_dir?"),
    ("heads=2", "heads: no such key; did you mean model.n_heads or model.n_kv_heads?"),
    ("+new.key=1", "new: no such key"),
    ("+seeed=1", "seeed: no such key; did you mean seed?"),
    ("++model.d_modle=1", "model.d_modle: no such key; did you mean model.d_model"),
    ("model={d_model:32,heads:3}", "model.heads: no such key; did you mean "),
    ("~model.d_model", "~model.d_model: a key cannot be removed, only set"),
    # keys of another choice
    (
        "tokenizer=gpt2 tokenizer.vocab_size=3",
        "tokenizer.vocab_size: not a key of the chosen tokenizer; it is one of tokenizer=bpe",
    ),
    ("data.path=x", "data.path: not a key of the chosen data; it is one of data=custom"),
    ("data={path:x}", "data.path: not a key of the chosen data; it is one of data=custom"),
    ("optim.ns_steps=5", "optim.ns_steps: not a key of the chosen optim; it is one of optim=muon"),
    ("optim.kind=sgd", "optim.kind=sgd: must be one of adamw, adam"),
    ("logger.wandb.project=x", "logger.wandb.project=x: needs logger=wandb"),
    (MLFLOW + "./mlruns", "logger.mlflow.tracking_uri=./mlruns: must be a database or a server"),
    # unknown choices
    ("model=huge", "model=huge" + CHOICES + "gpt2_small, large, medium"),
    ("logger=[csv,foo]", "logger=foo" + CHOICES + "csv, mlflow, tensorboard, wandb"),
    ("hydra/launcher=nope", "hydra/launcher=nope: no such choice"),
    ("model=null", "model=null" + CHOICES + "gpt2_small"),
    ("data=5", "data=5" + CHOICES + "ag_news"),
    ("seed=1 tokenizer=true", "tokenizer=true" + CHOICES + "bpe"),
    # wrong types
    ("model.d_model=abc", "model.d_model=abc: must be an integer"),
    ("model.d_model=null", "model.d_model=null: must be an integer"),
    ("model.d_model=", "model.d_model=: must be an integer"),
    ("model.d_model=[1,2]", "model.d_model=[1,2]: must be an integer"),
    ("model.d_model={a:1}", "model.d_model={a:1}: must be an integer"),
    ("model.rope_scaling.a=1", "model.rope_scaling.a=1: is decided by init_from"),
    ("force=perhaps", "force=perhaps: must be true or false"),
    ("model.dropout=lots", "model.dropout=lots: must be a number"),
    ("optim.betas=0.9", "optim.betas=0.9: must be a list"),
    ("optim.betas=[a,b]", "optim.betas=[a,b]: must be a number"),
    ("train=5", "train=5: must be set key by key"),
    (CUSTOM + "data.path=null", "data.path=null: must be a text"),
    ("model.n_heads=${nothing}", "model.n_heads=${nothing}: Interpolation key 'nothing' not found"),
    # bounds
    ("optim.learning_rate=0", "optim.learning_rate=0.0: must be above 0"),
    ("optim.learning_rate=nan", "optim.learning_rate=nan: must be a finite number"),
    ("optim.betas=[0.9,1.5]", "optim.betas=1.5: must be below 1"),
    ("optim=muon optim.betas=[0.9]", "optim.betas=[0.9]: must be two numbers"),
    ("seed=4294967296", "seed=4294967296: must be at most 4294967295"),
    ("data.fraction=1.1", "data.fraction=1.1: must be at most 1"),
    ("tokenizer.vocab_size=10", "tokenizer.vocab_size=10: must be at least 258"),
    ("hardware.devices=0", "hardware.devices=0: must be at least 1, or -1 for all there are"),
    ("train.precision=bf16", "train.precision=bf16: must be one of auto, 32, 64"),
    ("hardware.threads=100_000_000_000_000", "hardware.threads=100000000000000: must be at most"),
    ("train.steps=10_000_000_000_000_000_000", "train.steps=10000000000000000000: must be at mo"),
    # what does not fit together
    ("model.n_heads=3", "model.n_heads=3: must divide model.d_model=64"),
    ("model.n_kv_heads=3", "model.n_kv_heads=3: must divide model.n_heads=4"),
    ("model.position=rope model.d_model=12", "model.n_heads=4: rope needs an even d_model / n_he"),
    ("train.batch_tokens=1000", "model.max_seq_len=256: must divide train.batch_tokens=1000"),
    ("data.stride=9999", "data.stride=9999: more than model.max_seq_len=256 would skip tokens"),
    ("data.val_fraction=0.6 data.test_fraction=0.5", "data.val_fraction=0.6 and data.test_fracti"),
    ("optim=sgd optim.momentum=0", "optim.nesterov=true: needs optim.momentum above 0"),
    ("train.tokens=1 train.steps=5", "train.steps and train.tokens: give the horizon once"),
    ("train={tokens:1,steps:5}", "train.steps and train.tokens: give the horizon once"),
    # what must be given
    ("data=custom", "data.path: must be given, as data.path=..."),
    ("data=hub", "data.repo: must be given, as data.repo=..."),
    # names of folders, in the outputs and in the cache
    ("run_name=../x", "run_name=../x" + NAMES),
    ("run_name=.hidden", "run_name=.hidden" + NAMES),
    ("run_name=", "run_name=" + NAMES),
    ("study=a/b", "study=a/b" + NAMES),
    ("data.name=../../x", "data.name=../../x" + NAMES),
]

WORDS = [  # one argument each, as it has spaces or quotes
    ("", "'': must be key=value"),
    ("seed", "'seed': must be key=value"),
    ("=5", "'=5': must be key=value"),
    ("seed =1", "'seed =1': must be key=value"),
    ('run_name="é"', "run_name=é" + NAMES),
    ("train.sample_prompt=a=b", "train.sample_prompt=a=b: cannot be read; in quotes it can: 'tra"),
    ("train.sample_prompt=it's", "train.sample_prompt=it's: cannot be read; in quotes it can"),
    ('train.sample_prompt="a', 'train.sample_prompt="a: cannot be read; in quotes it can'),
    ("train.sample_prompt=\udcff", "train.sample_prompt=\udcff: cannot be read"),
    ("train.sample_prompt=a, b", "train.sample_prompt=a, b: several values need --multirun"),
    ("seed=1,2", "seed=1,2: several values need --multirun"),
    ("logger=[csv", "logger=[csv: cannot be read"),
]


def line_of(words: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        cli.compose_config(words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("words", "line"), SCHEMA, ids=[words for words, _ in SCHEMA])
def test_a_bad_configuration(words: str, line: str) -> None:
    assert line_of(words.split()).startswith(line)


@pytest.mark.parametrize(("word", "line"), WORDS, ids=[ascii(word) for word, _ in WORDS])
def test_a_bad_word(word: str, line: str) -> None:
    assert line_of([word]).startswith(line)


@pytest.mark.parametrize(
    "text", ["a=b", "it's", "é 日本", 'say "hi"', "a, b", "{x}: [y]", "back\\slash", "#", "", "\\"]
)
def test_what_the_advice_on_quotes_leads_to(text: str) -> None:
    """Where a value cannot be read as it is, the line gives the word that can."""
    word = f"train.sample_prompt={text}"
    try:
        config = cli.compose_config([word])
    except ConfigError as error:
        line = str(error)
        if "in quotes it can: '" in line:
            word = line.split("in quotes it can: '", 1)[1].removesuffix("'")
        else:
            assert "several values need --multirun" in line
            word = f'train.sample_prompt="{text}"'
        config = cli.compose_config([word])
    assert config.train.sample_prompt == text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.d_model=16,32,abc"], "model.d_model=abc: must be an integer"),
        (["model.d_model=16,18", "seed=1,2"], "model.n_heads=4: must divide model.d_model=18"),
        (["optim=adamw,lino"], "optim=lino: no such choice; there are adafactor, adam, adamw, l"),
        (["optim.learning_rate=1e-3,-1"], "optim.learning_rate=-1.0: must be above 0"),
        (["seed=1,2", "nonsense"], "'nonsense': must be key=value"),
        (["seed=1,2", "x.y=a=b"], "x.y=a=b: cannot be read"),
    ],
)
def test_a_sweep_is_checked_before_its_first_job(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_jobs(expand({}, words), TRAINING)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


# --- what the machine and the data show, before a run folder is made


def story(n: int) -> str:
    return f"Story {n}: a cat saw {n * n} birds."


LONG = (  # documents of 4 kB, a tenth of which are for validation: 30 of them
    "data.path=long.txt: the validation split is empty, as the corpus has only 3 documents; raise "
    "data.val_fraction or give data.val_file, or take more text, about 120 kB in documents of"
)
FILES: dict[str, str | bytes] = {
    "long.txt": "<|endoftext|>".join(str(n) * 4000 for n in range(3)),
    "good.txt": "<|endoftext|>".join(story(n) for n in range(300)),
    "empty.txt": "",
    "blank.txt": " \n\n \n",
    "binary.txt": b"abc\0def",
    "late.txt": b"a good line\n" * 100_000 + b"\xff\n",
    "one.txt": "one document",
    "columns.csv": "a,b\n" + "1,hello\n" * 100,
    "bad.jsonl": '{"text": "x"}\n{oops\n',
    "bad.parquet": b"PAR1 and no more",
    "folder/picture.png": b"\x89PNG",
}
DATA = [
    ("data.path=nowhere.txt", "data.path=nowhere.txt: no such file or folder"),
    ("data.path=*.zip", "data.path=*.zip: no such file or folder"),
    ("data.path=folder", "data.path=folder: no text in there (1 .png); name the files"),
    ("data.path=", "data.path=: must name a file, a folder or a glob"),
    ("data.path=/dev/null", "data.path=/dev/null: not a file"),
    ("data.path=empty.txt", "data.path=empty.txt: this file is empty"),
    ("data.path=blank.txt", "data.path=blank.txt: the training split is empty"),
    ("data.path=binary.txt", "data.path=binary.txt: not a text file (it has NUL bytes)"),
    (
        "data.path=late.txt",
        "data.path=late.txt: not UTF-8 text: invalid start byte at byte 1,200,000, line 100,001",
    ),
    ("data.path=bad.jsonl", "data.path=bad.jsonl: line 2 is not JSON"),
    ("data.path=bad.parquet", "data.path=bad.parquet: not readable as parquet"),
    (
        "data.path=columns.csv data.text_column=body",
        "data.text_column=body: columns.csv has no such column; it has a, b",
    ),
    ("data.val_file=nowhere.txt", "data.val_file=nowhere.txt: no such file or folder"),
    ("data.path=one.txt", "data.path=one.txt: the validation split is empty, as the corpus has"),
    ("data.path=long.txt", LONG),
    (
        "model.max_seq_len=2048 train.batch_tokens=2048",
        "model.max_seq_len=2048: longer than the validation split of ",
    ),
    ("schedule.warmup_steps=12", "schedule.warmup_steps=12: must be below the 12 steps"),
    ("hardware.micro_batch_size=3", "hardware.micro_batch_size=3: must divide the batch of 8 seq"),
    ("train.precision=16-mixed", "train.precision=16-mixed: on cpu one of auto, 32, 64, bf16-mix"),
    ("output_dir=good.txt", "output_dir=good.txt: cannot be written (Not a directory)"),
    ("cache_dir=good.txt", "cache_dir=good.txt: Not a directory"),
    (
        "tokenizer=gpt2 tokenizer.vocab_dir=folder",
        "tokenizer.vocab_dir=folder: must be a folder with encoder.json and vocab.bpe",
    ),
]


@pytest.mark.parametrize(("words", "line"), DATA, ids=[words for words, _ in DATA])
def test_bad_data(
    here: Path, cache: Path, fails: Callable[..., Said], words: str, line: str
) -> None:
    for name, text in FILES.items():
        written(here / name, text)
    before = content(here)
    said = fails(*tiny(Path("good.txt")), *words.split())
    assert said.line.startswith(line)
    assert said.code == 2
    assert not (here / "outputs").exists()
    assert content(here) == before
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_no_network(
    here: Path, fails: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(how, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[how])
    said = fails("data=tinystories", "hardware=cpu")
    assert said.code == 2
    assert said.line.startswith("data.repo=roneneldan/TinyStories: no network")
    assert "data=custom data.path=" in said.line
    assert list(here.iterdir()) == []


def test_no_network_for_gpt2(
    here: Path, corpus: Path, fails: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "none"))
    monkeypatch.setattr("tinygpt.data.network.reachable", lambda url: False)
    said = fails(*tiny(corpus), "tokenizer=gpt2")
    assert said.code == 2
    assert said.line.startswith("tokenizer.kind=gpt2: ")
    assert "tokenizer.vocab_dir=FOLDER" in said.line
    assert list(here.iterdir()) == []


# --- what may not be read or written


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permission bits do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read(open_folder: Path) -> None:
    folder, file = open_folder / "folder", open_folder / "file.txt"
    inside = written(folder / "inside.txt", "text")
    written(file, "text").chmod(0)
    folder.chmod(0)
    for path in (folder, file, inside):
        with unprivileged(), pytest.raises(ConfigError) as error:
            open_corpus(CustomData(name="custom", path=str(path)))
        assert str(error.value) == f"data.path={path}: cannot be read (Permission denied)"
    folder.chmod(0o755)
    with unprivileged():
        assert find_files("data.path", str(folder)) == [inside]


def test_what_cannot_be_written(open_folder: Path, corpus: Path) -> None:
    config = CustomData(name="custom", path=str(corpus))
    opened = open_corpus(config)
    with unprivileged():
        with pytest.raises(ConfigError) as error, RunDir(open_folder / "out" / "s" / "r").locked():
            pytest.fail("the folder cannot be made")
        line = f"output_dir={open_folder / 'out'}: cannot be written (Permission denied)"
        assert str(error.value) == line
        with pytest.raises(ConfigError) as error:
            shards.prepare(opened, config, BpeTokenizer(), open_folder / "cache")
        assert str(error.value) == f"cache_dir={open_folder / 'cache'}: Permission denied"
    assert list(open_folder.iterdir()) == []


# --- a run folder that is not as it should be


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """The output folder of a small finished run, ``outputs/s/r``; to be copied, not changed."""
    outputs = tmp_path_factory.mktemp("finished") / "outputs"
    trained(*words_for(corpus, cache, outputs))
    return outputs


def words_for(corpus: Path, cache: Path, outputs: Path) -> list[str]:
    more = [f"cache_dir={cache}", f"output_dir={outputs}", "study=s", "run_name=r", "logger=csv"]
    return tiny(corpus, "train.eval_every=1024", *more)


@pytest.fixture
def again(here: Path, finished: Path, corpus: Path, cache: Path) -> tuple[Path, list[str]]:
    """A copy of that run's folder, and the words that made it."""
    shutil.copytree(finished, here / "outputs")
    return here / "outputs" / "s" / "r", words_for(corpus, cache, here / "outputs")


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_configuration_in_the_same_folder(
    again: tuple[Path, list[str]], fails: Callable[..., Said], unfinished: bool
) -> None:
    run, words = again
    if unfinished:
        (run / "results.json").unlink()
    before = content(run)
    said = fails(*words, "optim.learning_rate=0.5", "hardware.micro_batch_size=1")
    assert said == Said(
        2,
        f"run_name=r: {run} holds a run of another configuration; it has optim.learning_rate=0.003,"
        " not 0.5; choose another run_name, or force=true replaces it",
    )
    assert content(run) == before
    alone = trained(*words, "optim.learning_rate=0.5", "study=alone")
    forced = trained(*words, "optim.learning_rate=0.5", "force=true")
    assert forced["final_val_loss"] == alone["final_val_loss"]
    assert forced["config_hash"] == alone["config_hash"]
    assert fails(*words).code == 2  # the folder is the other run's now


def test_a_folder_that_is_no_runs(
    here: Path, corpus: Path, cache: Path, fails: Callable[..., Said]
) -> None:
    run = here / "outputs" / "s" / "r"
    written(run / "thesis.tex", "the only copy")
    said = fails(*words_for(corpus, cache, here / "outputs"))
    assert (said.code, said.line) == (2, f"run_name=r: {run} exists and is not a run's folder")
    assert content(run) == {"thesis.tex": b"the only copy"}


def test_another_process_is_training(
    again: tuple[Path, list[str]], fails: Callable[..., Said]
) -> None:
    run, words = again
    (run / "results.json").unlink()
    before = content(run)
    with RunDir(run).locked():
        said = fails(*words)
    assert (said.code, said.line) == (2, f"{run}: another process is training this run")
    assert content(run) == before


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("damage", list(DAMAGE.values()), ids=list(DAMAGE))
def test_a_damaged_checkpoint(
    again: tuple[Path, list[str]], fails: Callable[..., Said], damage: Callable[[bytes], bytes]
) -> None:
    run, words = again
    before = lasting(json.loads((run / "results.json").read_text()))
    (run / "results.json").unlink()
    last = only_last(run)
    last.write_bytes(damage(last.read_bytes()))
    said = fails(*words)
    assert said.code == 2
    assert said.line.startswith(f"{last}: this checkpoint is damaged; remove it")
    last.unlink()
    assert lasting(trained(*words)) == before


def only_last(run: Path) -> Path:
    """With no other checkpoint to fall back to."""
    for path in (run / "checkpoints").iterdir():
        if path.name != "last.ckpt":
            path.unlink()
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["results.json", "environment.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record(
    again: tuple[Path, list[str]], fails: Callable[..., Said], name: str, text: str
) -> None:
    run, words = again
    if name != "results.json":
        (run / "results.json").unlink()
    (run / name).write_text(text)
    before = content(run)
    said = fails(*words)
    assert said.code == 2
    assert said.line.startswith(f"{run / name}: not a ")
    assert content(run) == before


# --- a full disk


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` at ``folder``; skips the test where it may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leaving: int) -> Path:
    """Takes all the space of a small disk but about ``leaving`` bytes."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    os.truncate(path, max(0, path.stat().st_size - leaving))
    return path


def test_a_full_disk_under_the_run(
    here: Path, corpus: Path, cache: Path, finished: Path, fails: Callable[..., Said]
) -> None:
    with small_disk(here / "disk", "1m") as disk:
        filler = fill(disk, 40_960)
        words = words_for(corpus, cache, disk / "outputs")
        said = fails(*words)
        assert said.code in (1, 2)
        assert "No space left on device" in said.line
        assert str(disk / "outputs") in said.line
        assert not list(disk.rglob("results.json"))
        assert not [path for path in disk.rglob("*.tmp") if path.is_file()]
        filler.unlink()
        expected = lasting(json.loads((finished / "s" / "r" / "results.json").read_text()))
        assert lasting(trained(*words)) == expected


def test_a_line_of_metrics_is_whole_or_not_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        metrics = MetricsFile(disk / "metrics.csv")
        metrics.keep_until(0)
        fill(disk, leaving=0)
        steps = 0
        with pytest.raises(OSError, match=r"metrics\.csv"):  # noqa: PT012
            for steps in range(10_000):
                metrics.append({"step": steps, "train_loss": 1.2345678})
        assert [int(row["step"]) for row in metrics.read()] == list(range(steps))
        assert metrics.path.read_bytes().endswith(b"\n")


def test_a_failed_write_names_its_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "a.txt"
        write_text(path, "old")
        with pytest.raises(OSError, match="No space left on device") as error:
            write_text(path, "x" * 100_000)
        assert error.value.filename == str(path)
        assert content(disk) == {"a.txt": b"old"}


# --- a run that goes wrong on its way


def test_a_hopeless_rate_is_a_diverged_run(here: Path, corpus: Path, cache: Path) -> None:
    words = words_for(corpus, cache, here / "outputs")
    results = trained(*words, "optim.learning_rate=1e30", "train.grad_clip_norm=null")
    assert results["status"] == "diverged"
    assert None not in (results["config_hash"], results["seed"])
    assert all(value == value for value in results.values())  # nothing is NaN


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line(
    error: Exception,
    here: Path,
    corpus: Path,
    cache: Path,
    fails: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise error

    words = words_for(corpus, cache, here / "outputs")
    with monkeypatch.context() as patch:
        patch.setattr("tinygpt.training.session.Run.train", exhausted)
        said = fails(*words)
    assert said.code == 1
    assert said.line.startswith("out of memory: ")
    assert "hardware.micro_batch_size" in said.line
    run = here / "outputs" / "s" / "r"
    assert json.loads((run / "error.json").read_text())["error"].startswith(type(error).__name__)
    assert trained(*words)["status"] == "finished"
    assert not (run / "error.json").exists()
