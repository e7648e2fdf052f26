"""Run ``python -m tinygpt.export``: write a run as a folder that transformers loads by itself."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from omegaconf import MISSING

from tinygpt import cli, fileio
from tinygpt.config import HUB_NAME, Config, ConfigError, CustomData, HubData, counting
from tinygpt.model import families
from tinygpt.runs import rundir

if TYPE_CHECKING:
    from torch import Tensor

    from tinygpt.runs.load import TrainedRun

USAGE = """\
tinygpt export outputs/runs/x to=FOLDER [key=value ...]

run=FOLDER              the run to export; run= may be left out.  Learned positions,
                        LayerNorm and GELU become GPT-2; RoPE, RMSNorm and SwiGLU
                        become Llama; no other combination has a counterpart
to=FOLDER               what transformers' AutoModelForCausalLM, AutoTokenizer load
checkpoint=final        or best, last, step_<N>; of a run that has not ended: last
force=false             true: replace an export that is there
"""
WEIGHTS = "model.safetensors"
FILES = {
    *("config.json", "generation_config.json", WEIGHTS, "README.md"),
    *("tokenizer.json", "tokenizer_config.json"),
}
# Licences of the corpora in conf/data, where they are known.
LICENCES = {"roneneldan/TinyStories": "CDLA-Sharing-1.0", "HuggingFaceFW/fineweb-edu": "ODC-By 1.0"}


@dataclass
class Arguments:
    run: str = MISSING
    to: str = MISSING
    checkpoint: Optional[str] = None
    force: bool = False


@cli.one_line_errors
def main() -> None:
    arguments = cli.read_arguments(Arguments, sys.argv[1:], USAGE, bare="run")
    families.family(rundir.read_config(rundir.open_run(arguments.run).config).model)
    check_target(arguments.to, arguments.force)
    cli.loading()
    from tinygpt.runs.load import load_run  # imports torch: only once the arguments are right
    from tinygpt.training.console import folded

    run = load_run(arguments.run, arguments.checkpoint)
    export(run, Path(arguments.to))
    cli.loaded()
    title = families.TITLES[families.family(run.config.model)]
    count = counting.count_parameters(run.config.model, run.tokenizer.vocab_size).total
    size = (Path(arguments.to).expanduser() / WEIGHTS).stat().st_size
    print(f"{run.path}, {run.checkpoint} (step {run.step:,}): {title}, {count:,} parameters")
    files = ", ".join(sorted(FILES))
    print(folded(f"{arguments.to}: {files} ({size / 1e6:.1f} MB of weights)", 2))
    if run.tokenizer.convention:
        print(run.tokenizer.convention)
    print("to load it, in Python:")
    print("\n".join(f"  {line}" for line in _loading(run, arguments.to)))


def check_target(to: str, force: bool) -> None:
    """Raise ConfigError if an export must not replace the folder ``to``."""
    folder = Path(to).expanduser()
    if folder.resolve() == Path.cwd():
        raise ConfigError(f"to={to}: the working directory; give a folder in it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"to={to}: a file; give a folder")
    fileio.check_writable("to", folder.parent)  # a new folder takes the old one's place
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if other := sorted(names - FILES):
        raise ConfigError(f"to={to}: has {other[0]}, which no export writes; give another folder")
    if names and not force:
        raise ConfigError(f"to={to}: there is a model already; force=true replaces it")


def export(run: TrainedRun, to: Path) -> None:
    """Write the folder ``to``, or replace it, whole or not at all.

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
    described = tokenizer_config(tokenizer, model.max_seq_len)
    with fileio.replacing_folder(to.expanduser().resolve()) as folder:
        fileio.write_json(folder / "config.json", config)
        fileio.write_json(folder / "generation_config.json", ids)
        text = tokenizer.to_hugging_face().to_str(pretty=True)
        fileio.write_text(folder / "tokenizer.json", text)
        fileio.write_json(folder / "tokenizer_config.json", described)
        with fileio.replacing(folder / WEIGHTS) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        fileio.write_text(folder / "README.md", model_card(run, weights, to.name))


def _loading(run: TrainedRun, name: str) -> list[str]:
    """Return the lines of Python that load the folder ``name`` and generate text."""
    start = "" if run.tokenizer.convention else _end(run)  # transformers' tokenizer may add one
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'tokens = tokenizer("{start}Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
    ]


def _end(run: TrainedRun) -> str:
    """Return the special token that ends a text."""
    return run.tokenizer.decode([run.tokenizer.eot_id])


