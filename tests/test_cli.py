"""Arguments, names of runs, the horizon, the hash: what a command line comes down to."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import operator
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import MISSING

from tests.conftest import ROOT
from tests.test_imports import COMMANDS
from tinygpt import cli, completion, fileio, fit, signals, words
from tinygpt.cli import compose_config, read_arguments
from tinygpt.config import DEFAULT_TOKENS, HORIZONS, Config, ConfigError, RunError, key
from tinygpt.data.shards import cache_root
from tinygpt.fileio import locked
from tinygpt.runs.rundir import RunDir, config_hash, folder_of, run_name
from tinygpt.sweeping.jobs import expand

USAGE = "usage: python -m tinygpt.test prompt=TEXT"


@dataclass
class Arguments:
    prompt: str = MISSING
    note: Optional[str] = None
    count: int = key(3, least=1)
    rate: Optional[float] = key(0.5, above=0.0)
    quick: bool = False
    kind: str = key("bpe", among=("bpe", "char"))
    words: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def read(*argv: str) -> Arguments:
    return read_arguments(Arguments, argv, USAGE)


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


AWKWARD = ["a=b=c", "a, b", '"quoted"', "it's", "{a: 1}", "[1,2]", "${oc.env:HOME}", "${", "???"]
AWKWARD += ["null", "", " ", "1e3", "true", "naïve 日本 🦕", "--flag", "a\nb", "\\n"]


@given(st.text() | st.sampled_from(AWKWARD))
def test_a_text_is_taken_verbatim(text: str) -> None:
    arguments = read(f"prompt={text}", f"note={text}")
    assert arguments.prompt == text
    assert arguments.note == (None if text == "null" else text)


@given(st.lists(st.text(st.characters(exclude_characters=",")), min_size=1))
def test_a_list_is_cut_at_commas_and_nowhere_else(words: list[str]) -> None:
    joined = ",".join(words)
    assert read("prompt=", f"words={joined}").words == (words if joined else [])


def test_values_become_what_their_field_is() -> None:
    arguments = read("prompt=x", "count=7", "rate=1e-3", "quick=true", "ids=3,1,2", "kind=char")
    assert dataclasses.astuple(arguments) == ("x", None, 7, 1e-3, True, "char", [], [3, 1, 2])
    assert read("prompt=x", "rate=null").rate is None
    assert read("prompt=x", "ids=").ids == []
    assert read("prompt=a", "prompt=b").prompt == "b"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("promt=x", "promt: no such key; did you mean prompt?"),
        ("x", "'x': a text with spaces needs quotes, 'prompt=x x ...'"),
        ("--seed", "--seed: no such option; --help shows what there is"),
        ("--count", "--count: no such option; did you mean count=...?"),
        ("count=many", "count=many: must be an integer"),
        ("count=null", "count=null: must be an integer"),
        ("count=0", "count=0: must be at least 1"),
        ("rate=fast", "rate=fast: must be a number"),
        ("rate=-1", "rate=-1.0: must be above 0"),
        ("rate=nan", "rate=nan: must be a finite number"),
        ("quick=perhaps", "quick=perhaps: must be true or false"),
        ("ids=1,x", "ids=1,x: must be an integer"),
        ("kind=word", "kind=word: must be one of bpe, char"),
    ],
)
def test_a_bad_argument_is_one_line(argument: str, line: str) -> None:
    assert refused("prompt=x", argument).startswith(line)


def test_a_missing_argument_is_named() -> None:
    assert refused() == "prompt: must be given, as prompt=..."


@dataclass
class Section:
    n: Optional[str] = None
    count: int = key(1, least=1)
    names: list[str] = field(default_factory=list)


@dataclass
class Sectioned:
    name: str = "x"
    columns: Section = field(default_factory=Section)


def test_keys_of_a_section_are_dotted() -> None:
    argv = ["columns.n=${a}=b", "columns.names=a,b", "columns.count=3", "name=y"]
    arguments = read_arguments(Sectioned, argv, USAGE)
    assert arguments == Sectioned("y", Section("${a}=b", 3, ["a", "b"]))
    assert read_arguments(Sectioned, [], USAGE).columns.n is None


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("columns.m=1", "columns.m: no such key; did you mean columns.n"),
        ("columns=1", "columns: no such key; did you mean columns."),
        ("columns.count=x", "columns.count=x: must be an integer"),
        ("columns.count=0", "columns.count=0: must be at least 1"),
        ("columns", "'columns': must be key=value; --help shows the keys"),
    ],
)
def test_a_bad_argument_of_a_section_is_one_line(argument: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_arguments(Sectioned, [argument], USAGE)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read("nonsense", word)
    assert left.value.code == 0
    assert capsys.readouterr().out == USAGE + "\n"


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a=1: must\n  be 2"), 2, "error: a=1: must be 2\n"),
        (RunError("it broke"), 1, "error: it broke\n"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: No space left on "),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT; the same command resumes from what is "),
        (MemoryError("no room"), 1, "error: out of memory: no room"),
        (RuntimeError("you tried to allocate 9 bytes"), 1, "error: out of memory: you tried"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        command()
    said = capsys.readouterr().err
    assert left.value.code == code
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [AttributeError("half made"), ConfigError("a=1: half read")])
def test_an_interrupt_that_a_clean_up_stumbles_over_is_one(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.one_line_errors
    def command() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == 130
    line = "stopped by SIGINT; the same command resumes from what is saved\n"
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @cli.one_line_errors
    def command(error: Exception) -> None:
        raise error

    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        command(ConfigError("x"))


# --- the horizon


def horizon(*overrides: str) -> dict[str, float]:
    train = compose_config(overrides).train
    return {h: getattr(train, h) for h in HORIZONS if getattr(train, h) is not None}


def test_the_command_line_replaces_a_recipes_horizon() -> None:
    assert horizon() == {"tokens": DEFAULT_TOKENS}
    assert horizon("experiment=educational") == {"steps": 5000}
    assert horizon("experiment=tinygpt_base") == {"epochs": 1.0}
    for name in HORIZONS:
        assert horizon("experiment=educational", f"train.{name}=7") == {name: 7}
    assert horizon("experiment=educational", "train.tokens=7", "train.steps=null") == {"tokens": 7}
    assert horizon("experiment=educational", "train.steps=null") == {"tokens": DEFAULT_TOKENS}


def test_two_horizons_are_both_named() -> None:
    with pytest.raises(ConfigError, match=r"^train.flops and train.steps: give the horizon once$"):
        compose_config(["train.steps=5", "train.flops=5"])


# --- names of runs

HASH = "3f9a2c" + "0" * 58


def test_a_run_is_named_after_what_was_overridden() -> None:
    assert run_name([], HASH) == "default-3f9a2c"
    assert run_name(["seed=1", "model.d_model=128"], HASH) == "d_model-128_seed-1-3f9a2c"
    assert run_name(["data=custom", "data.path=/a/b/my book.txt"], HASH) == (
        "data-custom_path-my-book.txt-3f9a2c"
    )
    assert run_name(["optim.betas=[0.9,0.95]"], HASH) == "betas-0.9-0.95-3f9a2c"
    quoted = ["data.path='1.10'", "train.sample_prompt='1.1'"]
    assert run_name(quoted, HASH) == "path-1.10_sample_prompt-1.1-3f9a2c"


def test_where_it_runs_is_not_in_its_name() -> None:
    elsewhere = ["hardware=cpu", "hardware.threads=2", "logger=csv", "output_dir=/x", "force=true"]
    more = ["cache_dir=/y", "study=s", "run_name=r", "hydra.run.dir=z", "hydra/launcher=basic"]
    assert run_name(["seed=1", *elsewhere, *more], HASH) == "seed-1-3f9a2c"


KEYS = ["seed", "model", "model.d_model", "optim.kind", "schedule.kind", "data.path", "train.steps"]


@given(
    st.dictionaries(st.sampled_from(KEYS), st.text()),
    st.randoms(use_true_random=False),
)
def test_a_name_is_safe_and_the_order_does_not_matter(
    values: dict[str, str], chance: random.Random
) -> None:
    overrides = [f"{name}={value}" for name, value in values.items()]
    shuffled = list(overrides)
    chance.shuffle(shuffled)
    name = run_name(overrides, HASH)
    assert run_name(shuffled, HASH) == name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name)
    assert name.endswith("-3f9a2c")


def test_a_name_can_be_typed_back() -> None:
    name = run_name(["model.d_model=128", "train.sample_prompt=a/b: {c}, 'd' = é"], HASH)
    assert compose_config([f"run_name={name}"]).run_name == name


# --- the hash

NOT_IN_HASH = re.compile(
    r"(hardware|logger|launcher|sweep)\..*|output_dir|cache_dir|study|run_name|force|plan|fit|scale"
    r"|data\.(path|val_file|test_file|repo)|tokenizer\.(vocab_dir|path)|init_from"
    r"|trainer\.profiler"
    r"|train\.eval_share"  # but with early stopping, which it decides: see test_training
)
CHOICES = {
    "synthetic": ["data=synthetic", "tokenizer=bpe", "optim=adamw", "schedule=cosine"],
    "hub": ["data=hub", "data.repo=a/b", "tokenizer=char", "optim=sgd", "schedule=wsd"],
    "custom": ["data=custom", "data.path=x", "tokenizer=gpt2", "schedule=constant"],
}


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """Every leaf: the dataclass that holds it, its name there, its dotted name."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield section, item.name, prefix + item.name


