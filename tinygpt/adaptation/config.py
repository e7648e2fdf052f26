"""The schema of ``python -m tinygpt.adapt``: every key, its type and its bounds; and which
adaptation a configuration is, its hash and folder.  Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from tinygpt import fileio, rundir
from tinygpt.checks import check_bounds, check_names, check_text, require
from tinygpt.config import (
    REMOVED,
    Config,
    ConfigError,
    CustomData,
    DataConfig,
    LoraConfig,
    ModelConfig,
    Settings,
    SyntheticData,
    install,
    key,
)

METHODS = ("none", "lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc", "restem")
OF_ADAPTERS = tuple(m for m in METHODS if m not in ("none", "full_ft_doc"))
RATED = METHODS[1:6]  # whose rate is chosen on tune documents
LEARN = ("self", "hf")  # policies that restem can train
STUDY = "adaptation"  # that an adaptation goes to where none is named
# What fingerprints stand for, so that all of it may be moved.
PLACES = ("run", "checkpoint")


@dataclass
class DocumentsConfig:
    """What a model adapts to: how many documents, and how each is cut."""

    task: str = key("domain_shift", among=("domain_shift", "new_facts"))
    train: int = key(8, least=0)  # documents that a policy learns from
    tune: int = key(4, least=0)  # that rates are chosen on
    test: int = key(8, least=1)  # that are reported
    context_tokens: int = key(512, least=1)  # of domain_shift: what an edit may see
    heldout_tokens: int = key(2048, least=1)  # of domain_shift: what is scored alone
    forgetting_tokens: int = key(8192, least=1)  # of the base's own validation text
    seed: int = key(0, least=0, most=2**32 - 1)  # of the split


@dataclass
class InnerConfig:
    """How a model is trained on one edit.  The steps are snapshots of one run."""

    inner_steps: list[int] = key([1, 3, 10, 30], least=0)  # noqa: RUF009
    tokens_per_step: int = key(128, least=1)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8))  # rank null: all weights


@dataclass
class TuningConfig:
    """What is tried on the tune documents, by the reward after the most steps."""

    learning_rates: list[float] = key([3e-4, 1e-3, 3e-3, 1e-2], above=0.0)  # noqa: RUF009
    forgetting_weight: float = key(0.0, least=0.0)  # score = reward - weight·max(0, forgetting)


@dataclass
class OuterConfig:
    """ReST-EM (Singh et al. 2023): a policy is trained on those of its own edits that paid."""

    iterations: int = key(2, least=0)  # 0: the policy is tested as it is
    samples: int = key(4, least=1)  # edits of a train document; the best is learned from
    inner_seeds: int = key(1, least=1)  # trainings on each edit, whose mean score counts
    explore: float = key(0.5, least=0.0, most=1.0)  # share of uniform choice in iteration 0
    explore_later: float = key(0.1, least=0.0, most=1.0)
    steps: int = key(60, least=1)  # of the policy's own training
    tokens_per_step: int = key(512, least=1)
    learning_rate: float = key(1e-3, above=0.0)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=4))


@dataclass
class PolicyConfig:
    """Choose the policy that proposes edits."""

    kind: str = MISSING


@dataclass
class WritingPolicy(PolicyConfig):
    """Text of its own, by sampling."""

    max_edit_tokens: int = key(128, least=1)  # of each text
    temperature: float = key(0.8, above=0.0)
    top_k: Optional[int] = key(20, least=1)


@dataclass
class SelfPolicy(WritingPolicy):
    """The base itself."""

    kind: str = key("self", among=("self",))


@dataclass
class ModelPolicy(WritingPolicy):
    """A Hugging Face model in a local folder, or one that mlx_lm reads."""

    kind: str = key("hf", among=("hf", "mlx"))
    path: str = MISSING


@dataclass
class FilePolicy(PolicyConfig):
    """Edits that were written before: ``edits.jsonl`` of another study, or of anyone."""

    kind: str = key("file", among=("file",))
    path: str = MISSING


POLICIES: dict[str, type] = {"self": SelfPolicy, "model": ModelPolicy, "file": FilePolicy}


@dataclass
class AdaptConfig(Settings):
    """The whole configuration, as ``config.yaml`` in the folder of an adaptation keeps it."""

    run: str = MISSING  # the folder of the trained run that adapts
    checkpoint: Optional[str] = None  # null: final, of a run that has not ended last
    methods: Optional[list[str]] = key(None, among=METHODS)  # noqa: RUF009  # null: all of the task
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    data: Optional[DataConfig] = None  # of domain_shift: where the documents come from
    inner: InnerConfig = field(default_factory=InnerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    policy: PolicyConfig = MISSING


def check_adapt(config: AdaptConfig) -> None:
    """Check the bounds of every key, then what must fit together.  Raises ConfigError."""
    for method in config.methods or ():
        if removed := REMOVED.get(f"methods={method}"):
            raise ConfigError(f"methods={method}: removed; {removed}")
    check_bounds(config)
    data, hardware, sweep = config.data, config.hardware, config.sweep
    named = {"study": config.study, "run_name": config.run_name}
    check_names({**named, "data.name": data.name if data else None})
    check_text(data)
    for name, value in {"devices": hardware.devices, "num_nodes": hardware.num_nodes}.items():
        require(value == 1, f"hardware.{name}={value}: an adaptation takes one device")
    require(not sweep.share_trunk, "sweep.share_trunk=true: not for adaptations")
    _check_methods(config)
    _check_policy(config)
    place = rundir.open_run(config.run)
    place.chosen(config.checkpoint)
    base = rundir.read_config(place.config)
    _check_task(config, base)
    check_inner(config.inner, base.model)
    rank = config.outer.lora.rank or 0
    line = f"outer.lora.rank={rank}: must be at most {base.model.d_model}, the width of the policy"
    require(rank <= base.model.d_model or config.policy.kind == "hf", line)


def _check_task(config: AdaptConfig, base: Config) -> None:
    task, data = config.documents.task, config.data
    given = f"documents.task={task}"
    if task == "domain_shift":
        require(data is not None, f"{given}: needs data=, where its documents come from")
        line = (
            f"data={data.name if data else ''}: what {config.run} was trained on is not new to it"
        )
        require(data is None or _place(data) != _place(base.data), line)
        return
    line = f"data={data.name if data else ''}: not with {given}, which makes its own documents"
    require(data is None, line)
    line = f"{given}: needs a run that was trained on data=synthetic; {config.run} was trained on "
    require(isinstance(base.data, SyntheticData), line + base.data.name)


def _place(data: DataConfig) -> tuple[str, str]:
    """Return where a corpus is, absolute."""
    if isinstance(data, CustomData):
        return data.source, str(Path(data.path).expanduser().resolve())
    return data.source, getattr(data, "repo", "")


def _check_methods(config: AdaptConfig) -> None:
    """Check that ``restem`` and methods whose rate is chosen have documents for it."""
    given, documents, lora = config.methods, config.documents, config.inner.lora
    require(given != [], f"methods=[]: must name some of {', '.join(METHODS)}")
    line = "methods=oracle: needs documents.task=new_facts, where other ways to say it are known"
    require("oracle" not in (given or ()) or documents.task == "new_facts", line)
    methods = methods_of(config)
    learns = "restem" in methods and config.outer.iterations > 0
    line = "documents.train=0: methods=restem learns from train documents"
    require(documents.train > 0 or not learns, line)
    several = RATED if len(config.tuning.learning_rates) > 1 else ()
    tuned = [method for method in methods if method in several]
    line = f"documents.tune=0: methods={tuned[0] if tuned else ''} is tuned on tune documents"
    require(documents.tune > 0 or not tuned, line)
    require(bool(config.tuning.learning_rates), "tuning.learning_rates=[]: must have a rate")
    adapters = [method for method in methods if method in OF_ADAPTERS]
    line = f"inner.lora.rank=null: methods={adapters[0] if adapters else ''} trains adapters"
    require(lora.rank is not None or not adapters, line)
    line = f"inner.lora.rank: needs {install('lora')}"
    require(not adapters or find_spec("peft") is not None, line)
    for name, section in {"inner": lora, "outer": config.outer.lora}.items():
        line = f"{name}.lora.alpha={section.alpha}: needs {name}.lora.rank"
        require(section.rank is not None or section.alpha is None, line)


def _check_policy(config: AdaptConfig) -> None:
    kind, path = config.policy.kind, getattr(config.policy, "path", None)
    line = f"policy={kind}: does not learn, as restem asks; outer.iterations=0 tests it as it is"
    learns = "restem" in methods_of(config) and config.outer.iterations > 0
    require(kind in LEARN or not learns, line)
    there = Path(path or "").expanduser()
    if kind == "hf" and not there.is_dir():
        raise ConfigError(f"policy.path={path}: no such folder")
    if kind == "file" and not there.is_file():
        raise ConfigError(f"policy.path={path}: no such file")


def check_inner(inner: InnerConfig, base: ModelConfig) -> None:
    """Raise ConfigError for what a model of the shape ``base`` cannot be trained by."""
    check_bounds(inner, "inner.")
    steps = inner.inner_steps
    line = f"inner.inner_steps={','.join(map(str, steps))}: must be numbers that rise above 0"
    require(bool(steps) and steps == sorted(set(steps)) and steps[-1] > 0, line)
    rank = inner.lora.rank
    if rank is not None:
        line = (
            f"inner.lora.rank={rank}: must be at most {base.d_model}, the width of the run's model"
        )
        require(rank <= base.d_model, line)
    line = (
        "run: trained with model.parametrization=mup, under which adapters have no rule for rates"
    )
    require(base.parametrization == "standard", line)


def methods_of(config: AdaptConfig) -> list[str]:
    """Return the methods in order; only the embedded corpus knows other ways to say a thing."""
    known = [m for m in METHODS if m != "oracle" or config.documents.task == "new_facts"]
    return [m for m in known if config.methods is None or m in config.methods]


def count_trials(config: AdaptConfig) -> int:
    """Count the edits of documents that a study trains on, ``none`` included."""
    documents, outer, tuning = config.documents, config.outer, config.tuning
    trials = 0
    for method in methods_of(config):
        rounds = outer.iterations + 1 if method == "restem" else 1
        trials += documents.test * rounds
        if method in RATED:
            trials += documents.tune * len(tuning.learning_rates)
        elif method == "restem":
            trials += documents.train * outer.iterations * outer.samples * outer.inner_seeds
    return trials


def count_records(config: AdaptConfig) -> int:
    """Count the lines that ``adapt.jsonl`` will have, beside those of skipped documents.

    A trial has one for each number of steps, of ``none`` one.
    """
    alone = config.documents.test if "none" in methods_of(config) else 0
    return alone + (count_trials(config) - alone) * len(config.inner.inner_steps)


# --- which adaptation it is


def contents(config: AdaptConfig) -> dict[str, str]:
    """Return fingerprints of all that a configuration names and does not hold, for its hash.

    Raises ConfigError for a base that is not there.
    """
    from tinygpt.data import corpora  # numpy, for what may be refused before

    base = rundir.open_run(config.run)
    found = {
        # its own text, for what it forgets
        "run": fileio.read_json(base.environment)["config_hash"],
        "checkpoint": fileio.sha256(base.chosen(config.checkpoint)),
        "tokenizer": fileio.sha256(base.tokenizer),
    }
    if config.data is not None:
        found["data"] = corpora.open_corpus(config.data).fingerprint()
    path = getattr(config.policy, "path", None)
    if path is not None:
        found["policy"] = _fingerprint(Path(path).expanduser())
    return found


def _fingerprint(path: Path) -> str:
    """Return that of a file, or of the files in a folder; another name stands for itself."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return fileio.digest([[file.name, fileio.sha256(file)] for file in files])
    return fileio.sha256(path) if path.is_file() else str(path)


def config_hash(config: AdaptConfig, content: dict[str, str]) -> str:
    """Return the hash of all that changes a result; ``content`` is that of ``contents``."""
    left_out = (*rundir.NOT_SCIENCE, *PLACES)
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    for name in rundir.DATA_PLACES:
        (values["data"] or {}).pop(name, None)
    values["policy"].pop("path", None)
    values["methods"] = methods_of(config)
    # as earlier versions had them, so that what was adapted then is still found
    values["outer"]["shared"], values["tuning"]["directives"] = False, 24
    return fileio.digest({**values, "content": content})


def identify(config: AdaptConfig, overrides: Sequence[str]) -> tuple[str, rundir.RunDir]:
    """Return the configuration's hash and folder; fill in ``study`` and ``run_name``."""
    hash_ = config_hash(config, contents(config))
    config.study = config.study or STUDY
    folder = rundir.folder_of(config, overrides, hash_)
    config.run_name = folder.name
    return hash_, rundir.RunDir(folder)