def model_card(run: TrainedRun, weights: dict[str, Tensor], name: str) -> str:
    """Return the model card: README.md of the export in the folder ``name``."""
    config, data = run.config, run.config.data
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [tinygpt]"]
    if isinstance(data, HubData):
        head.append(f"datasets: [{data.repo}]")
    title, version = families.TITLES[families.family(config.model)], metadata.version("tinygpt")
    origin = f"further from {_name(config.init_from)}," if config.init_from else "from scratch"
    beginning = [
        "In training every text followed the end of another, so a prompt is best begun with",
        f"`{_end(run)}`, as above.",
    ]
    if run.tokenizer.convention:
        beginning = [f"In training {run.tokenizer.convention}, and so do prompts here."]
    lines = [
        *("---", *head, "---", f"# {config.run_name or run.path.name}", ""),
        f"A small {title}, trained {origin} by tinygpt {version}.",
        *("", "```python", *_loading(run, name), "```", "", *beginning),
        f"The context is {config.model.max_seq_len:,} tokens.",
        "",
        f"In a text for transformers' tokenizer `{_end(run)}` and other special tokens become",
        "their special ids. tinygpt's reads them as ordinary characters, as does",
        "`tokenizer(text, split_special_tokens=True)`.",
        *("", "| | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in _rows(run, weights).items()),
    ]
    return "\n".join([*lines, ""])


def _name(init_from: str) -> str:
    """Return a model's name on the hub, or the end of a path, which names no user's folders."""
    if init_from.endswith(".ckpt"):
        run = Path(init_from).absolute().parent.parent
        return f"{run.name} ({Path(init_from).stem})"
    is_path = Path(init_from).expanduser().exists() or not re.fullmatch(HUB_NAME, init_from)
    return Path(init_from).name if is_path else init_from


def _rows(run: TrainedRun, weights: dict[str, Tensor]) -> dict[str, str]:
    """Return the rows of the table on the card."""
    config, model, results = run.config, run.config.model, run.results
    vocab_size, lora_rank = run.tokenizer.vocab_size, config.optim.lora.rank
    heads = f"{model.n_heads} heads"
    if model.n_kv_heads not in (None, model.n_heads):
        heads += f" ({model.n_kv_heads} of keys and values)"
    flops = counting.flops_per_token(model, vocab_size, lora_rank=lora_rank) * run.tokens
    at_end = results if results and results["total_steps"] == run.step else None
    mup = "trained under µP; its factors are in the weights now"
    mup = mup if model.parametrization == "mup" else ""
    status = results["status"] if results else "not ended"
    environment = fileio.read_json(run.path / "environment.json")
    metrics = rundir.MetricsFile(run.path / "metrics.csv").read()
    here = [row for row in metrics if row["step"] == str(run.step) and row["val_loss"]]
    measured = here[-1] if here else {}
    rows = {
        "shape": f"{model.n_layers} layers, width {model.d_model:,}, {heads}, feed-forward "
        f"{counting.resolved_d_ff(model):,}, {'tied' if model.tie_weights else 'untied'} head",
        "parameters": _parameters(run, weights),
        "parametrization": mup,
        "tokenizer": f"{run.tokenizer.kind}, {vocab_size:,} tokens",
        "checkpoint": f"{run.checkpoint}, after {run.step:,} steps; the run: {status}",
        "budget": f"{run.tokens:,} training tokens, {flops:.3g} FLOPs",
        "distinct tokens": f"{at_end['unique_train_tokens']:,}" if at_end else "",
        "data": _data(config)[0],
        "licence of the data": _data(config)[1],
        "optimizer": f"{config.optim.kind}, learning rate {config.optim.learning_rate:g}",
        "seed": str(config.seed),
        "configuration's hash": str(environment.get("config_hash")),
        "validation loss": _loss(measured.get("val_loss"), measured.get("val_bits_per_byte")),
        "test loss": _loss(at_end["test_loss"], at_end["test_bits_per_byte"]) if at_end else "",
    }
    return {name: value for name, value in rows.items() if value}


def _parameters(run: TrainedRun, weights: dict[str, Tensor]) -> str:
    """Return the number of parameters, and why transformers counts another."""
    model, vocab_size = run.config.model, run.tokenizer.vocab_size
    sizes = counting.count_parameters(model, vocab_size)
    text = f"{sizes.total:,}, of them {sizes.non_embedding:,} outside the embeddings"
    theirs = sum(weight.numel() for weight in weights.values())
    if theirs == sizes.total:
        return text
    why = []
    if not model.bias and families.family(model) == "gpt2":
        why.append("with biases that are all zero")
    padding = counting.padded_vocab(vocab_size, model.pad_vocab_to_multiple) - vocab_size
    if padding:
        why.append(
            f"without {padding} rows that pad the vocabulary, which makes its loss a little lower"
        )
    return f"{text}; transformers counts {theirs:,}, {' and '.join(why)}"


def _loss(loss: float | str | None, bits_per_byte: float | str | None) -> str:
    if loss is None or bits_per_byte is None:
        return "not measured"
    return f"{float(loss):.4f} nats per token, {float(bits_per_byte):.4f} bits per byte"


def _data(config: Config) -> tuple[str, str]:
    """Return the training data, a path by its last part alone, and its licence."""
    data = config.data
    part = "" if data.fraction == 1 else f", {data.fraction:.3g} of it"
    if isinstance(data, HubData):
        place = f"[{data.repo}](https://huggingface.co/datasets/{data.repo})"
        return place + part, LICENCES.get(data.repo, "unknown")
    if isinstance(data, CustomData):
        return f"{data.name}: {Path(data.path).name}{part}", "unknown"
    return f"tinygpt's embedded corpus{part}", "MIT, as tinygpt"


if __name__ == "__main__":
    main()