def other(value: Any) -> Any:
    """Another value of about the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, 0.5]
    if isinstance(value, dict):
        return {**value, "other": 1}
    return "other" if value is None else value + "x"


def hash_of(config: Config) -> str:
    return config_hash(config, {"data": "content"})


@pytest.mark.parametrize("choices", list(CHOICES.values()), ids=list(CHOICES))
def test_science_is_in_the_hash_and_nothing_else(choices: list[str]) -> None:
    config = compose_config([*choices, "logger=[tensorboard,wandb,mlflow]"])
    before = hash_of(config)
    assert hash_of(copy.deepcopy(config)) == before
    names = [name for _, _, name in leaves(config)]
    changing = set()
    for name in names:
        changed = copy.deepcopy(config)
        section, attribute = next((s, a) for s, a, n in leaves(changed) if n == name)
        setattr(section, attribute, other(getattr(section, attribute)))
        if hash_of(changed) != before:
            changing.add(name)
    assert changing == {name for name in names if not NOT_IN_HASH.fullmatch(name)}
    assert len(changing) > 40
    assert len(names) - len(changing) > 10


def test_content_is_in_the_hash() -> None:
    config = compose_config(["data=custom", "data.path=x"])
    assert config_hash(config, {"data": "a"}) != config_hash(config, {"data": "b"})
    assert config_hash(config, {"data": "a"}) != config_hash(config, {"tokenizer": "a"})


# --- text stays text, whole numbers are whole, other programs' words are answered

TEXTS = ["2024_05_01", "1.10", "1e5", "007", "true", "0x10", "1:30", "inf"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_what_is_typed(text: str) -> None:
    keys = ["train.sample_prompt", "output_dir", "logger.wandb.project", "data.path"]
    keys += ["run_name", "study"] if ":" not in text else []  # which name a folder
    given = [f"{name}={text}" for name in keys]
    config = compose_config(["logger=wandb", "data=custom", *given])
    assert {name: operator.attrgetter(name)(config) for name in keys} == dict.fromkeys(keys, text)


def test_null_and_quotes_mean_what_they_did() -> None:
    config = compose_config(["run_name=null", "study='1.10'", 'train.sample_prompt="a, 1.10"'])
    assert (config.run_name, config.study) == (None, "1.10")
    assert config.train.sample_prompt == "a, 1.10"
    assert compose_config(["train.precision=32"]).train.precision == "32"
    with pytest.raises(ConfigError, match=r"^output_dir=null: must be a text$"):
        compose_config(["output_dir=null"])


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("run_name=1.10,1.1", "run_name='1.10','1.1'"),
        ("run_name=choice(1.10, x)", "run_name=choice('1.10', x)"),
        ("run_name=[1e5,[true]]", "run_name=['1e5',['true']]"),
        ("run_name='1.10',1.1", "run_name='1.10','1.1'"),
        ("run_name=null,1", "run_name=null,'1'"),
        ("seed=1.10", "seed=1.10"),
        ("optim.learning_rate=1e-3", "optim.learning_rate=1e-3"),
        ("train.tokens=1e6,2_000_000,2.5e6", "train.tokens=1000000,2_000_000,2500000"),
        ("train.tokens=range(1e3,2e3)", "train.tokens=range(1e3,2e3)"),
    ],
)
def test_values_are_rewritten_for_hydra_alone(typed: str, read: str) -> None:
    assert words.as_meant([typed], cli.RUN) == [read]
    assert words.as_meant([read], cli.RUN) == [read]


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1000000.0", "+1e6", "1M", "1000k", "0.001b"])
def test_a_whole_number_may_be_written_as_people_do(text: str) -> None:
    tokens = compose_config([f"train.tokens={text}"]).train.tokens
    assert (tokens, type(tokens)) == (1_000_000, int)
    assert read("prompt=x", "count=1.5k", "rate=2M") == Arguments("x", count=1500, rate=2e6)


def test_numbers_with_letters_are_plain_everywhere() -> None:
    plain, letters = (compose_config([f"train.flops={text}"]) for text in ("1.5e12", "1.5T"))
    assert letters == plain
    jobs = expand({}, ["train.tokens=1M, 2.5M", "optim.learning_rate=choice(1e-3,1e-4)"])
    assert [job[0] for job in jobs[::2]] == ["train.tokens=1000000", "train.tokens=2500000"]
    assert compose_config(["train.sample_prompt=2M"]).train.sample_prompt == "2M"


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "1e400", "true", "1.0001k", "M"])
def test_an_integer_is_whole(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train.tokens={text}: must be an integer$"):
        compose_config([f"train.tokens={text}"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((f"{name}=3e-4", "optim.learning_rate=3e-4") for name in ("lr", "learning_rate")),
        ("train.lr=3e-4", "optim.learning_rate=3e-4"),
        ("+lr=3e-4", "optim.learning_rate=3e-4"),
        ("n_embd=32", "model.d_model=32"),
        ("block_size=64", "model.max_seq_len=64"),
        ("model.block_size=64", "model.max_seq_len=64"),
        ("batch_size=32", "train.batch_tokens=32*L with L=model.max_seq_len"),
        ("max_steps=9", "train.steps=9"),
        ("device=cuda:0", "hardware=cuda"),
        ("accumulate_grad_batches=4", "hardware.micro_batch_size=B/4"),
        ("hardware=gpu", "hardware=cuda"),
        ("data=alice.txt", "data=custom data.path=alice.txt"),
        ("data=~/a/b.txt", "data=custom data.path=~/a/b.txt"),
        ("path=alice.txt", "data=custom data.path=alice.txt"),
        ("hydra/launcher=joblib", "launcher=local"),
    ],
)
def test_what_people_type_is_answered_with_the_key(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose_config([typed])
    assert str(raised.value).startswith(f"{typed.lstrip('+')}: no such ")
    assert f"; did you mean {meant}" in str(raised.value)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--multirun --cfg job", "--cfg/-c: not allowed with argument --multirun/-m"),
        ("-m --info", "--info/-i: not allowed with argument --multirun/-m"),
        ("--resolve", "--resolve, --package: need --cfg job"),
        ("--config-name other", "--config-name: no such option"),
        (
            "--learning_rate 1e-3",
            "--learning_rate: no such option; did you mean optim.learning_rate=1e-3?",
        ),
        ("--lr=1e-3", "--lr=1e-3: no such option; did you mean optim.learning_rate=1e-3?"),
        ("--max-steps 5 seed=1", "--max-steps: no such option; did you mean train.steps=5?"),
        ("--seed=3", "--seed=3: no such option; did you mean seed=3?"),
        ("--cfg foo", "--cfg/-c: invalid choice: 'foo'"),
        ("hydra.run.dir=X", "hydra.run.dir=X: is decided by output_dir, study and run_name"),
        ("-m hydra.sweep.dir=X seed=1,2", "hydra.sweep.dir=X: is decided by output_dir and study"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: is decided by the shell"),
        ("experiment=[width,depth]", "experiment=[width,depth]: takes one experiment"),
        ("-m experiment=width,depth", "experiment=width,depth: takes one experiment"),
        ("lr=1e-3 --cfg job", "lr=1e-3: no such key; did you mean optim.learning_rate=1e-3?"),
    ],
)
def test_hydras_options_are_one_line_where_they_lead_nowhere(
    typed: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *typed.split()])
    with pytest.raises(ConfigError) as raised:
        cli.start(cli.RUN, lambda: pytest.fail("it began"))
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_hydra_is_handed_texts_in_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "run_name=1.10,1.1", "train.tokens=1e6"])
    cli.start(cli.RUN, lambda: None)
    assert sys.argv[2:4] == ["run_name='1.10','1.1'", "train.tokens=1000000"]


def test_optuna_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^hydra/sweeper=optuna: is not installed; `pip install"):
        compose_config(["hydra/sweeper=optuna"])


def test_paths_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("~/o", "'~/o'", '"~/o"'):
        assert compose_config([f"output_dir={typed}"]).output_dir == str(tmp_path / "o")
    config = compose_config(["init_from=null", "cache_dir=~/c", "train.sample_prompt=~"])
    assert (config.cache_dir, config.train.sample_prompt) == ("~/c", "~")
    assert cache_root(config.cache_dir) == tmp_path / "c"
    found = read_arguments(fit.Arguments, ["runs=~/a,~/b", "table=~/t.csv", "output_dir=~/o"], "")
    assert found.runs == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert (found.table, found.output_dir) == (str(tmp_path / "t.csv"), str(tmp_path / "o"))


def test_no_home_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.one_line_errors
    def command() -> None:
        cache_root(None)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("TINYGPT_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user with no entry
    with pytest.raises(SystemExit, match=r"^2$"):
        command()
    assert capsys.readouterr().err == (
        "error: ~: no home folder is known; set HOME, or give cache_dir=\n"
    )
    assert compose_config(["output_dir=~/o"]).output_dir == "~/o"


def test_a_path_with_its_comma_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c", "[d]"):
        Path(name).mkdir()
    assert words.files("a,b") == ["a,b"]
    assert words.files("c,a,b,no") == ["c", "a,b", "no"]
    assert words.files("[c,a,b]") == ["c", "a,b"]
    assert words.files("[d]") == ["[d]"]
    assert words.files("") == []


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^output_dir=.*: cannot be written \(File name"):
        folder_of(compose_config([f"output_dir={'a' * 300}"]), [], HASH)
    inside = folder_of(compose_config([f"output_dir={tmp_path}/file"]), [], HASH)
    with (
        pytest.raises(ConfigError, match=r"^output_dir=.*file: cannot be written \(Not a dir"),
        locked(inside, tmp_path / "file", "run"),
    ):
        pass


# --- one command for all


def shell(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_front_door(tmp_path: Path) -> None:
    listed = shell("tinygpt", cwd=tmp_path)
    assert listed.returncode == 0
    assert set(re.findall(r"^  (\w+) ", listed.stdout, re.M)) == COMMANDS
    assert max(map(len, listed.stdout.splitlines())) <= 80
    wrong = shell("tinygpt", "fti", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: fti: no such command; did you mean fit?\n"
    one, other = (
        shell(*w, "seed=-1", cwd=tmp_path) for w in (("tinygpt", "run"), ("tinygpt.run",))
    )
    assert one.returncode == other.returncode == 2
    assert one.stderr == other.stderr == "error: seed=-1: must be at least 0\n"
    with pytest.raises(SystemExit) as left:
        completion.main("--completion", ["tcsh"], COMMANDS)
    assert left.value.code == 2


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_the_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command: Any = {"run": cli.RUN, "adapt": cli.ADAPT}.get(name)
    module = importlib.import_module(f"tinygpt.{name}")
    text = cli.help_text(command) if command else module.USAGE
    monkeypatch.setenv("COLUMNS", "80")
    cli.show_help(text)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == text.split()


COMPLETED = {
    "tinygpt ev": ["evaluate "],
    "tinygpt run model=sm": ["model=small "],
    "tinygpt run model.d_": ["model.d_ff=", "model.d_model="],
    "tinygpt run opt": ["optim=", "optim."],
    "tinygpt run --multirun optim=adamw,l": ["optim=adamw,lion "],
    "tinygpt adapt policy=s": ["policy=self "],
    "tinygpt fit objective=": ["objective=log ", "objective=raw "],
    "tinygpt fit outp": ["output_dir=", "outputs/"],
    "tinygpt evaluate runs=outputs/a,outputs/b": ["runs=outputs/a,outputs/b.txt "],
    "tinygpt tokenizer train ki": ["kind="],
    "tinygpt nonsense ": [],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_words_are_completed(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "b.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert sorted(completion.complete(line, COMMANDS)) == sorted(COMPLETED[line])


def test_bash_completes_what_stands_behind_the_equals_sign(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    script = f"""
tinygpt() {{ {shlex.quote(sys.executable)} -m tinygpt "$@"; }}
{completion.SCRIPTS["bash"]}
COMP_LINE="tinygpt run model=sm" COMP_POINT=20
_tinygpt
printf '%s|' "${{COMPREPLY[@]}}"
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([bash, "-c", script], cwd=tmp_path, env=env, capture_output=True)
    assert (done.stdout, done.stderr) == (b"small |", b"")


