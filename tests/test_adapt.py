"""The command that adapts: what is asked for, what is refused, where it goes, how it is swept."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.adapting import SITE, records_of, results_of
from tests.conftest import ROOT, Command
from tinygpt import cli, fileio
from tinygpt.adaptation import records
from tinygpt.adaptation.config import (
    METHODS,
    POLICIES,
    AdaptConfig,
    SelfPolicy,
    config_hash,
    count_records,
    identify,
    methods_of,
)
from tinygpt.config import ConfigError, HardwareConfig, SerialLauncher
from tinygpt.data.tokenizers import Bytes
from tinygpt.evaluating import options as evaluating
from tinygpt.runs import rundir
from tinygpt.scaling.runs import load_runs
from tinygpt.sweeping.jobs import compose_jobs, expand
from tinygpt.sweeping.kinds import ADAPTATION


def make_base(path: Path, *words: str) -> Path:
    """All of a run that is read before its weights are."""
    run = rundir.RunDir(path)
    run.checkpoints.mkdir(parents=True)
    run.write_config(cli.compose_config(["model.d_model=16", "model.n_heads=2", *words]))
    fileio.write_json(run.environment, {"config_hash": f"hash of {words}"})
    Bytes().save(run.tokenizer)
    for name in ("last", "final"):
        (run.checkpoints / f"{name}.ckpt").write_text(f"weights {name}")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on the embedded corpus, one on other text, one under µP, books, edits."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("A book.")
    (folder / "edits.jsonl").write_text("{}\n")
    make_base(folder / "base")
    make_base(folder / "text", "data=custom", f"data.path={folder}/books")
    make_base(folder / "mup", "model.parametrization=mup")
    (make_base(folder / "begun") / "checkpoints" / "final.ckpt").unlink()
    return folder


def asked(*words: str) -> AdaptConfig:
    return cli.compose_for(cli.ADAPT, words)


def facts(base: Path, *words: str) -> list[str]:
    return [f"run={base}", "documents.task=new_facts", *words]


# --- what is composed


@pytest.mark.parametrize("kind", [path.stem for path in Path(cli.CONF_DIR, "policy").glob("*")])
def test_every_policy_is_composed(place: Path, kind: str) -> None:
    words = facts(place / "base", f"policy={kind}", "methods=[none,lora_edit]")
    if kind != "self":
        words.append(f"policy.path={place / ('edits.jsonl' if kind == 'file' else 'books')}")
    policy = asked(*words).policy
    assert policy.kind == kind
    assert type(policy) in POLICIES.values()


def test_the_help_names_what_there_is() -> None:
    text = cli.help_text(cli.ADAPT)
    for group in ("policy", "data", "launcher"):
        names = {path.stem for path in Path(cli.CONF_DIR, group).glob("*.yaml")}
        assert {name for name in names if name not in text} == set()
    assert [method for method in METHODS if method not in text] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "run: must be given, as run=..."),
        ("run=PLACE/books data=synthetic", "run=PLACE/books: not the folder of a run"),
        ("run=BASE", "documents.task=domain_shift: needs data="),
        ("run=BASE data.path=x", "data.path=x: needs data=, where the text is from"),
        (
            "run=BASE data=synthetic",
            "data=synthetic: not new to PLACE/base, which was trained on it",
        ),
        ("run=BASE data=custom data.path=PLACE methods=[oracle]", "methods=oracle: needs document"),
        ("run=PLACE/text FACTS", "documents.task=new_facts: needs a run that was trained on data"),
        ("run=PLACE/mup FACTS", "run: trained with model.parametrization=mup"),
        ("run=PLACE/begun FACTS checkpoint=final", "checkpoint=final: not in PLACE/begun/checkp"),
        ("FACTS data=synthetic", "data=synthetic: not with documents.task=new_facts"),
        ("FACTS inner.lora.rank=17", "inner.lora.rank=17: must be at most 16, the width"),
        ("FACTS outer.lora.rank=17", "outer.lora.rank=17: must be at most 16, the width"),
        ("FACTS inner.lora.rank=null", "inner.lora.rank=null: methods=lora_doc trains ad"),
        ("FACTS inner.lora.rank=null inner.lora.alpha=8 methods=[none]", "inner.lora.alp"),
        ("FACTS inner.lora.rnak=4", "inner.lora.rnak: no such key; did you mean inner.lo"),
        ("FACTS inner.inner_steps=[3,1]", "inner.inner_steps=3,1: must be increasing numbers"),
        ("FACTS inner.inner_steps=[]", "inner.inner_steps=: must be increasing"),
        ("FACTS methods=[oracel]", "methods=oracel: must be one of none, lora_doc, lora"),
        ("FACTS methods=[]", "methods=[]: must name some of none, lora_doc"),
        ("FACTS documents.train=0", "documents.train=0: methods=restem learns from"),
        ("FACTS documents.tune=0", "documents.tune=0: methods=lora_doc is tuned on"),
        ("FACTS tuning.learning_rates=[]", "tuning.learning_rates=[]: must have a rate"),
        ("FACTS outer.shared=true", "outer.shared=true: removed; the base that adapts is"),
        ("FACTS policy=table", "policy=table: removed; policy=self draws"),
        ("FACTS tuning.directives=6", "tuning.directives=6: removed; tuning.learning_r"),
        ("FACTS methods=[uniform_directive]", "methods=uniform_directive: removed; metho"),
        ("FACTS policy=hf", "policy.path: must be given"),
        ("FACTS policy=hf policy.path=nowhere", "policy.path=nowhere: no such folder"),
        ("FACTS policy=file policy.path=PLACE/edits.jsonl", "policy=file: cannot be trained"),
        ("FACTS policy=file policy.path=no methods=[none]", "policy.path=no: no such file"),
        ("FACTS policy.path=x", "policy.path: not a key of the chosen policy; it is one"),
        ("FACTS hardware.devices=2", "hardware.devices=2: an adaptation takes one device"),
    ],
)
def test_a_mistake_is_one_line(place: Path, words: str, line: str) -> None:
    if words.startswith("FACTS"):
        words = f"run=BASE {words}"
    words = words.replace("FACTS", "documents.task=new_facts").replace("=BASE", "=PLACE/base")
    with pytest.raises(ConfigError) as error:
        asked(*words.replace("PLACE", str(place)).split())
    assert str(error.value).replace(str(place), "PLACE").startswith(line)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygpt.adaptation.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs `pip install -e '\.\[lora\]'`"):
        asked(*facts(place / "base"))
    assert asked(*facts(place / "base", "methods=[none,full_ft_doc]")).methods


def test_what_needs_no_documents_may_have_none(place: Path) -> None:
    words = facts(place / "base", "documents.train=0", "documents.tune=0")
    assert asked(*words, "methods=[none]").documents.tune == 0
    assert asked(*words, "methods=[lora_doc]", "tuning.learning_rates=[1e-3]").documents.tune == 0


@pytest.mark.parametrize("name", ["adaptation", "width"])
def test_an_experiment_belongs_to_one_command(name: str) -> None:
    theirs, ours = cli.COMMANDS if name == "adaptation" else cli.COMMANDS[::-1]
    with pytest.raises(ConfigError) as error:
        cli.sweeps(theirs, [f"experiment={name}"], False)
    assert str(error.value) == f"experiment={name}: is for python -m tinygpt.{ours.name}"
    assert cli.sweeps(ours, [f"experiment={name}"], False)


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpu"])
def test_the_experiment_at_every_scale(place: Path, scale: str) -> None:
    words = facts(place / "base", "experiment=adaptation", f"scale={scale}")
    params = getattr(asked(*words).sweep, scale)
    jobs = compose_jobs(expand(params, words), ADAPTATION)
    found = [(job.config.inner.lora.rank, job.config.seed) for job in jobs]
    assert found == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert {job.config.study for job in jobs} == {f"adaptation-{scale}"}
    assert {methods_of(job.config) == list(METHODS) for job in jobs} == {True}


# --- which adaptation it is


def hash_of(config: AdaptConfig) -> str:
    return identify(copy.deepcopy(config), [])[0]


def test_adaptations_of_earlier_versions_keep_their_hash() -> None:
    config = AdaptConfig(
        run="x",
        methods=["none", "lora_doc", "restem"],
        policy=SelfPolicy(),
        hardware=HardwareConfig(),
        launcher=SerialLauncher(),
    )
    wanted = "051123583ea23e22f210fe810104035a55906e0f807878e29c4e77d2a11ad7c9"
    assert config_hash(config, {"run": "r"}) == wanted


def shift(folder: Path, *words: str) -> list[str]:
    return [f"run={folder}/base", "data=custom", f"data.path={folder}/books", *words]


def test_it_is_the_same_wherever_it_lies(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(place, tmp_path / "moved")
    more = ("policy=file", "policy.path=PLACE/edits.jsonl", "methods=[lora_edit,none]")
    one = asked(*(word.replace("PLACE", str(place)) for word in shift(place, *more)))
    monkeypatch.chdir(moved)
    elsewhere = ["run=base", "data=custom", "data.path=books", "policy=file", "study=s"]
    spelt = ["policy.path=edits.jsonl", "methods=[none,lora_edit]", "checkpoint=final"]
    assert hash_of(one) == hash_of(asked(*elsewhere, *spelt, "hardware.threads=3"))


@pytest.mark.parametrize("word", ["documents.seed=1", "checkpoint=last", "policy.top_k=5"])
def test_what_changes_a_result_makes_another(place: Path, word: str) -> None:
    assert hash_of(asked(*shift(place))) != hash_of(asked(*shift(place, word)))


@pytest.mark.parametrize(
    "name",
    ["base/checkpoints/final.ckpt", "base/tokenizer.json", "base/environment.json", "books/a.txt"],
)
def test_what_lies_there_makes_another(place: Path, tmp_path: Path, name: str) -> None:
    moved = shutil.copytree(place, tmp_path / "moved")
    before = hash_of(asked(*shift(moved)))
    path = moved / name
    path.write_text(path.read_text().replace("hash of", "of") + " ")
    assert hash_of(asked(*shift(moved))) != before


def test_a_study_finds_its_own_folder(place: Path, tmp_path: Path) -> None:
    words = facts(place / "base", f"output_dir={tmp_path}")
    hash_, run = identify(asked(*words), words)
    assert run.path == tmp_path / "adaptation" / f"run-base_task-new_facts-{hash_[:6]}"
    fileio.write_json(run.environment, {"config_hash": hash_})
    run.write_config(asked(*words))
    again = [*words[::-1], "methods=null"]
    assert identify(asked(*again), again)[1].path == run.path


# --- swept


@pytest.fixture
def adapt(tinygpt: Command, tmp_path: Path) -> Command:
    """The command in a fresh folder, with the stand-in where each document would be learned."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    paths = f"{tmp_path / 'site'}:{ROOT}"
    return lambda *words, **env: tinygpt("adapt", *words, PYTHONPATH=paths, **env)


