"""Run ``tinygpt COMMAND ...`` as ``python -m tinygpt.COMMAND ...``."""

from __future__ import annotations

import difflib
import runpy
import sys

COMMANDS = {
    "run": "train a model, or a sweep of models",
    "law": "find the scaling law of a text within minutes of your choice",
    "fit": "fit a law to finished runs, or to a table",
    "evaluate": "score runs and set them side by side",
    "sample": "write text with a trained run",
    "export": "turn a run into a Hugging Face model",
    "adapt": "study how a trained run adapts to new text",
    "tokenizer": "train a tokenizer, encode and decode",
    "benchmark": "measure how fast this machine trains",
}
USAGE = """\
usage: tinygpt COMMAND [key=value ...]

{}

tinygpt COMMAND --help         what a command takes
tinygpt --completion bash      print what makes Tab complete words; or zsh, fish
tinygpt --version

To begin: tinygpt law book.txt minutes=15"""


def main() -> None:
    name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in COMMANDS:
        sys.argv[1:] = words
        # as __main__, because workers and further processes of a run look the module up there
        runpy.run_module(f"tinygpt.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:<11} {does}" for name, does in COMMANDS.items())))
    elif name == "--version":
        from importlib import metadata

        print(f"tinygpt {metadata.version('tinygpt')}")
    elif name in ("--completion", "--complete"):
        from tinygpt import completion

        completion.main(name, words, COMMANDS)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: {name}: no such command; {hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
