"""``python -m tinygpt.export``: a run as a Hugging Face folder, loaded with no code of ours."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from tinygpt import cli, counting, fileio, rundir
from tinygpt.config import HUB_NAME, Config, ConfigError, CustomData, HubData, SyntheticData
from tinygpt.model import families

if TYPE_CHECKING:
    from torch import Tensor

    from tinygpt.trained import TrainedRun

USAGE = """\
python -m tinygpt.export run=outputs/runs/x to=FOLDER [key=value ...]

run=FOLDER              the run to export: learned positions, LayerNorm and GELU become GPT-2,
                        RoPE, RMSNorm and SwiGLU become Llama; no other mixture has a counterpart
to=FOLDER               what transformers' AutoModelForCausalLM and AutoTokenizer load
checkpoint=final        or best, last, step_<N>; default: final, of a run that has not ended last
force=false             true: replace an export that is there
"""
WEIGHTS = "model.safetensors"
FILES = {
    *("config.json", "generation_config.json", WEIGHTS, "README.md"),
    *("tokenizer.json", "tokenizer_config.json"),
}
# Of the corpora that conf/data names, where it is known.
LICENCES = {"roneneldan/TinyStories": "CDLA-Sharing-1.0", "HuggingFaceFW/fineweb-edu": "ODC-By 1.0"}


@dataclass
class Arguments:
    run: str = MISSING
    to: str = MISSING
    checkpoint: Optional[str] = None
    force: bool = False


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE)
    families.family(rundir.read_config(rundir.open_run(arguments.run).config).model)
    check_target(arguments.to, arguments.force)
    from tinygpt.trained import load_run  # torch: once the words are right

    run = load_run(arguments.run, arguments.checkpoint)
    export(run, Path(arguments.to))
    _show(run, arguments.to)


def check_target(to: str, force: bool) -> None:
    """Raises ConfigError for a folder that an export must not replace."""
    folder = Path(to).expanduser()
    if folder.resolve() == Path.cwd():
        raise ConfigError(f"to={to}: the working directory; give a folder in it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"to={to}: a file; give a folder")
    fileio.check_writable("to", folder.parent)  # a new folder takes the old one's place
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strange = sorted(names - FILES)
    if strange:
        raise ConfigError(f"to={to}: has {strange[0]}, which no export writes; give another folder")
    if names and not force:
        raise ConfigError(f"to={to}: there is a model already; force=true replaces it")


def export(run: TrainedRun, to: Path) -> None:
    """Writes the folder ``to``, whole or not at all, in place of one that is there.

    Raises ConfigError for a model that is neither a GPT-2 nor a Llama.
    """
    from safetensors.torch import save_file

    from tinygpt.data.huggingface import tokenizer_config
    from tinygpt.model.huggingface import to_hugging_face

    model, tokenizer = run.config.model, run.tokenizer
    config = families.to_config(model, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.start_id)
    weights = to_hugging_face(run.model)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = tokenizer.eot_id
    with fileio.replacing_folder(to.expanduser().resolve()) as folder:
        fileio.write_json(folder / "config.json", config)
        fileio.write_json(folder / "generation_config.json", ids)
        library = tokenizer.to_hugging_face()
        fileio.write_text(folder / "tokenizer.json", library.to_str(pretty=True))
        described = tokenizer_config(tokenizer, model.max_seq_len)
        fileio.write_json(folder / "tokenizer_config.json", described)
        with fileio.replacing(folder / WEIGHTS) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        fileio.write_text(folder / "README.md", model_card(run, weights, to.name))


def _show(run: TrainedRun, to: str) -> None:
    title = families.TITLES[families.family(run.config.model)]
    sizes = counting.count_parameters(run.config.model, run.tokenizer.vocab_size)
    size = (Path(to).expanduser() / WEIGHTS).stat().st_size
    print(f"{run.path}, {run.checkpoint} (step {run.step:,}): {title}, {sizes.total:,} parameters")
    print(f"{to}: {', '.join(sorted(FILES))} ({size / 1e6:.1f} MB of weights)")
    if run.tokenizer.convention:
        print(run.tokenizer.convention)
    print("to load it, in Python:")
    print("\n".join(f"  {line}" for line in _loading(run, to)))


def _loading(run: TrainedRun, name: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'tokens = tokenizer("{_start(run)}Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
    ]


def _end(run: TrainedRun) -> str:
    """The special token between texts."""
    return run.tokenizer.decode([run.tokenizer.eot_id])


def _start(run: TrainedRun) -> str:
    """What a prompt for transformers begins with; nothing where its tokenizer puts that there."""
    return "" if run.tokenizer.convention else _end(run)


# --- the model card


def model_card(run: TrainedRun, weights: dict[str, Tensor], name: str) -> str:
    """README.md of the export, as the hub shows it.  ``name``: of the folder."""
    config, data = run.config, run.config.data
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [tinygpt]"]
    if isinstance(data, HubData):
        head.append(f"datasets: [{data.repo}]")
    rows = [*_model_rows(run, weights), *_training_rows(run), *_loss_rows(run)]
    title, version = families.TITLES[families.family(config.model)], metadata.version("tinygpt")
    begun = (
        "from scratch" if config.init_from is None else f"further from {_name(config.init_from)},"
    )
    return "\n".join(
        [
            *("---", *head, "---", f"# {config.run_name or run.path.name}", ""),
            f"A small {title}, trained {begun} by tinygpt {version}.",
            *("", "```python", *_loading(run, name), "```", ""),
            *_beginning(run),
            f"The context is {config.model.max_seq_len:,} tokens.",
            "",
            f"In a text for transformers' tokenizer `{_end(run)}` and other special tokens become",
            "their special ids. tinygpt's reads them as ordinary characters, as does",
            "`tokenizer(text, split_special_tokens=True)`.",
            *("", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""),
        ]
    )


def _beginning(run: TrainedRun) -> list[str]:
    if run.tokenizer.convention:
        return [f"In training {run.tokenizer.convention}, and so do prompts here."]
    return [
        "In training every text stood behind the end of another, so a prompt begins best with",
        f"`{_end(run)}`, as above.",
    ]


def _name(init_from: str) -> str:
    """As it is on the hub; of a path on somebody's machine, which may be gone, its end."""
    if init_from.endswith(".ckpt"):
        run = Path(init_from).absolute().parent.parent
        return f"{run.name} ({Path(init_from).stem})"
    is_path = Path(init_from).expanduser().exists() or not re.fullmatch(HUB_NAME, init_from)
    return Path(init_from).name if is_path else init_from


