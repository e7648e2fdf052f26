"""Define, check and hash the configuration of ``python -m tinygpt.adapt``.  Torch-free."""

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
STUDY = "adaptation"  # default name of the study


@dataclass
class DocumentsConfig:
    """Choose what the model adapts to."""

    task: str = key(
        "domain_shift",
        "Adapt to documents of data=, or to facts that the embedded corpus never states.",
        among=("domain_shift", "new_facts"),
    )
    train: int = key(8, "Documents that restem learns from.", least=0)
    tune: int = key(4, "Documents on which learning rates are chosen.", least=0)
    test: int = key(8, "Documents on which results are reported.", least=1)
    context_tokens: int = key(512, "Tokens of a document to learn, under domain_shift.", least=1)
    heldout_tokens: int = key(2048, "Tokens of a document to score, under domain_shift.", least=1)
    forgetting_tokens: int = key(8192, "Validation tokens scored to measure forgetting.", least=1)
    seed: int = key(0, "Seed of the choice of documents.", least=0, most=2**32 - 1)


@dataclass
class InnerConfig:
    """Set how a model is trained on one edit; all its scores are from a single training."""

    inner_steps: list[int] = key([1, 3, 10, 30], "Steps at which the model is scored.", least=0)
    tokens_per_step: int = key(128, "Tokens per optimizer step.", least=1)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8))


@dataclass
class TuningConfig:
    """Set what is tried on the tune documents, scored after the most steps."""

    learning_rates: list[float] = key([3e-4, 1e-3, 3e-3, 1e-2], "Rates to choose from.", above=0.0)
    forgetting_weight: float = key(0.0, "Weight w in reward - w·max(0, forgetting).", least=0.0)


@dataclass
class OuterConfig:
    """Set how ReST-EM (Singh et al. 2023) trains a policy on its own successful edits."""

    iterations: int = key(2, "Rounds of sampling edits and learning from the best.", least=0)
    samples: int = key(4, "Edits per train document and iteration.", least=1)
    inner_seeds: int = key(1, "Number of seeds with which each edit is tried.", least=1)
    explore: float = key(0.5, "Share of random choices in the first round.", least=0.0, most=1.0)
    explore_later: float = key(0.1, "Share of random choices in later rounds.", least=0.0, most=1.0)
    steps: int = key(60, "Optimizer steps on the best edits.", least=1)
    tokens_per_step: int = key(512, "Tokens per optimizer step.", least=1)
    learning_rate: float = key(1e-3, "Learning rate of the policy.", above=0.0)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=4))


@dataclass
class PolicyConfig:
    """Choose the policy that proposes edits."""

    kind: str = key(MISSING, "Kind of policy; set by policy=.")


@dataclass
class WritingPolicy(PolicyConfig):
    """Set how a policy samples its own text."""

    max_edit_tokens: int = key(128, "Most tokens of each text.", least=1)
    temperature: float = key(0.8, "Sampling temperature.", above=0.0)
    top_k: Optional[int] = key(20, "Choose among this many likeliest tokens; null is all.", least=1)


@dataclass
class SelfPolicy(WritingPolicy):
    """Let the base itself propose edits."""

    kind: str = key("self", among=("self",))


@dataclass
class ModelPolicy(WritingPolicy):
    """Use a Hugging Face model in a local folder, or one that mlx_lm reads."""

    kind: str = key("hf", among=("hf", "mlx"))
    path: str = key(MISSING, "Folder of the model.")


@dataclass
class FilePolicy(PolicyConfig):
    """Replay edits from a file, such as ``edits.jsonl`` of another study."""

    kind: str = key("file", among=("file",))
    path: str = key(MISSING, "File of edits, one JSON object per line.")


POLICIES: dict[str, type] = {"self": SelfPolicy, "model": ModelPolicy, "file": FilePolicy}


