"""Read the tokenizers of Hugging Face folders: our exports, GPT-2's and other models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import processors

from tinygpt import fileio
from tinygpt.config import ConfigError, one_line
from tinygpt.data import tokenizers as own
from tinygpt.data.library import Foreign, Tokenizer, library_errors, library_tokenizer
from tinygpt.data.network import model_folder

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def open_tokenizer(key: str, place: str) -> Tokenizer:
    """Return the tokenizer of a file, a run folder, a Hugging Face folder or a model on the hub.

    Raises ConfigError, naming ``key``, if there is none.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return own.load_tokenizer(path)
    folder = model_folder(key, place)
    if not (folder / "config.json").exists():
        return own.load_tokenizer(folder / "tokenizer.json")
    return read_tokenizer(folder)


def tokenizer_config(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, for transformers 4 and 5.

    ``bos_token`` is what a document follows in training: <|endoftext|>, or the token that
    tokenizer.json puts there.  <|bos|> never occurs in training.
    """
    start, end, unknown = None, own.EOT, own.UNKNOWN if tokenizer.unknown_id is not None else None
    if isinstance(tokenizer, Foreign):
        start, end = tokenizer.start, tokenizer.eot
        unknown = tokenizer.tokenizer_json["model"].get("unk_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # version 4 refuses what 5 would write
        "model_max_length": max_seq_len,
        # otherwise version 4 adds token types, which its GPT-2 embeds
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": start or end,
        "eos_token": end,
        "pad_token": end,
        **({"unk_token": unknown} if unknown else {}),
    }


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder.  Raises ConfigError, naming what is missing."""
    ours = tokenizer_from_hugging_face(folder)
    settings, special = (_settings(folder, name) for name in SETTINGS)
    eot, bos = (
        _token(settings.get(key)) or _token(special.get(key)) for key in ("eos_token", "bos_token")
    )
    path, adds_bos = folder / "tokenizer.json", settings.get("add_bos_token") is True
    if ours is not None and (not adds_bos or bos in (None, ours.decode([ours.eot_id]))):
        return ours
    content = fileio.read_json(path)
    try:
        library = library_tokenizer(json.dumps(content))
        eot = eot or _eot_by_number(folder, library)
        if eot is None:
            raise ConfigError(
                f"{folder}: no eos_token, which ends a document, in {', '.join(SETTINGS)}, "
                "generation_config.json or config.json"
            )
        start, ends = _added(library, eot)
        if start is None and adds_bos and bos not in (None, eot):
            template = [str(bos), "$A", *([eot] if ends else [])]
            library.post_processor = processors.TemplateProcessing(
                single=" ".join(template),
                special_tokens=[(t, library.token_to_id(t)) for t in template if t != "$A"],
            )
            content = json.loads(library.to_str())
            start, ends = _added(library, eot)
        return Foreign(content, eot, start or _token(settings.get("bos_token")) or eot, start, ends)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a usable tokenizer ({one_line(error)})") from error


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return fileio.read_json(folder / name) if (folder / name).exists() else {}


def _token(value: Any) -> str | None:
    """Return a special token, given as a string or as a table with its ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def _eot_by_number(folder: Path, library: Library) -> str | None:
    """Return the token of ``eos_token_id`` in the model's settings, the first of several."""
    for name in ("generation_config.json", "config.json"):
        number = _settings(folder, name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return library.id_to_token(number)
    return None


def _added(library: Library, eot: str) -> tuple[str | None, bool]:
    """Return the token that tokenizer.json puts before a text, and whether it appends ``eot``.

    The first is None for ``eot``, which precedes every document anyway.  Raises ValueError if it
    adds anything else.
    """
    with library_errors():
        words = sorted(library.get_vocab(with_added_tokens=False))
        some = next((w for w in words if library.encode(w, add_special_tokens=False).ids), "")
        found = library.encode(some)
    text = [n for n, mask in enumerate(found.special_tokens_mask) if not mask] or [0]
    before, behind = found.tokens[: text[0]], found.tokens[text[-1] + 1 :]
    if not before or before == [eot]:
        return None, behind == [eot]
    if len(before) > 1 or behind not in ([], [eot]):
        raise ValueError(
            f"puts {' '.join(before)} before a text, {' '.join(behind) or 'nothing'} behind"
        )
    return before[0], bool(behind)


def tokenizer_from_hugging_face(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder as one of ours, if we exported it or it is GPT-2's.

    Returns None for any other.  Raises ConfigError if it is missing or unreadable.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        try:  # GPT-2's older format
            return own.read_gpt2(*((folder / n).read_bytes() for n in ("vocab.json", "merges.txt")))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: has no tokenizer.json, and its vocab.json and merges.txt are not "
                f"GPT-2's ({one_line(error)})"
            ) from error
    try:
        given = library_tokenizer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = one_line(error) if path.exists() else "there is none"
        raise ConfigError(f"{path}: not a tokenizer of Hugging Face's ({reason})") from error
    try:
        made = _ours_like(json.loads(given.to_str()))
    except ValueError:
        return None
    if made is None or _essence(made.to_hugging_face()) != _essence(given):
        return None
    return None if isinstance(made, own.Bpe) and not own.spells_itself(made) else made


def _ours_like(content: dict[str, Any]) -> Tokenizer | None:
    """Return our tokenizer with these special tokens, or None.  Raises ValueError for merges or
    an alphabet that it cannot have."""
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    model = content["model"]
    merges = [own.read_merge(merge) for merge in model.get("merges", ())]
    if special == {own.UNKNOWN: 0, own.BOS: 1, own.EOT: 2}:
        return own.Char("".join(sorted(model["vocab"].keys() - special)))
    if special == {own.BOS: own.Bytes.bos_id, own.EOT: own.Bytes.eot_id} and not merges:
        return own.Bytes()
    if special == {own.BOS: 0, own.EOT: 1}:
        return own.Bpe(merges)
    if special == {own.EOT: len(own.BYTE_OF) + len(merges)}:
        return own.Gpt2(merges)
    return None


def _essence(tokenizer: Library) -> dict[str, Any]:
    """Return the settings that determine ids and text.

    Offsets, padding, truncation and the way special tokens are found in a text do not.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model, first, last = (content[key] or {} for key in ("model", "pre_tokenizer", "decoder"))
    if first.get("type") == "ByteLevel":
        first.pop("trim_offsets")
        last = last.get("type")
        model.pop("unk_token", None)  # no byte is unknown
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[key] = model.get(key) or None
    return {
        "normalizer": content["normalizer"],
        "pre_tokenizer": first,
        "model": model,
        "adds": tokenizer.num_special_tokens_to_add(is_pair=False),
        "decoder": last,
    }