@dataclass
class Folders:
    runs: list[str] = field(default_factory=list)
    run: Optional[str] = None
    prompt: str = ""


def test_a_bare_word_is_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "x=1"):
        Path(name).mkdir()

    def taken(bare: str, *argv: str) -> Folders:
        return read_arguments(Folders, argv, USAGE, bare=bare)

    assert taken("runs", "a", "b", "x=1").runs == ["a", "b", "x=1"]
    assert taken("runs", "runs=a,b", "nowhere").runs == [
        "a",
        "b",
        "nowhere",
    ]  # refused by name later
    assert taken("run", "prompt=Hello", "a") == Folders(run="a", prompt="Hello")
    with pytest.raises(ConfigError, match=r"^'b': run=a is given already$"):
        taken("run", "a", "b")
    with pytest.raises(ConfigError, match=r"^'upon': a text with spaces needs quotes, 'prompt=On"):
        taken("run", "a", "prompt=Once", "upon", "a", "time")


# What takes seconds to import, each replaced by a module that says so and ends the process.
HEAVY = ("torch", "lightning", "pandas", "scipy", "matplotlib")


@pytest.mark.parametrize(
    "words",
    [
        "run",
        "run --multirun seed=1,2",
        "law book.txt",
        "fit outputs/r",
        "evaluate outputs/r",
        "export outputs/r to=there",
        "sample outputs/r",
    ],
)
def test_the_first_word_comes_before_what_is_slow(words: str, tmp_path: Path) -> None:
    for name in HEAVY:
        folder = tmp_path / "stubs" / name
        folder.mkdir(parents=True)
        text = "import os\nos.write(1, b'heavy')\nos._exit(0)\n"
        (folder / "__init__.py").write_text(text)
    (tmp_path / "book.txt").write_text("A sentence of the book.\n\n" * 100)
    run = RunDir(tmp_path / "outputs" / "r")
    run.checkpoints.mkdir(parents=True)
    run.write_config(compose_config([]))
    fileio.write_json(run.environment, {"config_hash": "?"})
    (run.checkpoints / "final.ckpt").touch()
    done = shell("tinygpt", *words.split(), cwd=tmp_path, PYTHONPATH=f"{tmp_path}/stubs:{ROOT}")
    first = "loading …\n"
    if words.startswith("sample"):  # whose stdout is the text
        assert (done.stderr, done.stdout) == (first, "heavy")
    else:
        assert done.stdout == first + "heavy", done.stderr


def test_garbage_is_collected_again_once_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(signals.PARENT, "1")
    for finish in (cli.loaded, lambda: cli.spinning("preparing")):
        cli.loading()
        assert not gc.isenabled()
        finish()
        assert gc.isenabled()

    def fail() -> None:
        with cli.importing():
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert gc.isenabled()

    @cli.one_line_errors
    def command() -> None:
        cli.loading()
        raise RunError("no such thing")

    with pytest.raises(SystemExit):
        command()
    assert gc.isenabled()