@dataclass
class AdaptConfig(Settings):
    """Hold the whole configuration, as saved in ``config.yaml`` in an adaptation's folder."""

    run: str = key(MISSING, "Folder of the trained run that adapts.")
    checkpoint: Optional[str] = key(None, "Checkpoint to adapt; null means final, else last.")
    methods: Optional[list[str]] = key(None, "Methods to compare; null means all.", among=METHODS)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    data: Optional[DataConfig] = None  # for domain_shift
    inner: InnerConfig = field(default_factory=InnerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    policy: PolicyConfig = MISSING


def methods_of(config: AdaptConfig) -> list[str]:
    """Return the methods in order; only new_facts has an oracle."""
    known = [m for m in METHODS if m != "oracle" or config.documents.task == "new_facts"]
    return [m for m in known if config.methods is None or m in config.methods]


def check_adapt(config: AdaptConfig) -> None:
    """Check the bounds of every key, then that the keys fit together, or raise ConfigError."""
    for method in config.methods or ():
        if removed := REMOVED.get(f"methods={method}"):
            raise ConfigError(f"methods={method}: removed; {removed}")
    check_bounds(config)
    name = config.data.name if config.data else None
    check_names({"study": config.study, "run_name": config.run_name, "data.name": name})
    check_text(config.data)
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
    """Check that the methods have the documents, rates and adapters that they need."""
    documents, inner, outer = config.documents, config.inner, config.outer
    require(config.methods != [], f"methods=[]: must name some of {', '.join(METHODS)}")
    line = "methods=oracle: needs documents.task=new_facts, where other ways to say it are known"
    require("oracle" not in (config.methods or ()) or documents.task == "new_facts", line)
    methods, kind = methods_of(config), config.policy.kind
    if "restem" in methods and outer.iterations > 0:
        line = "documents.train=0: methods=restem learns from train documents"
        require(documents.train > 0, line)
        line = "cannot be trained, as restem requires; outer.iterations=0 only tests it"
        require(kind in LEARN, f"policy={kind}: {line}")
    rates = config.tuning.learning_rates
    require(bool(rates), "tuning.learning_rates=[]: must have a rate")
    steps = inner.inner_steps
    line = f"inner.inner_steps={','.join(map(str, steps))}: must be increasing numbers above 0"
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
        line = f"data={data.name}: not new to {config.run}, which was trained on it"
        require(_location(data) != _location(base.data), line)
    rank, outer = config.inner.lora.rank or 0, config.outer.lora.rank or 0
    line = f"inner.lora.rank={rank}: must be at most {width}, the width of the run's model"
    require(rank <= width, line)
    line = f"outer.lora.rank={outer}: must be at most {width}, the width of the policy"
    require(outer <= width or config.policy.kind == "hf", line)
    line = "trained with model.parametrization=mup, under which adapters have no rule for rates"
    require(base.model.parametrization == "standard", f"run: {line}")


def _location(data: DataConfig) -> tuple[str, str]:
    """Return the kind of a corpus, and its absolute path or its name on the hub."""
    if isinstance(data, CustomData):
        return data.source, str(Path(data.path).expanduser().resolve())
    return data.source, getattr(data, "repo", "")


def count_trials(config: AdaptConfig) -> int:
    """Count the trials of a study, those of ``none`` included."""
    documents, outer, methods = config.documents, config.outer, methods_of(config)
    trials = documents.test * len(methods)
    trials += documents.tune * len(config.tuning.learning_rates) * len({*RATED} & {*methods})
    if "restem" in methods:
        each = documents.test + documents.train * outer.samples * outer.inner_seeds
        trials += outer.iterations * each
    return trials


def count_records(config: AdaptConfig) -> int:
    """Count the records of a study: one for each trial and number of steps; ``none`` has one."""
    alone = config.documents.test if "none" in methods_of(config) else 0
    return alone + (count_trials(config) - alone) * len(config.inner.inner_steps)


# --- the hash of a configuration


def contents(config: AdaptConfig) -> dict[str, str]:
    """Return fingerprints of the files that a configuration names, or raise ConfigError."""
    from tinygpt.data import corpora  # slow to import

    base = rundir.open_run(config.run)
    found = {
        "run": fileio.read_json(base.environment)["config_hash"],  # covers its validation text
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
    """Return the hash of all that changes a result; ``content`` comes from ``contents``."""
    left_out = (*rundir.NOT_SCIENCE, "run", "checkpoint")
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    for name in rundir.DATA_PLACES:
        (values["data"] or {}).pop(name, None)
    values["policy"].pop("path", None)
    values["methods"] = methods_of(config)
    # removed keys at their defaults: adaptations of earlier versions keep their hash
    values["outer"]["shared"], values["tuning"]["directives"] = False, 24
    return fileio.digest({**values, "content": content})


def identify(config: AdaptConfig, overrides: Sequence[str]) -> tuple[str, rundir.RunDir]:
    """Return the configuration's hash and folder; fill in ``study`` and ``run_name``."""
    hash_ = config_hash(config, contents(config))
    config.study = config.study or STUDY
    folder = rundir.folder_of(config, overrides, hash_)
    config.run_name = folder.name
    return hash_, rundir.RunDir(folder)