Row = tuple[str, str]


def _model_rows(run: TrainedRun, weights: dict[str, Tensor]) -> Iterator[Row]:
    model, vocab_size = run.config.model, run.tokenizer.vocab_size
    heads = f"{model.n_heads} heads"
    if model.n_kv_heads not in (None, model.n_heads):
        heads += f" ({model.n_kv_heads} of keys and values)"
    yield (
        "shape",
        f"{model.n_layers} layers, width {model.d_model:,}, {heads}, feed-forward "
        f"{counting.resolved_d_ff(model):,}, {'tied' if model.tie_weights else 'untied'} head",
    )
    sizes = counting.count_parameters(model, vocab_size)
    text = f"{sizes.total:,}, of them {sizes.non_embedding:,} outside the embeddings"
    theirs = sum(weight.numel() for weight in weights.values())
    if theirs != sizes.total:
        padding = counting.padded_vocab(vocab_size, model.pad_vocab_to_multiple) - vocab_size
        why = []
        if not model.bias and families.family(model) == "gpt2":
            why.append("with biases that are all zero")
        if padding:
            rows = f"{padding} rows that pad the vocabulary"
            why.append(f"without {rows}, which makes its loss a little lower")
        text += f"; transformers counts {theirs:,}, {' and '.join(why)}"
    yield "parameters", text
    if model.parametrization == "mup":
        yield "parametrization", "trained under µP; its factors are in the weights now"
    yield "tokenizer", f"{run.tokenizer.kind}, {vocab_size:,} tokens"


def _training_rows(run: TrainedRun) -> Iterator[Row]:
    config = run.config
    status = run.results["status"] if run.results else "not ended"
    yield "checkpoint", f"{run.checkpoint}, after {run.step:,} steps; the run: {status}"
    flops = (
        counting.flops_per_token(
            config.model, run.tokenizer.vocab_size, lora_rank=config.optim.lora.rank
        )
        * run.tokens
    )
    yield "budget", f"{run.tokens:,} training tokens, {flops:.3g} FLOPs"
    if run.results and run.results["total_steps"] == run.step:
        yield "distinct tokens", f"{run.results['unique_train_tokens']:,}"
    yield "data", _data(config)
    yield "licence of the data", _licence(config)
    said = fileio.read_json(run.path / "environment.json")
    yield "optimizer", f"{config.optim.kind}, learning rate {config.optim.learning_rate:g}"
    yield "seed", str(config.seed)
    yield "configuration's hash", str(said.get("config_hash"))


def _loss_rows(run: TrainedRun) -> Iterator[Row]:
    """Those measured at this very step."""
    found: dict[str, Any] = {}
    for row in rundir.MetricsFile(run.path / "metrics.csv").read():
        if row["step"] == str(run.step) and row["val_loss"]:
            found = {name: float(row[f"val_{name}"]) for name in ("loss", "bits_per_byte")}
    yield "validation loss", _loss(found)
    if run.results and run.results["total_steps"] == run.step:
        names = ("loss", "bits_per_byte")
        yield "test loss", _loss({name: run.results[f"test_{name}"] for name in names})


def _loss(found: dict[str, Any]) -> str:
    if found.get("loss") is None:
        return "not measured"
    return f"{found['loss']:.4f} nats per token, {found['bits_per_byte']:.4f} bits per byte"


def _data(config: Config) -> str:
    data = config.data
    part = "" if data.fraction == 1 else f", {data.fraction:.3g} of it"
    if isinstance(data, HubData):
        return f"[{data.repo}](https://huggingface.co/datasets/{data.repo}){part}"
    if isinstance(data, CustomData):  # of a path on somebody's machine, its end
        return f"{data.name}: {Path(data.path).name}{part}"
    return f"tinygpt's embedded corpus{part}"


def _licence(config: Config) -> str:
    if isinstance(config.data, SyntheticData):
        return "MIT, as tinygpt"
    known = LICENCES.get(config.data.repo) if isinstance(config.data, HubData) else None
    return known or "unknown"


if __name__ == "__main__":
    main()
