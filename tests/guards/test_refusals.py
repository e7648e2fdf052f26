"""What a user gets wrong is one line with exit code 2, before torch is loaded or a file made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guards.commands import OLD

# A wrong command, and what its line must name.
WRONG: dict[str, tuple[str, str]] = {
    "a misspelt key": ("run model.d_modle=64", "model.d_model"),
    "a misspelt group": ("run modle=tiny", "model"),
    "no such choice": ("run data=foo", "custom"),
    "not a number": ("run seed=many", "seed"),
    "out of its bounds": ("run model.dropout=1.5", "model.dropout"),
    "not one of the values": ("run model.activation=relu3", "gelu"),
    "heads that do not divide": ("run model.n_heads=3", "model.d_model"),
    "two horizons": ("run train.tokens=5 train.steps=5", "train.steps"),
    "no path of the text": ("run data=custom", "data.path"),
    "a launcher without a sweep": ("run launcher=local", "--multirun"),
    "a bad value in a sweep": ("run --multirun model.d_model=16,32,abc", "model.d_model"),
    "code in a configuration": ("run hydra.sweeper._target_=os.system", "_target_"),
    "nothing to fit": ("fit", "runs"),
    "no such runs": ("fit runs=none", "none"),
    "no such table": ("fit table=none.csv", "none.csv"),
    "no such law": ("fit runs=study law=chinchila", "chinchilla"),
    "runs that have not ended": ("fit runs=runs/interrupted", "loss"),
    "no such run": ("sample run=none", "none"),
    "a bad option of sampling": ("sample run=runs/finished temperature=-1", "temperature"),
    "no prompts": ("sample run=runs/finished prompts=none.txt", "none.txt"),
    "no runs to score": ("evaluate runs=none", "none"),
    "a misspelt key of evaluate": ("evaluate run=runs/finished", "runs"),
    "no run to export": ("export run=none to=somewhere", "none"),
    "no place to export to": ("export run=runs/finished", "to"),
    "no base to adapt": ("adapt run=none", "none"),
}
# Runs each command of its argument in one process, and tells what each did.
PROGRAM = """
import contextlib, importlib, io, json, sys
from pathlib import Path

found = []
for name, *words in json.loads(sys.argv[1]):
    module = importlib.import_module(f"tinygpt.{name}")
    sys.argv = [name, *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main()
        except SystemExit as left:
            code = left.code
    found.append(
        {
            "code": code,
            "out": out.getvalue(),
            "err": err.getvalue(),
            "torch": "torch" in sys.modules,
            "files": sorted(str(path) for path in Path().rglob("*")),
        }
    )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run all wrong commands one after the other in one fresh process: a second each otherwise."""
    folder = tmp_path_factory.mktemp("refused")
    for name in ("runs", "study"):
        shutil.copytree(OLD / name, folder / name)
    before = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    lines = [words.split() for words, _ in WRONG.values()]
    program = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for one in found:
        one["new"] = sorted(set(one["files"]) - set(before))
    return dict(zip(WRONG, found, strict=True))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line(mistake: str, refused: dict[str, dict[str, Any]]) -> None:
    """The line names what is wrong; nothing is loaded or written."""
    one = refused[mistake]
    assert one["code"] == 2, one["err"]
    assert one["err"].startswith("error: ")
    assert one["err"].count("\n") == 1
    assert WRONG[mistake][1] in one["err"]
    assert all(line.endswith("…") for line in one["out"].splitlines())  # what it was doing
    assert one["new"] == []
    assert not one["torch"]


def test_a_real_process_says_it_alike(tmp_path: Path) -> None:
    """Started by a shell, a wrong command ends the same way, and torch is never imported."""
    program = [sys.executable, "-X", "importtime", "-m", "tinygpt.run", "model.d_modle=64"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in lines if "|" in line}
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(said) == 1
    assert said[0].startswith("error: model.d_modle: ")
    assert "tinygpt" in loaded
    assert not loaded & {"torch", "lightning"}
    assert list(tmp_path.iterdir()) == []
