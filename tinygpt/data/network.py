"""Fetch models and vocabularies, and fail within two seconds if there is no network."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tiktoken.load import read_file_cached

from tinygpt import fileio
from tinygpt.config import HUB_NAME, ConfigError, first_line

WAIT = 1.5  # seconds for an answer
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def reachable(url: str) -> bool:
    """Return whether anything answers at ``url``, through the environment's proxy if it has one."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=WAIT).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # a refusal is an answer
        except (OSError, ValueError):
            return

    # in a thread, because looking up a host name has no time limit of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT)
    return answered.is_set()


def require_hub(repo: str) -> None:
    """Raise ConfigError within two seconds if the Hugging Face hub cannot be reached."""
    if reason := _no_hub():
        raise ConfigError(
            f"data.repo={repo}: {reason}; start where the data lies in a folder of that name, or "
            "use data=custom data.path=... or data=synthetic"
        )


def _no_hub() -> str:
    """Return why the hub cannot be reached, an empty string if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "no network (HF_HUB_OFFLINE is set)"
    there = reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    return "" if there else "no network"


@functools.cache
def model_folder(key: str, name: str) -> Path:
    """Return the folder ``name``, or the folder of the hub's model of that name.

    Without a network it must have been fetched before.  Raises ConfigError, naming ``key``.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(HUB_NAME, name):
        raise ConfigError(f"{key}={name}: {'not a folder' if path.exists() else 'no such folder'}")
    reason = _no_hub()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "merges.txt"],
            ignore_patterns=["*/*"],
            local_files_only=bool(reason),
        )
    except LocalEntryNotFoundError as error:
        why = reason or "the hub does not send it"
        raise ConfigError(
            f"{key}={name}: no such folder, and no model of that name was fetched before ({why})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        why = first_line(error)
        raise ConfigError(f"{key}={name}: no such folder, and not on the hub ({why})") from error
    return Path(found)


def gpt2_files() -> dict[str, bytes]:
    """Return GPT-2's encoder.json and vocab.bpe from tiktoken's cache or by download.

    Raises ConfigError, within two seconds if there is no network.
    """
    remedy = "give tokenizer.vocab_dir=FOLDER, a folder with GPT-2's encoder.json and vocab.bpe"
    # checked here because tiktoken deletes a damaged file and then waits for the network
    missing = [name for name in GPT2_SHA256 if not _is_cached(name)]
    if missing and not reachable(GPT2_URL + missing[0]):
        raise ConfigError(
            "tokenizer.kind=gpt2: its vocabulary is not in tiktoken's cache and "
            f"{GPT2_URL.split('/')[2]} cannot be reached; {remedy}"
        )
    try:
        return {name: read_file_cached(GPT2_URL + name, sha) for name, sha in GPT2_SHA256.items()}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.kind=gpt2: tiktoken could not get its vocabulary "
            f"({type(error).__name__}); {remedy}"
        ) from error


def _is_cached(name: str) -> bool:
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    path = Path(folder, hashlib.sha1((GPT2_URL + name).encode()).hexdigest())
    try:
        return folder != "" and fileio.sha256(path) == GPT2_SHA256[name]
    except OSError:
        return False
