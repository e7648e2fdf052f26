"""Every shipped configuration trains a step; every key changes what it says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tests.conftest import LAYOUTS, REAL_DATA, Command, lay_out, tiny
from tests.grammar import entropy
from tinygpt import cli
from tinygpt import config as schema
from tinygpt.config import Config, ConfigError
from tinygpt.config.counting import count_parameters, flops_per_token, padded_vocab
from tinygpt.config.horizon import derive
from tinygpt.data import corpora
from tinygpt.data.corpora import HubCorpus, open_corpus
from tinygpt.data.datamodule import TokenData
from tinygpt.data.shards import cache_root, prepare
from tinygpt.data.synthetic import Grammar
from tinygpt.data.tokenizers import Bytes, train_tokenizer
from tinygpt.model import gpt
from tinygpt.model.families import to_config
from tinygpt.model.gpt import GPT
from tinygpt.runs import rundir
from tinygpt.training import hardware, loggers
from tinygpt.training.optim import make_optimizer, rate_factor
from tinygpt.training.session import train
from tinygpt.words import key_types

CONF = Path(cli.CONF_DIR)
GPT2 = REAL_DATA / "gpt2-bpe"
GROUPS = (
    *("model", "data", "tokenizer", "optim", "schedule", "hardware", "logger"),
    *("launcher", "experiment"),
)
PAIRS = [(g, path.stem) for g in GROUPS for path in sorted((CONF / g).glob("*.yaml"))]
PAIRS.remove(("experiment", "adaptation"))  # of tinygpt.adapt, as what follows
OF_ADAPT = {"adapt.yaml", "hydra/help/adapt.yaml", "experiment/adaptation.yaml"} | {
    f"policy/{name}.yaml" for name in ("self", "hf", "mlx", "file")
}
CHOICES = [pytest.param(*pair, id="=".join(pair)) for pair in PAIRS]
LARGE = ("slm_tinystories", "gpt_research")  # ten seconds and more for a step, however cut
VOCABULARY = {"gpt2": 50257, "char": 97, "byte": 258, "saved": 300}


def test_every_file_of_conf_is_in_a_group_that_is_tested() -> None:
    known = {CONF / "config.yaml", CONF / "hydra" / "help" / "run.yaml"}
    known |= {CONF / name for name in OF_ADAPT}
    known |= {CONF / group / f"{choice}.yaml" for group, choice in PAIRS}
    assert set(CONF.rglob("*.yaml")) == known


def test_the_help_names_every_choice() -> None:
    assert {choice for _, choice in PAIRS} <= set(re.findall(r"\w+", cli.help_text(cli.RUN)))


def required(group: str, choice: str) -> list[str]:
    """What a choice cannot be composed without."""
    missing = {"custom": ["data.path=somewhere.txt"], "hub": ["data.repo=some/where"]}
    if (group, choice) == ("tokenizer", "saved"):
        return ["tokenizer.path=somewhere"]
    return missing.get(choice, []) if group == "data" else []


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_choice_is_composed_and_built(group: str, choice: str) -> None:
    """At its full size, on the meta device, with as many parameters as we count."""
    config = compose_once(f"{group}={choice}", *required(group, choice))
    tokenizer = config.tokenizer
    if isinstance(tokenizer, schema.BpeTokenizer):
        vocab_size = tokenizer.vocab_size
    else:
        vocab_size = VOCABULARY[tokenizer.kind]
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
        tokens = torch.zeros(2, config.model.max_seq_len, dtype=torch.int64)
    rows = padded_vocab(vocab_size, config.model.pad_vocab_to_multiple)
    assert model(tokens).shape == (2, config.model.max_seq_len, rows)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == count_parameters(config.model, vocab_size).total
    make_optimizer(model, config.optim, fused=False)
    plan = derive(
        config,
        parameters=total,
        flops_per_token=flops_per_token(config.model, vocab_size),
        windows=100_000,
    )
    assert plan.warmup_steps < plan.total_steps


def stories(count: int) -> list[str]:
    return [
        f"Story {n}. A cat saw {n * n} birds and {n % 7} plums, then it slept."
        for n in range(count)
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder for each named corpus, laid out like the hub."""
    held_out = stories(350)[300:]
    for layout in LAYOUTS.values():
        lay_out(tmp_path, layout, {"train": stories(300), "validation": held_out, "test": held_out})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_step(group: str, choice: str, corpus: Path) -> list[str]:
    """The choice with its batch, its context and, if it is large, its depth cut down."""
    words = [f"{group}={choice}", "model.max_seq_len=32", "train.batch_tokens=64"]
    words += ["train.steps=1", "schedule.warmup_steps=0", "train.sample_tokens=4"]
    words += ["data.eval_tokens=200", "hardware.threads=1", "study=s", "run_name=r"]
    recipe = compose_once(f"{group}={choice}", *required(group, choice))
    if count_parameters(recipe.model, 50257).total > 30e6:
        words.append("model.n_layers=1")
    if group != "tokenizer" and recipe.tokenizer.kind == "bpe":
        words.append("tokenizer.vocab_size=300")
    if recipe.schedule.kind == "wsd":
        words.append("schedule.min_ratio=0.1")  # the only step is the last one
    if recipe.tokenizer.kind == "saved":
        Bytes().save(Path("own.json"))
        words.append("tokenizer.path=own.json")
    if recipe.tokenizer.kind == "gpt2":
        if not GPT2.is_dir():
            pytest.skip("no GPT-2 vocabulary beside the project")
        words.append(f"tokenizer.vocab_dir={GPT2}")
    if group == "data" and choice == "hub":
        words.append("data.repo=roneneldan/TinyStories")
    elif group == "data" and recipe.data.source not in ("hub", "custom"):  # made, not read
        words += ["data.max_documents=200", "tokenizer.train_bytes=10_000"]
    elif recipe.data.name not in LAYOUTS:
        words += [f"data.path={corpus}", *(["data=custom"] if choice != "custom" else [])]
    if group != "hardware":
        words.append("hardware=cpu")
    return words


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        pytest.param(*pair, id="=".join(pair), marks=[pytest.mark.slow] * (pair[1] in LARGE))
        for pair in PAIRS
    ],
)
def test_a_choice_takes_a_step(
    hub: Path, cache: Path, corpus: Path, group: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = one_step(group, choice, corpus)
    if choice in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, choice, None)
        refused = rf"logger={choice}: needs `pip install -e '\.\[{choice}\]'`"
    elif choice in ("cuda", "cuda_ddp") and not torch.cuda.is_available():
        refused = "hardware.accelerator=cuda: .*usable here: auto, .*cpu"
    elif choice == "mps" and not torch.backends.mps.is_available():
        refused = "hardware.accelerator=mps: .*usable here: auto, .*cpu"
    else:
        refused = ""
    words += [f"cache_dir={cache}"]
    console = Console(file=io.StringIO())
    if refused:
        with pytest.raises(ConfigError, match=refused):
            train(cli.compose_config(words), words, console)
        assert not (hub / "outputs").exists()
        return
    results = train(cli.compose_config(words), words, console)
    assert results["total_steps"] == 1
    assert results["final_val_loss"] != results["initial_val_loss"]
    run = hub / "outputs" / "s" / "r"
    assert json.loads((run / "results.json").read_text()) == results
    assert any(run.glob("events.*")) == (choice != "csv")


