"""The keys of ``python -m tinygpt.adapt`` with their types and bounds, what must fit together, and
the hash that says which adaptation a configuration is.  Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from tinygpt import fileio
from tinygpt.config import (
    REMOVED,
    Config,
    ConfigError,
    CustomData,
    DataConfig,
    LoraConfig,
    Settings,
    SyntheticData,
    install,
    key,
)
from tinygpt.config.checks import check_bounds, check_names, check_text, require
from tinygpt.runs import rundir

METHODS = ("none", "lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc", "restem")
RATED = METHODS[1:6]  # methods whose learning rate is chosen on tune documents
LEARN = ("self", "hf")  # policies that restem can train
STUDY = "adaptation"  # the study of an adaptation that names none


@dataclass
class DocumentsConfig:
    """Choose what a model adapts to."""

    task: str = key(
        "domain_shift",
        "domain_shift: documents of data=; new_facts: facts the embedded corpus never states",
        among=("domain_shift", "new_facts"),
    )
    train: int = key(8, "documents that restem learns from", least=0)
    tune: int = key(4, "documents that choose the learning rates", least=0)
    test: int = key(8, "documents that are reported", least=1)
    context_tokens: int = key(512, "tokens of a document, of domain_shift", least=1)
    heldout_tokens: int = key(2048, "tokens scored for the reward, of domain_shift", least=1)
    forgetting_tokens: int = key(8192, "validation tokens scored for forgetting", least=1)
    seed: int = key(0, "seed of the documents", least=0, most=2**32 - 1)


@dataclass
class InnerConfig:
    """Say how a model is trained on one edit; the steps are snapshots of one training."""

    inner_steps: list[int] = key([1, 3, 10, 30], "steps after which to score", least=0)
    tokens_per_step: int = key(128, "tokens per step", least=1)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8))  # rank null: all weights


@dataclass
class TuningConfig:
    """Say what is tried on the tune documents, by the reward after the most steps."""

    learning_rates: list[float] = key([3e-4, 1e-3, 3e-3, 1e-2], "rates to choose from", above=0.0)
    forgetting_weight: float = key(0.0, "w in score = reward - w·max(0, forgetting)", least=0.0)


@dataclass
class OuterConfig:
    """Say how ReST-EM (Singh et al. 2023) trains a policy on its own edits that paid."""

    iterations: int = key(2, "rounds of sampling edits and learning from the best", least=0)
    samples: int = key(4, "edits of each train document per iteration", least=1)
    inner_seeds: int = key(1, "seeds that an edit is trained with", least=1)
    explore: float = key(0.5, "share of random choices, first iteration", least=0.0, most=1.0)
    explore_later: float = key(0.1, "share of random choices afterwards", least=0.0, most=1.0)
    steps: int = key(60, "optimizer steps on the best edits", least=1)
    tokens_per_step: int = key(512, "tokens per step", least=1)
    learning_rate: float = key(1e-3, "learning rate", above=0.0)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=4))


@dataclass
class PolicyConfig:
    """The policy that proposes edits."""

    kind: str = key(MISSING, "kind of policy, set by policy=")


@dataclass
class WritingPolicy(PolicyConfig):
    """A policy that samples text of its own."""

    max_edit_tokens: int = key(128, "tokens of each text", least=1)
    temperature: float = key(0.8, "sampling temperature", above=0.0)
    top_k: Optional[int] = key(20, "draw from this many of the most likely; null: all", least=1)


@dataclass
class SelfPolicy(WritingPolicy):
    """The base itself."""

    kind: str = key("self", among=("self",))


@dataclass
class ModelPolicy(WritingPolicy):
    """A Hugging Face model in a local folder, or one that mlx_lm reads."""

    kind: str = key("hf", among=("hf", "mlx"))
    path: str = key(MISSING, "folder of the model")


@dataclass
class FilePolicy(PolicyConfig):
    """Edits written before: ``edits.jsonl`` of another study, or of anyone."""

    kind: str = key("file", among=("file",))
    path: str = key(MISSING, "edits.jsonl")


POLICIES: dict[str, type] = {"self": SelfPolicy, "model": ModelPolicy, "file": FilePolicy}


@dataclass
class AdaptConfig(Settings):
    """The whole configuration, as ``config.yaml`` in an adaptation's folder keeps it."""

    run: str = key(MISSING, "folder of the trained run that adapts")
    checkpoint: Optional[str] = key(None, "null: final, or last if the run has not ended")
    methods: Optional[list[str]] = key(None, "null: all that the task has", among=METHODS)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    data: Optional[DataConfig] = None  # of domain_shift: where the documents come from
    inner: InnerConfig = field(default_factory=InnerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    policy: PolicyConfig = MISSING


def methods_of(config: AdaptConfig) -> list[str]:
    """Return the methods in order; only the embedded corpus has an oracle."""
    known = [m for m in METHODS if m != "oracle" or config.documents.task == "new_facts"]
    return [m for m in known if config.methods is None or m in config.methods]


def check_adapt(config: AdaptConfig) -> None:
    """Check the bounds of every key, then what must fit together.  Raises ConfigError."""
    for method in config.methods or ():
        if removed := REMOVED.get(f"methods={method}"):
            raise ConfigError(f"methods={method}: removed; {removed}")
    check_bounds(config)
    data = config.data
    named = {"study": config.study, "run_name": config.run_name}
    check_names({**named, "data.name": data.name if data else None})
    check_text(data)
    for name in ("devices", "num_nodes"):
        value = getattr(config.hardware, name)
        require(value == 1, f"hardware.{name}={value}: an adaptation takes one device")
    require(not config.sweep.share_trunk, "sweep.share_trunk=true: not for adaptations")
    _check_methods(config)
    kind, path = config.policy.kind, getattr(config.policy, "path", None)
    place = Path(path or "").expanduser()
    require(kind != "hf" or place.is_dir(), f"policy.path={path}: no such folder")
    require(kind != "file" or place.is_file(), f"policy.path={path}: no such file")
    base = rundir.open_run(config.run)
    base.chosen(config.checkpoint)
    _check_base(config, rundir.read_config(base.config))


def _check_methods(config: AdaptConfig) -> None:
    """Check that methods have the documents, rates and adapters that they need."""
    documents, inner, outer = config.documents, config.inner, config.outer
    require(config.methods != [], f"methods=[]: must name some of {', '.join(METHODS)}")
    line = "methods=oracle: needs documents.task=new_facts, where other ways to say it are known"
    require("oracle" not in (config.methods or ()) or documents.task == "new_facts", line)
    methods, kind = methods_of(config), config.policy.kind
    if "restem" in methods and outer.iterations > 0:
        line = "documents.train=0: methods=restem learns from train documents"
        require(documents.train > 0, line)
        line = "does not learn, as restem asks; outer.iterations=0 tests it as it is"
        require(kind in LEARN, f"policy={kind}: {line}")
    rates = config.tuning.learning_rates
    require(bool(rates), "tuning.learning_rates=[]: must have a rate")
    steps = inner.inner_steps
    line = f"inner.inner_steps={','.join(map(str, steps))}: must be numbers that rise above 0"
    require(bool(steps) and steps == sorted(set(steps)) and steps[-1] > 0, line)
    for method in methods:
        line = f"documents.tune=0: methods={method} is tuned on tune documents"
        require(documents.tune > 0 or method not in RATED or len(rates) == 1, line)
        if method not in ("none", "full_ft_doc"):
            line = f"inner.lora.rank=null: methods={method} trains adapters"
            require(inner.lora.rank is not None, line)
            require(find_spec("peft") is not None, f"inner.lora.rank: needs {install('lora')}")
    for name, lora in {"inner": inner.lora, "outer": outer.lora}.items():
        line = f"{name}.lora.alpha={lora.alpha}: needs {name}.lora.rank"
        require(lora.rank is not None or lora.alpha is None, line)


def _check_base(config: AdaptConfig, base: Config) -> None:
    """Check what depends on the run that adapts."""
    data, width = config.data, base.model.d_model
    task = f"documents.task={config.documents.task}"
    if config.documents.task == "new_facts":
        name = data.name if data else ""
        require(data is None, f"data={name}: not with {task}, which makes its own documents")
        line = f"{task}: needs a run that was trained on data=synthetic; {config.run} was trained "
        require(isinstance(base.data, SyntheticData), f"{line}on {base.data.name}")
    elif data is None:
        raise ConfigError(f"{task}: needs data=, where its documents come from")
    else:
        line = f"data={data.name}: what {config.run} was trained on is not new to it"
        require(_place(data) != _place(base.data), line)
    rank, outer = config.inner.lora.rank or 0, config.outer.lora.rank or 0
    line = f"inner.lora.rank={rank}: must be at most {width}, the width of the run's model"
    require(rank <= width, line)
    line = f"outer.lora.rank={outer}: must be at most {width}, the width of the policy"
    require(outer <= width or config.policy.kind == "hf", line)
    line = "trained with model.parametrization=mup, under which adapters have no rule for rates"
    require(base.model.parametrization == "standard", f"run: {line}")


def _place(data: DataConfig) -> tuple[str, str]:
    """Return where a corpus is, absolute."""
    if isinstance(data, CustomData):
        return data.source, str(Path(data.path).expanduser().resolve())
    return data.source, getattr(data, "repo", "")


def count_trials(config: AdaptConfig) -> int:
    """Count the edits of documents that a study trains on, ``none`` included."""
    documents, outer, methods = config.documents, config.outer, methods_of(config)
    trials = documents.test * len(methods)
    trials += documents.tune * len(config.tuning.learning_rates) * len({*RATED} & {*methods})
    if "restem" in methods:
        each = documents.test + documents.train * outer.samples * outer.inner_seeds
        trials += outer.iterations * each
    return trials


def count_records(config: AdaptConfig) -> int:
    """Count the lines that ``adapt.jsonl`` will have: a trial has one for each number of steps, or
    one in all if its method is ``none``."""
    alone = config.documents.test if "none" in methods_of(config) else 0
    return alone + (count_trials(config) - alone) * len(config.inner.inner_steps)


# --- which adaptation it is


def contents(config: AdaptConfig) -> dict[str, str]:
    """Return fingerprints of what a configuration names and does not hold, for its hash.  Raises
    ConfigError for a base that is not there."""
    from tinygpt.data import corpora  # slow to import, and not needed for what is refused before

    base = rundir.open_run(config.run)
    found = {
        "run": fileio.read_json(base.environment)["config_hash"],  # its own text may be forgotten
        "checkpoint": fileio.sha256(base.chosen(config.checkpoint)),
        "tokenizer": fileio.sha256(base.tokenizer),
    }
    if config.data is not None:
        found["data"] = corpora.open_corpus(config.data).fingerprint()
    if (path := getattr(config.policy, "path", None)) is not None:
        place = Path(path).expanduser()
        found["policy"] = fileio.sha256(place) if place.is_file() else str(place)
        if place.is_dir():
            files = sorted(file for file in place.iterdir() if file.is_file())
            found["policy"] = fileio.digest([[file.name, fileio.sha256(file)] for file in files])
    return found


def config_hash(config: AdaptConfig, content: dict[str, str]) -> str:
    """Return the hash of all that changes a result; ``content`` is that of ``contents``."""
    left_out = (*rundir.NOT_SCIENCE, "run", "checkpoint")
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    for name in rundir.DATA_PLACES:
        (values["data"] or {}).pop(name, None)
    values["policy"].pop("path", None)
    values["methods"] = methods_of(config)
    # removed keys at their defaults, so that adaptations of earlier versions keep their hash
    values["outer"]["shared"], values["tuning"]["directives"] = False, 24
    return fileio.digest({**values, "content": content})


def identify(config: AdaptConfig, overrides: Sequence[str]) -> tuple[str, rundir.RunDir]:
    """Return the configuration's hash and folder; fill in ``study`` and ``run_name``."""
    hash_ = config_hash(config, contents(config))
    config.study = config.study or STUDY
    folder = rundir.folder_of(config, overrides, hash_)
    config.run_name = folder.name
    return hash_, rundir.RunDir(folder)
