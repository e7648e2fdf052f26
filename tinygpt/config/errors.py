"""Errors that end a command in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user asked for something impossible: one line with the key, the value and what is
    allowed.  Commands print it and exit with code 2."""


class RunError(RuntimeError):
    """A run failed after it had begun; one line.  Commands exit with code 1."""


def require(holds: bool, line: str) -> None:
    """Raise ConfigError with ``line`` unless the condition holds."""
    if not holds:
        raise ConfigError(line)


def install(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml; tinygpt is on no index."""
    return f"`pip install -e '.[{extra}]'` in the folder of tinygpt"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory, on the GPU or the host."""
    texts = ("out of memory", "you tried to allocate")  # torch has no class for the host's
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def one_line(error: BaseException) -> str:
    """Return the whole message with its line breaks as spaces."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the error's class where it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