# The recipes, as they were stated

RECIPES = {
    "tinygpt_base": "model.n_layers=6 model.d_model=128 model.n_heads=8 model.max_seq_len=256 "
    "model.dropout=0.1 tokenizer=char train.batch_tokens=8192 optim=adamw optim.learning_rate=3e-4 "
    "optim.weight_decay=0.01 schedule.warmup_steps=100 train.grad_clip_norm=1",
    "slm_tinystories": "model.n_layers=6 model.d_model=384 model.n_heads=6 model.max_seq_len=128 "
    "model.dropout=0.1 tokenizer=gpt2 data.name=tinystories train.batch_tokens=131_072 optim=adamw "
    "optim.learning_rate=1e-4 optim.eps=1e-9 optim.betas=[0.9,0.95] optim.weight_decay=0.1 "
    "schedule.warmup_steps=1000 train.grad_clip_norm=0.5",
    "educational": "model.n_layers=4 model.d_model=128 model.n_heads=4 model.max_seq_len=256 "
    "model.position=learned tokenizer=bpe tokenizer.vocab_size=1000 optim.learning_rate=1e-3",
    "educational_rope": "model.n_layers=4 model.d_model=128 model.n_heads=4 model.max_seq_len=256 "
    "model.position=rope tokenizer=bpe tokenizer.vocab_size=1000 optim.learning_rate=1e-3",
    "gpt_research": "model.n_layers=12 model.d_model=768 model.n_heads=12 model.max_seq_len=512 "
    "tokenizer=gpt2 train.batch_tokens=262_144 optim.learning_rate=6e-4 train.steps=20_000 "
    "schedule.warmup_steps=700 train.grad_clip_norm=1",
}