SWEEP = ("--multirun", "experiment=adaptation", "scale=smoke", "documents.task=new_facts")


def test_a_sweep_and_the_same_again(adapt: Command, place: Path, tmp_path: Path) -> None:
    words = [*SWEEP, f"run={place}/base,{place}/begun", "methods=[none,lora_doc,oracle]"]
    done = adapt(*words, "fit=false", TINYGPT_TEST_STOP="seed=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "8 runs: 4 failed, 4 finished" in done.stdout or "4 finished, 4 failed" in done.stdout
    study = tmp_path / "outputs" / "adaptation-smoke"
    before = {path.parent: path.stat().st_mtime_ns for path in study.glob("*/results.json")}
    halves = [len(path.read_text().splitlines()) for path in study.glob("*seed-2*/adapt.jsonl")]
    assert len(before) == len(halves) == 4

    done = adapt(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapting 4 runs, 4 finished before; folder outputs/adaptation-smoke" in done.stdout
    assert "smoke: not a result" in done.stdout
    assert "8 runs: 4 finished before, 4 finished" in done.stdout
    assert "reward oracle +0." in done.stdout
    assert all((path / "results.json").stat().st_mtime_ns == t for path, t in before.items())
    for folder in study.glob("*seed*"):
        found, _ = records.read_records(folder / "adapt.jsonl")
        assert len({record["run_id"] for record in found}) == len(found) > max(halves)
    with (study / "sweep_summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        results = json.loads((study / row["folder"] / "results.json").read_text())
        assert float(row["reward_lora_doc"]) == results["reward_lora_doc"]
        assert (row["status"], row["lora_rank"]) == ("finished", str(results["lora_rank"]))
    assert (study / "fit" / "adaptation_summary.csv").exists()
    assert "Does self-editing beat the raw document?" in done.stdout


def test_a_plan_does_nothing(adapt: Command, place: Path, tmp_path: Path) -> None:
    done = adapt(*SWEEP, f"run={place}/base", "plan=true", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "rank=4 seed=1" in done.stdout
    assert "4 to do: " in done.stdout
    alone = adapt(*facts(place / "base", "plan=true"))
    assert "1 to do: " in alone.stdout, alone.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hydra/sweeper=optuna", "--multirun"], "hydra/sweeper=optuna: minimizes one number"),
        (["--multirun", "seed=1,2", "inner.lora.rank=4,99"], "inner.lora.rank=99: must be at most"),
        (["--multirun", "hardware.threads=1,2"], "hardware.threads=1 and hardware.threads=2: both"),
    ],
)
def test_what_is_refused_before_anything_is_done(
    adapt: Command, place: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    done = adapt(*facts(place / "base", *words))
    assert (done.returncode, done.stdout.replace("loading …\n", "")) == (2, "")
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_device_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    jobs = compose_jobs([facts(place / "base", "hardware=cuda")], ADAPTATION)
    with pytest.raises(ConfigError, match=r"hardware\.accelerator=cuda: this machine"):
        ADAPTATION.prepare(jobs, (), Console())


def test_how_far_it_is_and_what_it_came_to(place: Path, tmp_path: Path) -> None:
    """Two steps: none 3 · 1; lora_doc (3 test + 1 tune · 2 rates) · 2; restem (3 test in each of 3
    rounds + 2 train · 2 iterations · 4 samples · 2 seeds) · 2."""
    words = facts(place / "base", f"output_dir={tmp_path}", "methods=[none,lora_doc,restem]")
    words += ["inner.inner_steps=[1,3]", "outer.samples=4", "outer.inner_seeds=2"]
    words += ["documents.train=2", "documents.tune=1", "documents.test=3"]
    (job,) = compose_jobs([[*words, "tuning.learning_rates=[1e-3,1e-2]"]], ADAPTATION)
    assert count_records(job.config) == 3 + 10 + 82
    job.row = {"total_steps": 95}
    assert ADAPTATION.progress(job) == (0.0, "starting")
    found = records_of(job.config)
    job.run.path.mkdir(parents=True)
    records.append(job.run.records, found[:5])
    with job.run.records.open("a") as file:
        file.write('{"torn')
    words_ = f"5/95 records  lora_doc {found[4]['reward']:+.2f}"
    assert ADAPTATION.progress(job) == (5 / 95, words_)
    results = {**results_of(job.config, job.hash, found), "reward_restem": None}
    assert ADAPTATION.headline(results) == (results["reward_lora_doc"], "lora_doc")
    assert ADAPTATION.headline({**results, "reward_lora_doc": -0.1}) == (0.0, "none")
    nothing = dict.fromkeys(results)
    assert ADAPTATION.headline(nothing) == (None, "")


# --- beside trainings


def test_each_command_takes_its_own(place: Path, tinygpt: Command, tmp_path: Path) -> None:
    """A training, and a study of two adaptations, one of which has just begun."""
    mixed = tmp_path / "all"
    base, study = make_base(mixed / "runs" / "base"), mixed / "adaptation"
    for seed in (1, 2):
        words = facts(place / "base", f"output_dir={mixed}", f"seed={seed}")
        config = asked(*words, "methods=[none,lora_doc]")
        hash_, run = identify(config, words)
        fileio.write_json(run.environment, {"config_hash": hash_})
        assert not rundir.is_adaptation(run.path)
        run.write_config(config)
        assert rundir.is_adaptation(run.path)
        if seed == 1:
            records.append(run.records, records_of(config))
    assert rundir.find_runs(mixed) == [base]
    assert len(rundir.find_adaptations(mixed)) == 2
    assert list(load_runs(mixed)["folder"]) == [str(base)]
    assert evaluating.find([mixed]) == ([base], [])
    with pytest.raises(ConfigError) as error:
        evaluating.find([study])
    assert str(error.value) == f"runs={study}: no runs in there, but 2 adaptations"
    for path, instead in ((study, "2 adaptations"), (run.path, "of an adaptation")):
        with pytest.raises(ConfigError) as error:
            rundir.open_run(path)
        assert str(error.value) == f"run={path}: not the folder of a run, but {instead}"
    both = tinygpt("fit", f"runs={mixed}")
    assert both.stdout.startswith(f"note: adaptations in {mixed} are left out (1); give")
    assert both.stderr.startswith("error: loss=final_val_loss: no such column")  # of the training
    alone = tinygpt("fit", f"runs={study}")
    assert alone.returncode == 0, alone.stderr
    assert (study / "fit" / "report.html").exists()
