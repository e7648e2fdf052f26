"""``python -m tests.fuzz``: damaged input for a reader, as long as one likes.

python -m tests.fuzz [HARNESS|all] [SECONDS]

With `atheris` (pip install -e '.[fuzz]') what covers new lines of the reader is kept, in
outputs/fuzz/<harness>/corpus, and changed further, in the next round too; without it valid inputs
are changed at random.  Each finding is told once, by its place; the input lies in
outputs/fuzz/<harness>/ and belongs into tests/fuzz/seeds/<harness>/ once mended.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from random import Random
from typing import Any, NoReturn

from tests.fuzz import mutations, rounds

try:
    import atheris
except ImportError:
    atheris = None

LONGEST = 20  # seconds for one input
MEMORY = 12 << 30


class Round:
    """Executions of one harness, counted, and what they found."""

    def __init__(self, harness: Any, seconds: float) -> None:
        self.harness, self.seconds = harness, seconds
        self.executions = self.refused = 0
        self.slowest = 0.0
        self.places: set[str] = set()
        self.folder = rounds.OUTPUT / harness.name
        self.corpus = self.folder / "corpus"
        self.corpus.mkdir(parents=True, exist_ok=True)
        self.before = set(os.listdir(self.corpus))
        self.began = self.noisy = time.monotonic()

    def __call__(self, data: bytes) -> None:
        from tests.fuzz.harness import Finding

        self.executions += 1
        start = time.monotonic()
        signal.alarm(LONGEST)
        try:
            self.refused += self.harness.refuses(data)
        except Finding as finding:
            self.note(str(finding), data)
        finally:
            signal.alarm(0)
        now = time.monotonic()
        if now - start > max(self.slowest, 1.0):
            (self.folder / "slowest").write_bytes(data)
        self.slowest = max(self.slowest, now - start)
        if now - self.began > self.seconds:
            self.end()

    def note(self, finding: str, data: bytes) -> None:
        place = finding.partition(": ")[2].partition(": ")[0]
        if place not in self.places:
            self.places.add(place)
            self.noisy = time.monotonic()
            path = self.folder / hashlib.sha256(data).hexdigest()[:12]
            path.write_bytes(data)
            print(f"finding: {finding}\n  input: {path}", flush=True)

    def end(self) -> NoReturn:
        from tests.fuzz.harness import remove_scratch

        now = time.monotonic()
        seconds, name = now - self.began, self.harness.name
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        kept = len(set(os.listdir(self.corpus)) - self.before)
        print(
            f"{name}: {self.executions:,} executions in {seconds:.0f} s, "
            f"{self.refused / self.executions:.0%} refused, the slowest {self.slowest:.2f} s, "
            f"{megabytes:,} MB, {kept} inputs kept, {len(self.places)} findings"
        )
        rounds.record(
            rounds.Round(
                harness=name,
                when=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(seconds),
                executions=self.executions,
                kept=kept,
                findings=len(self.places),
                quiet=round(now - self.noisy),
                slowest=round(self.slowest, 2),
                megabytes=megabytes,
            )
        )
        print(f"  in all {rounds.total(name)}", flush=True)
        remove_scratch()
        os._exit(bool(self.places))  # libFuzzer has no way out


def hung(*_: object) -> NoReturn:
    raise TimeoutError(f"not done after {LONGEST} s")


def fuzz(name: str, seconds: float) -> NoReturn:
    warnings.simplefilter("ignore")
    os.environ["RUST_BACKTRACE"] = "0"
    signal.signal(signal.SIGALRM, hung)
    with atheris.instrument_imports(include=["tinygpt"]) if atheris else contextlib.nullcontext():
        harness = {one.name: one for one in harnesses()}[name]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    one = Round(harness, seconds)
    seeds = harness.seeds()
    if atheris is None:
        random = Random(os.urandom(8))
        for seed in seeds:
            one(seed)
        while True:
            one(mutations.mutated(random.choice(seeds), random, harness.kind)[: harness.largest])

    def change(data: bytes, size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.1:
            return bytes(atheris.Mutate(data, size))
        if random.random() < 0.1:
            data = random.choice(seeds)
        return mutations.mutated(data, random, harness.kind)[:size]

    options = [f"-artifact_prefix={one.folder}/", f"-max_len={harness.largest}", "-rss_limit_mb=0"]
    options += ["-timeout=60", "-print_final_stats=0", "-verbosity=0", "-len_control=0"]
    folders = [str(one.corpus), str(harness.seed_folder())]  # new ones go into the first
    atheris.Setup(["fuzz", *options, *folders], one, custom_mutator=change)
    atheris.Fuzz()
    raise AssertionError("it never returns")


def harnesses() -> list[Any]:
    families = ("corpora", "tokenizers", "folders", "tables", "words", "models")
    return [
        harness
        for family in families
        for harness in importlib.import_module(f"tests.fuzz.{family}").HARNESSES
    ]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "all"
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    names = [one.name for one in harnesses()] if name == "all" else [name]
    if name != "all":
        fuzz(name, seconds)
    command = [sys.executable, "-m", "tests.fuzz"]
    codes = [subprocess.run([*command, one, str(seconds)]).returncode for one in names]
    raise SystemExit(any(codes))


if __name__ == "__main__":
    main()
