"""Define the errors that end a command with one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """Report a user's mistake in one line: key, value and what is allowed; exit code 2."""


class RunError(RuntimeError):
    """Report in one line why a run failed after it had started; exit code 1."""


def require(holds: bool, line: str) -> None:
    """Raise ConfigError with ``line`` unless the condition holds."""
    if not holds:
        raise ConfigError(line)


def install(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml."""
    return f"`pip install -e '.[{extra}]'` in the folder of tinygpt"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory, on the GPU or the host."""
    texts = ("out of memory", "you tried to allocate")  # torch has no class for the host's
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