def value(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_as_stated(name: str) -> None:
    """To say so again changes nothing."""
    config = cli.compose_config([f"experiment={name}"])
    assert config == cli.compose_config([f"experiment={name}", *RECIPES[name].split()])


def test_the_printed_configuration_is_yaml(tinygpt: Command) -> None:
    words = ["experiment=slm_tinystories", "optim.learning_rate=1e-5"]
    done = tinygpt("run", *words, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    printed = OmegaConf.create(done.stdout)
    assert isinstance(printed, DictConfig)
    config = cli.compose_config(words)
    for section in ("model", "data", "tokenizer", "schedule"):
        assert printed[section] == dataclasses.asdict(getattr(config, section))
    assert float(printed["optim"]["learning_rate"]) == config.optim.learning_rate


# Every key changes what it says.  A key is read here: `base` words, then `word` on top of them;
# `part` is the part of the whole that must come out different.

Part = Callable[[Config, Path], Any]


def model_part(config: Config, cache: Path) -> Any:
    """Shapes, logits in training, and the ways by which they were computed."""
    torch.manual_seed(0)
    model = GPT(config.model, 50)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # biases too
    with (
        mock.patch.object(gpt, "manual_attention", wraps=gpt.manual_attention) as manual,
        mock.patch("tinygpt.model.gpt.checkpoint", wraps=torch_checkpoint) as saving,
    ):
        logits = model(torch.arange(8)[None])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return shapes, logits.tolist(), manual.called, saving.called


def window_part(config: Config, cache: Path) -> Any:
    """The length that the model takes and that the data is cut into."""
    return GPT(config.model, 50).position_embedding.weight.shape, data_part(config, cache)


def plan_part(config: Config, cache: Path) -> Any:
    return derive(config, parameters=5000, flops_per_token=30_000.0, windows=1000)


def optim_part(config: Config, cache: Path) -> Any:
    optimizer = make_optimizer(GPT(config.model, 50), config.optim, fused=False)
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return type(optimizer), groups


def rate_part(config: Config, cache: Path) -> Any:
    plan = plan_part(config, cache)
    total, warmup = plan.total_steps, plan.warmup_steps
    return [
        rate_factor(n, config.schedule, total_steps=total, warmup_steps=warmup)
        for n in range(total)
    ]


def data_part(config: Config, cache: Path) -> Any:
    """What is trained on and what is scored, token by token."""
    data = TokenData(
        config, prepare(open_corpus(config.data), config.data, config.tokenizer, cache)
    )
    train_tokens = data.splits["train"].gather(data.windows.starts, data.length + 1).tolist()
    scored = {
        name: [targets.tolist() for _, targets in data.eval_batches(name, 64)]
        for name in data.splits
        if name != "train"
    }
    return train_tokens, scored


def tokenizer_part(config: Config, cache: Path) -> Any:
    return train_tokenizer(config.tokenizer, ["some text"]).fingerprint()


def device_part(config: Config, cache: Path) -> Any:
    try:
        return hardware.resolve_device(config.hardware, config.train.precision)
    except ConfigError as error:
        return str(error)


def grammar_part(config: Config, cache: Path) -> Any:
    assert isinstance(config.data, schema.SyntheticData)
    grammar = Grammar(config.data)
    return next(grammar.stories()), entropy(grammar), len(grammar.heldout)


def hub_part(config: Config, cache: Path) -> Any:
    """The documents, from a hub library that answers with what it was asked."""
    asked: list[Any] = []

    def load(repo: str, name: Any, *, split: str, streaming: bool, revision: Any) -> Any:
        asked.append((repo, name, split, revision))
        return [{"text": f"{repo} {split} # {n}", "title": f"# {n}"} for n in range(3)]

    fake = SimpleNamespace(
        logging=SimpleNamespace(set_verbosity_error=lambda: None),
        disable_progress_bars=lambda: None,
        get_dataset_split_names=lambda repo, name: ["train", "validation", "test", "extra"],
        load_dataset=load,
    )
    assert isinstance(config.data, schema.HubData)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", fake)
        patch.setattr(corpora, "require_hub", lambda *args: None)
        corpus = HubCorpus(config.data)
        found = {
            split: [document.text for document in corpus.documents(split)]
            for split in ("train", *sorted(corpus.own))
        }
    return found, asked


def logger_part(config: Config, cache: Path) -> Any:
    """What the libraries are given."""
    board, init = mock.MagicMock(), mock.MagicMock()
    sizes = dict.fromkeys(rundir.SIZES, 1)
    run = rundir.RunDir(cache)
    rundir.MetricsFile(run.metrics).keep_until(-1)
    with (
        mock.patch.object(loggers, "MlflowRun"),
        mock.patch.object(loggers, "Board", board),
        mock.patch.dict(sys.modules, wandb=mock.MagicMock(init=init, Settings=dict)),
    ):
        loggers.Loggers().begin(config, run, sizes, None, {})
    flush_seconds = board.call_args and board.call_args.args[2]
    place = config.logger.mlflow and (loggers.mlflow_uri(config), config.logger.mlflow.experiment)
    return flush_seconds, init.call_args, place


def place_part(config: Config, cache: Path) -> Any:
    return config.output_dir, config.study, config.run_name, cache_root(config.cache_dir)


# The section, words before, and words that each change a part.  OTHER, TABLE and PATH are files.
TABLE: list[tuple[str, str, str, Part]] = [
    ("model", "", "n_layers=2 d_model=32 n_heads=4 n_kv_heads=1 d_ff=24 dropout=0.5", model_part),
    ("model", "", "bias=false tie_weights=false position=rope norm=rmsnorm", model_part),
    ("model", "", "norm_eps=1e-3 attention=manual gradient_checkpointing=true", model_part),
    ("model", "", "pad_vocab_to_multiple=64 parametrization=mup", model_part),
    *(
        ("model", "", f"activation={name}", model_part)
        for name in schema.ACTIVATIONS
        if name != "gelu"
    ),
    ("model", "model.position=rope", "rope_theta=100", model_part),
    ("model", "model.parametrization=mup", "mup_base_width=8", model_part),
    ("model", "", "max_seq_len=16", window_part),
    ("data", "", "fraction=0.5 stride=16 max_tokens=2000 max_documents=200", data_part),
    ("data", "", "eval_tokens=300 val_fraction=0.2 test_fraction=0.2 val_is_test=true", data_part),
    ("data", "", "separator=plums path=OTHER val_file=OTHER test_file=OTHER", data_part),
    ("data", "data.val_file=OTHER data.test_file=OTHER", "separator=none", data_part),
    ("data", "data.path=TABLE", "text_column=title", data_part),
    ("data", "", "name=mine", lambda config, cache: corpora.describe(config.data)),
    ("data", "data=synthetic", "corpus_seed=1 n_facts=100 zipf_exponent=2", grammar_part),
    ("data", "data=synthetic", "noise_rate=0.5 heldout_entities=3", grammar_part),
    ("data", "data=hub data.repo=a/b", "repo=other/repo config=some split=extra", hub_part),
    ("data", "data=hub data.repo=a/b", "val_split=extra val_split=null test_split=null", hub_part),
    ("data", "data=hub data.repo=a/b", "revision=abc separator='#' text_column=title", hub_part),
    ("tokenizer", "tokenizer=bpe", "vocab_size=258", tokenizer_part),
    ("tokenizer", "tokenizer=char", "train_bytes=1", data_part),
    ("optim", "", "learning_rate=0.01 weight_decay=0.2 decay_embeddings=false", optim_part),
    ("optim", "", "betas=[0.8,0.9] eps=1e-6 scale_rate_with_width=true", optim_part),
    ("optim", "optim=sgd", "momentum=0.5 nesterov=false", optim_part),
    ("optim", "optim=muon", "adam_learning_rate=0.02 ns_steps=3 momentum=0.5", optim_part),
    ("optim", "optim=muon", "nesterov=false", optim_part),
    ("optim", "optim=adafactor", "beta2_decay=-0.5 least_rms=0.01 clip_threshold=2", optim_part),
    ("schedule", "", "warmup_steps=3 warmup_fraction=0.5 min_ratio=0.5", rate_part),
    ("schedule", "schedule=wsd", "decay_fraction=0.5", rate_part),
    ("train", "", "eval_every=2560 checkpoint_every=2560 keep_every=2560", plan_part),
    ("train", "", "batch_tokens=512 steps=13 tokens=9000 epochs=2", plan_part),
    ("train", "", "tokens_per_param=20 flops=1e9", plan_part),
    ("train", "", "precision=64", device_part),
    ("hardware", "", "accelerator=mps devices=2 num_nodes=2", device_part),
    ("hardware", "", "micro_batch_size=2", plan_part),
    ("logger", "logger=tensorboard", "tensorboard.flush_seconds=3", logger_part),
    (
        "logger",
        "logger=wandb",
        "wandb.project=mine wandb.entity=us wandb.offline=false",
        logger_part,
    ),
    ("logger", "logger=mlflow", "mlflow.experiment=mine", logger_part),
    ("logger", "logger=mlflow", "mlflow.tracking_uri=sqlite:///mine.db", logger_part),
    ("", "", "study=mine run_name=mine output_dir=there cache_dir=there", place_part),
]
CHOSEN = [  # the variant of a group: key, word
    ("data.source", "data=synthetic", lambda config, cache: open_corpus(config.data)),
    ("tokenizer.kind", "tokenizer=char", tokenizer_part),
    ("optim.kind", "optim=adam", optim_part),
    ("schedule.kind", "schedule=linear", rate_part),
]
HORIZONS = tuple(f"train.{name}=" for name in schema.HORIZONS if name != "steps")
Row = tuple[str, list[str], str, Part]


def rows() -> Iterator[Row]:
    """Yield key, words before, the word that changes it, and the part that changes."""
    for section, base, words, part in TABLE:
        for word in words.split():
            word = f"{section}.{word}".lstrip(".")
            yield word.split("=")[0], base.split(), word, part
    for key, word, part in CHOSEN:
        yield key, [], word, part


# Keys that show only in a run, or need files that are not everywhere: tested there.
ELSEWHERE = {
    *("train.grad_clip_norm", "train.skip_nonfinite", "train.log_every", "train.sample_tokens"),
    *("train.early_stopping_patience", "train.sample_prompt", "train.eval_share", "seed", "force"),
    "train.eval_on_start",
    *("hardware.threads", "hardware.compile", "hardware.strategy"),
}
IN_SWEEPS = {"launcher", "sweep", "scale", "plan", "fit"}  # and whole sections
PLACES = {
    *("trainer", "callbacks", "optim.lora", "init_from", "model.rope_scaling"),
    *("tokenizer.path", "tokenizer.vocab_dir", "data.encoding", "data.delimiter", "data.header"),
}
BY_CONTENT = {"data.path", "data.repo", "data.val_file", "data.test_file", "tokenizer.vocab_dir"}


def test_no_key_is_left_out() -> None:
    """Every leaf of every class that the schema knows is in one of these lists."""
    tested = {row[0] for row in rows()} | ELSEWHERE | IN_SWEEPS | PLACES
    known = {
        name
        for name in key_types(cli.RUN)
        if not any(f"{name}.".startswith(f"{one}.") for one in IN_SWEEPS | PLACES)
    }
    assert tested - IN_SWEEPS - PLACES == known


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "other.txt").write_text("\n<|endoftext|>\n".join(stories(200)))
    lines = [json.dumps({"story": s, "title": s[::-1]}) for s in stories(200)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    places = {"OTHER": folder / "other.txt", "TABLE": folder / "table.jsonl", "PATH": corpus}
    return {name: str(path) for name, path in places.items()}


def composed(words: list[str], files: dict[str, str]) -> Config:
    """A small run, unless the words take another corpus or another horizon."""
    small = tiny(Path("PATH"), "logger=csv")
    if any(word.startswith("data=") for word in words):
        small = [word for word in small if not word.startswith("data")]
    if any(word.startswith(HORIZONS) for word in words):
        small.remove("train.steps=12")
    words = [*small, *words]
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    return copy.deepcopy(compose_once(*words))


@functools.cache
def compose_once(*words: str) -> Config:
    return cli.compose_config(words)


@pytest.mark.parametrize(
    ("key", "base", "word", "part"), [pytest.param(*row, id=f"{row[2]}") for row in rows()]
)
def test_a_key_changes_what_it_says(
    key: str, base: list[str], word: str, part: Part, files: dict[str, str], cache: Path
) -> None:
    before, after = composed(base, files), composed([*base, word], files)
    if key not in [row[0] for row in CHOSEN]:
        assert value(before, key) != value(after, key)
    if key != "data.source":
        assert part(composed(base, files), cache) == part(before, cache)
    assert part(before, cache) != part(after, cache)
    # and it is another experiment, unless it only says where and how
    is_science = key.split(".")[0] not in rundir.NOT_SCIENCE and key not in BY_CONTENT
    hashes = {rundir.config_hash(config, {}) for config in (before, after)}
    assert len(hashes) == (2 if is_science else 1)


# Keys of the model that change no function of the weights exported.
SAME_FUNCTION = {"model.attention", "model.gradient_checkpointing", "model.pad_vocab_to_multiple"}
SAME_FUNCTION |= {"model.parametrization", "model.mup_base_width"}  # made part of the weights


def exported(model: schema.ModelConfig) -> Any:
    """What Hugging Face is told, or the line that refuses it."""
    try:
        return to_config(model, 50, 0)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("key", "base", "word"),
    [pytest.param(*row[:3], id=row[2]) for row in rows() if row[0].startswith("model.")],
)
def test_a_key_of_the_model_is_known_everywhere(
    key: str, base: list[str], word: str, files: dict[str, str]
) -> None:
    """Its weights are counted, and Hugging Face is told or it is refused."""
    if "model.position=rope" in base:
        base = [*base, "model.norm=rmsnorm", "model.activation=swiglu"]
    before, after = composed(base, files).model, composed([*base, word], files).model
    assert key in SAME_FUNCTION or exported(before) != exported(after)
    model = GPT(after, 50)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(after, 50).total


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_what_shows_only_in_a_run_is_in_the_hash_if_it_is_science(
    key: str, files: dict[str, str]
) -> None:
    """``train.eval_share`` is science only with early stopping, which test_training tries."""
    values = {
        "train.sample_prompt": "hello",
        "train.eval_on_start": "false",
        "hardware.compile": "on",
        "hardware.strategy": "ddp",
        "force": "true",
    }
    before, after = composed([], files), composed([f"{key}={values.get(key, '7')}"], files)
    assert value(before, key) != value(after, key)
    hashes = {rundir.config_hash(config, {}) for config in (before, after)}
    free = key.split(".")[0] in rundir.NOT_SCIENCE or key == "train.eval_share"
    assert len(hashes) == (1 if free else 2)


def test_vocab_dir_is_where_gpt2_is_read(tmp_path: Path) -> None:
    config = cli.compose_config(["tokenizer=gpt2", f"tokenizer.vocab_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=f"tokenizer.vocab_dir={tmp_path}"):
        train_tokenizer(config.tokenizer, ())
    if GPT2.is_dir():
        config = cli.compose_config(["tokenizer=gpt2", f"tokenizer.vocab_dir={GPT2}"])
        assert train_tokenizer(config.tokenizer, ()).vocab_size == 50257
