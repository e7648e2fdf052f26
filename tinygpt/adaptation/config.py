"""The schema of ``python -m tinygpt.adapt``: every key, its type and its bounds.  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from tinygpt.checks import check_bounds, require
from tinygpt.config import (
    DataConfig,
    HardwareConfig,
    LauncherConfig,
    LoraConfig,
    ModelConfig,
    SweepConfig,
    key,
)

METHODS = (
    *("none", "lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc"),
    *("uniform_directive", "fixed_best_directive", "restem"),
)


@dataclass
class DocumentsConfig:
    """What a model adapts to: how many documents, and how each is cut."""

    task: str = key("domain_shift", among=("domain_shift", "new_facts"))
    train: int = key(8, least=0)  # documents that a policy learns from
    tune: int = key(4, least=0)  # that rates and directives are chosen on
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

    learning_rates: list[float] = key([1e-3, 3e-3, 1e-2], above=0.0)  # noqa: RUF009
    directives: int = key(24, least=1)  # drawn at random for fixed_best_directive, beside the rates
    forgetting_weight: float = key(0.0, least=0.0)  # score = reward - weight·max(0, forgetting)


@dataclass
class OuterConfig:
    """ReST-EM (Singh et al. 2023): a policy is trained on those of its own edits that paid."""

    iterations: int = key(2, least=1)
    samples: int = key(4, least=1)  # edits of a train document; the best is learned from
    inner_seeds: int = key(1, least=1)  # trainings on each edit, whose mean score counts
    explore: float = key(0.5, least=0.0, most=1.0)  # share of uniform choice in iteration 0
    explore_later: float = key(0.1, least=0.0, most=1.0)
    steps: int = key(60, least=1)  # of the policy's own training
    tokens_per_step: int = key(512, least=1)
    learning_rate: float = key(1e-3, above=0.0)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=4))
    shared: bool = False  # the policy of each iteration is also the base that adapts


@dataclass
class PolicyConfig:
    """Who proposes edits."""

    kind: str = MISSING


@dataclass
class WritingPolicy(PolicyConfig):
    """Text of its own, by sampling."""

    max_edit_tokens: int = key(128, least=1)  # of each text
    temperature: float = key(0.8, above=0.0)
    top_k: Optional[int] = key(20, least=1)


@dataclass
class SelfPolicy(WritingPolicy):
    """The base itself; and with ``table`` choices by a table, of which each is a weight of its own
    whatever the document, and the base writes the text."""

    kind: str = key("self", among=("self", "table"))


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
class AdaptConfig:
    """The whole of it, as ``config.yaml`` in the folder of an adaptation keeps it."""

    run: str = MISSING  # the folder of the trained run that adapts
    checkpoint: Optional[str] = None  # null: final, of a run that has not ended last
    methods: Optional[list[str]] = key(None, among=METHODS)  # noqa: RUF009  # null: all of the task
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    data: Optional[DataConfig] = None  # of domain_shift: where the documents come from
    inner: InnerConfig = field(default_factory=InnerConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    policy: PolicyConfig = MISSING
    hardware: HardwareConfig = MISSING
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    scale: str = key("laptop", among=("smoke", "laptop", "gpu"))
    seed: int = key(42, least=0, most=2**32 - 1)
    study: Optional[str] = None
    run_name: Optional[str] = None
    output_dir: str = "outputs"
    cache_dir: Optional[str] = None
    force: bool = False
    plan: bool = False
    fit: bool = True


def check_inner(inner: InnerConfig, base: ModelConfig) -> None:
    """Raises ConfigError for what a model of the shape ``base`` cannot be trained by."""
    check_bounds(inner)
    steps = inner.inner_steps
    line = f"inner_steps={','.join(map(str, steps))}: must be numbers that rise"
    require(bool(steps) and steps == sorted(set(steps)), line)
    rank = inner.lora.rank
    if rank is not None:
        line = f"lora.rank={rank}: must be at most {base.d_model}, the width of the run's model"
        require(rank <= base.d_model, line)
    line = (
        "run: trained with model.parametrization=mup, under which adapters have no rule for rates"
    )
    require(base.parametrization == "standard", line)


def methods_of(config: AdaptConfig) -> list[str]:
    """In the order of METHODS; only the embedded corpus knows other ways to say a thing."""
    known = [m for m in METHODS if m != "oracle" or config.documents.task == "new_facts"]
    return [m for m in known if config.methods is None or m in config.methods]


def count_trials(config: AdaptConfig) -> int:
    """How many edits of a document a study trains on, ``none`` included."""
    documents, outer, tuning = config.documents, config.outer, config.tuning
    trials = 0
    for method in methods_of(config):
        rounds = outer.iterations + 1 if method == "restem" else 1
        trials += documents.test * rounds
        if method == "fixed_best_directive":
            trials += documents.tune * tuning.directives
        elif method in ("lora_doc", "lora_edit", "lora_doc+edit", "oracle", "full_ft_doc"):
            trials += documents.tune * len(tuning.learning_rates)
        elif method == "restem":
            trials += documents.train * outer.iterations * outer.samples * outer.inner_seeds
    return trials


def count_records(config: AdaptConfig) -> int:
    """How many lines ``adapt.jsonl`` will have, beside those of documents that are passed over: of
    a trial one for each number of steps, of ``none`` one."""
    alone = config.documents.test if "none" in methods_of(config) else 0
    return alone + (count_trials(config) - alone) * len(config.inner.inner_steps)
