"""Tables of runs as people have them: files, numbers, columns, units, and the notes on them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.conftest import Command
from tinygpt import fit, scaling
from tinygpt.config import ConfigError
from tinygpt.scaling.analysis import analyse
from tinygpt.scaling.columns import Columns, choice, varied
from tinygpt.scaling.elsewhere import Table

E, A, B, ALPHA, BETA = 1.7, 367.0, 410.0, 0.34, 0.28
NAMED = {"n": "params", "d": "tokens", "loss": "loss"}


def grid(seeds: int = 1, noise: float = 0.0) -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in (1e6, 4e6, 16e6, 64e6, 256e6):
        for times in (5, 20, 80):
            for seed in range(seeds):
                loss = E + A / n**ALPHA + B / (n * times) ** BETA
                loss *= np.exp(noise * random.normal())
                rows.append({"params": int(n), "tokens": int(n * times), "loss": round(loss, 6)})
                rows[-1] |= {"seed": seed} if seeds > 1 else {}
    return pd.DataFrame(rows)


def written(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def read(path: Path | pd.DataFrame, folder: Path | None = None, **words: Any) -> Table:
    """As the command reads it; ``words`` with an underscore for the point, as columns_n."""
    if isinstance(path, pd.DataFrame):
        assert folder is not None
        path.to_csv(folder / "t.csv", index=False)
        path = folder / "t.csv"
    columns = {k.removeprefix("columns_"): v for k, v in words.items() if k.startswith("columns_")}
    units = {k.removeprefix("units_"): v for k, v in words.items() if k.startswith("units_")}
    rest = {k: v for k, v in words.items() if not k.startswith(("columns_", "units_"))}
    named = fit.TableColumns(**{**NAMED, **columns})
    arguments = fit.Arguments(table=str(path), columns=named, units=fit.TableUnits(**units), **rest)
    return fit._read(arguments)


def refused(*words: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(*words, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def note(table: Table, start: str) -> str:
    return next(line for line in table.notes if line.startswith(start))


def values(table: Table, column: str = "") -> list[float]:
    return list(table.runs[column or table.columns.loss])


# --- numbers, dialects, files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('params,tokens,loss\n1000000,20000000,"5,185"\n2000000,40000000,"4,970"\n', "comma-sep"),
        ('params,tokens,loss\n1000000,20000000,"5,185"\n2000000,40000000,"4,97"\n', "comma-sep"),
        ("params;tokens;loss\n1000000;20000000;5,185\n2000000;40000000;4,97\n", "semicolon-sep"),
        ("params;tokens;loss\n1.000.000;20.000.000;5,185\n2.000.000;40.000.000;4,97\n", "semicolo"),
        ("params\ttokens\tloss\n1000000\t20000000\t5,185\n2e6\t4e7\t4,97\n", "tab-separated"),
        ('params,tokens,loss\n"1,000,000","20,000,000",5.185\n"2,000,000","40,000,000",4.97\n', ""),
        ("# of May\nparams,tokens,loss\n1e6,2e7,5.185\n# a note\n2e6,4e7,4.97\n", "2 comment li"),
        ("# params tokens loss\n1e6  2e7 5.185\n2e6 40e6   4.97\n", "the last of them its header"),
        ("params|tokens|loss\r\n1e6|2e7|5.185\r\n2e6|4e7|4.97\r\n", "bar-"),
        ("params,tokens,loss,\n1M,20M,5.185,\n2M,.04B,4.97,\n,,,\n,,,\n\n", "comma-separated"),
        ("params,tokens,loss\n1_000_000,2e7,5.185\n2 000 000,40\u202f000\u202f000,4.97\n", ""),
        ("params,tokens,loss\n1\u00a0000\u00a0000,2x10^7,5.185\n2 million,40m tokens,4.97\n", ""),
        ("\ufeffparams,tokens,loss\n1'000'000,20’000’000,5.185\n2e+6,4.0E7,4.97\n", ""),
    ],
)  # fmt: skip
def test_numbers_and_dialects(text: str, said: str, tmp_path: Path) -> None:
    found = read(written(tmp_path, text))
    assert values(found) == [5.185, 4.97]
    assert values(found, "params") == [1e6, 2e6]
    assert values(found, "tokens") == [2e7, 4e7]
    assert said in found.notes[0]
    decimal = [line for line in found.notes if "decimal comma (loss" in line]
    assert bool(decimal) == ("5,185" in text)


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        (["5,185", "5"], 'loss="5,185": row 1: a decimal comma, or thousands? decimal=, or'),
        (["5,185", "4.97"], "loss=5,185: row 1: must be a number; a loss has no thousands"),
        (["4,97", "5.31"], "loss: has decimal commas and decimal points: 4,97 (row 1) and 5.31"),
        (["5 185", "4.97"], "loss=5 185: row 1: must be a number; a loss has no thousands"),
        (["5K", "4.97"], "loss=5K: row 1: must be a number"),
        (["about 5", "4.97"], "loss=about 5: row 1: must be a number"),
    ],
)
def test_a_loss_of_two_readings_is_refused(losses: list[str], line: str, tmp_path: Path) -> None:
    runs = grid()[:2].assign(loss=losses)
    assert refused(runs, tmp_path).startswith(line)


def test_the_key_settles_the_decimal_mark(tmp_path: Path) -> None:
    runs = grid()[:2].assign(params="1,000,000", loss=["5,185", "4,970"])
    assert "decimal=, or decimal=." in refused(runs, tmp_path)
    found = read(runs, tmp_path, decimal=",")
    assert (values(found), values(found, "params")) == ([5.185, 4.97], [1e6, 1e6])


@pytest.mark.parametrize("bad", ["12,34,567", "1 00 000", "1__000", "1,2345,678", "0,123"])
def test_groups_that_are_no_thousands_are_refused(bad: str, tmp_path: Path) -> None:
    runs = grid()[:2].assign(params=["1,000,000", bad])
    line = "params: has decimal commas and decimal points: 0,123 (row 2) and 1,000,000 (row 1)"
    expected = line if bad == "0,123" else f"params={bad}: row 2: must be a number"
    assert refused(runs, tmp_path) == expected


def test_what_is_missing_is_left_out_and_counted(tmp_path: Path) -> None:
    runs = grid().astype(object)
    for row, word in enumerate(["nan", "inf", "-", "", "NaN", "None", "n/a"]):
        runs.loc[row, "loss"] = word
    runs.loc[8, "tokens"] = "-"
    found = read(runs, tmp_path)
    assert len(found.runs) == 7
    assert found.left_out["reason"].to_dict() == {
        **dict.fromkeys(range(1, 8), "no loss"),
        9: "no tokens",
    }


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_packed_files(suffix: str, tmp_path: Path) -> None:
    runs = grid()
    for kind, text in (
        (".tsv", runs.to_csv(index=False, sep="\t")),
        (".jsonl", runs.to_json(orient="records", lines=True)),
    ):
        path = tmp_path / f"Runs{kind.upper()}{suffix}"
        if suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("__MACOSX/x", "")
                archive.writestr(f"a{kind}", text)
        elif suffix == ".zst":
            with pa.output_stream(path, compression="zstd") as file:
                file.write(text.encode())
        else:
            pack = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress
            path.write_bytes(pack(text.encode()))
        found = read(path)
        pd.testing.assert_frame_equal(found.runs.reset_index(drop=True), runs)
        assert found.notes[0].startswith(path.name)


def test_kinds_of_files(tmp_path: Path) -> None:
    runs = grid()
    (tmp_path / "a.json").write_text(runs.to_json(orient="records"))
    (tmp_path / "b.json").write_text(runs.to_json())
    (tmp_path / "c.json").write_text(json.dumps(runs.to_dict("list")))
    runs.to_parquet(tmp_path / "d.parquet")
    runs.to_csv(tmp_path / "e.txt", sep=";", index=False)
    (tmp_path / "f.csv").write_bytes(runs.to_csv(index=False, sep="\t").encode("utf-16"))
    for path in sorted(tmp_path.iterdir()):
        found = read(path).runs.reset_index(drop=True)
        pd.testing.assert_frame_equal(found[list(runs)], runs)
    nested = [{"config": {"n": 1e6, "d": 2e7, "lr": 0.1 * i}, "loss": 3.0 + i} for i in range(3)]
    (tmp_path / "n.json").write_text(json.dumps(nested))
    one = read(tmp_path / "n.json", columns_n="config.n", columns_d="config.d")
    assert len(one.runs) == 1  # its rate is found in config.lr
    latin = tmp_path / "l.csv"
    latin.write_bytes("größe,params".encode("latin-1"))
    assert refused(latin) == f"table={latin}: not UTF-8 text (byte 2); save it as UTF-8"


def test_a_workbook(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    runs = grid().astype(object)
    runs.loc[0, "params"] = "1M"
    path = tmp_path / "runs.xlsx"
    with pd.ExcelWriter(path) as book:
        pd.DataFrame().to_excel(book, sheet_name="empty")
        runs.to_excel(book, sheet_name="runs", index=False, startrow=2)
    found = read(path)
    assert "sheet runs of 2" in found.notes[0]
    assert np.allclose(found.runs[list(runs)].astype(float), grid())


def test_types_of_parquet(tmp_path: Path) -> None:
    """Categories are their values, decimals numbers, and lists that nothing asks for texts."""
    runs = grid()
    kinds = runs.assign(
        params=runs["params"].astype("category"),
        tokens=runs["tokens"].astype(str).astype("category"),
        loss=runs["loss"].map(lambda loss: Decimal(str(loss))),
        optimizer=pd.Categorical(["adamw"] * 15),
        betas=pd.Series([[0.9, 0.95]] * 15),
    )
    kinds.to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet").runs.reset_index(drop=True)
    pd.testing.assert_frame_equal(found[list(runs)], runs)
    assert set(found["optimizer"]) == {"adamw"}


def test_json_as_it_is_exported(tmp_path: Path) -> None:
    rows = [{**row, "note": "a\u2028b"} for row in grid().to_dict("records")]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert len(read(written(tmp_path, lines, "a.jsonl")).runs) == 15
    found = read(written(tmp_path, json.dumps({"study": "x", "runs": rows}), "b.json"))
    assert (len(found.runs), found.notes[0]) == (15, "b.json, its runs, 15 rows, 4 columns")


def test_a_hash_that_begins_no_comment(tmp_path: Path) -> None:
    runs = grid()
    names = runs.assign(run=[f"#{i}" if i % 2 else f"r{i}" for i in range(15)])
    found = read(names[["run", *runs]], tmp_path)
    assert (len(found.runs), "comment" in found.notes[0]) == (15, False)
    counted = runs.assign(model="gpt").reset_index(names="#")[["#", "model", *runs]]
    assert list(read(counted, tmp_path).runs) == list(counted)
    lines = runs.to_csv(index=False).splitlines()
    found = read(written(tmp_path, "\n".join([*lines[:3], "#" + lines[3], *lines[4:]])))
    assert (len(found.runs), "1 comment line" in found.notes[0]) == (14, True)


def test_sheets_of_one_workbook(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "runs.xlsx"
    with pd.ExcelWriter(path) as book:
        for size, part in grid().groupby("params"):
            part.to_excel(book, sheet_name=f"{size:g}", index=False)
        pd.DataFrame({"a note": ["x"]}).to_excel(book, sheet_name="notes", index=False)
    found = read(path)
    assert "sheets 1e+06, 4e+06, 1.6e+07, 6.4e+07, 2.56e+08 of 6 with the" in found.notes[0]
    assert len(found.runs) == 15
    with pd.ExcelWriter(path) as book:
        for sheet, factor in (("raw", 1.0), ("smooth", 0.99)):
            runs = grid().assign(loss=grid()["loss"] * factor)
            runs.to_excel(book, sheet_name=sheet, index=False)
    assert "sheet differs between runs of the same params and tokens: raw, smooth" in refused(path)
    assert len(read(path, where="sheet == 'raw'").runs) == 15


def test_cells_that_most_rows_lack_are_named(tmp_path: Path) -> None:
    runs = grid().astype(object)
    runs.loc[runs["params"].duplicated(), "params"] = None
    line = refused(runs, tmp_path)
    assert "params is blank in 10 of 15 rows, first in row 2; a value that is written" in line
    assert len(read(runs, tmp_path, where="params > 0").runs) == 5


def test_a_workbook_without_its_library(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    path = written(tmp_path, "x", "a.xlsx")
    assert refused(path) == f"table={path}: needs openpyxl: pip install 'tinygpt[excel]'"


# --- learning rates


def test_rates_compare_at_equal_size_and_tokens(tmp_path: Path) -> None:
    """The best rate of each place stays, and the law is that of the truth."""
    best = grid()
    rates = [
        best.assign(peak_lr=0.003 / k, loss=best["loss"] * (1 + 0.01 * (k - 1))) for k in (1, 2, 4)
    ]
    runs = pd.concat(rates, ignore_index=True)
    smaller = runs["params"] > 2e7
    runs.loc[smaller, "peak_lr"] /= 10  # larger sizes were tuned for themselves
    found = read(runs, tmp_path)
    assert len(found.runs) == 15
    assert len(found.left_out) == 30
    assert note(found, "columns").endswith("learning rate = peak_lr")
    assert sorted(set(found.runs["peak_lr"])) == pytest.approx([0.0003, 0.003])
    truth = {"A": A, "B": B, "E": E, "alpha": ALPHA, "beta": BETA}
    law = scaling.fit(found.runs, "chinchilla", N="params", D="tokens", loss="loss")
    assert law.parameters == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize(
    "name", ["LR", "max_lr", "Learning Rate", "params.lr", "LR (peak)", "optim.lr"]
)
def test_names_of_the_rate(name: str, tmp_path: Path) -> None:
    runs = pd.concat([grid(), grid().assign(loss=grid()["loss"] + 0.1)], ignore_index=True)
    runs[name] = [0.1] * 15 + [0.2] * 15
    found = read(runs, tmp_path)
    assert set(found.left_out["reason"]) == {f"{name} 0.1 is better there"}
    mine = runs.rename(columns={name: "rho"})
    named = read(mine, tmp_path, columns_learning_rate="rho")
    assert len(named.left_out) == 15
    assert "rho differs" in refused(mine, tmp_path)
    metric = read(grid().assign(**{"metrics.lr": 0.1}), tmp_path)
    assert "learning rate" not in note(metric, "columns")
    with_size = read(grid().assign(lr=lambda t: 1 / t["params"]), tmp_path)
    assert len(with_size.left_out) == 0


@pytest.mark.parametrize("name", ["matrix_lr", "log10(lr)", "lr [1e-3]"])
def test_a_rate_of_another_name_is_no_seed(name: str, tmp_path: Path) -> None:
    runs = crossed(name, [1e-3, 3e-4])
    line = refused(runs, tmp_path)
    assert f"{name} differs" in line
    assert f"columns.learning_rate={name} keeps the best" in line
    assert len(read(runs, tmp_path, columns_learning_rate=name).left_out) == 15


def test_what_was_tuned_with_the_rate_is_no_setting(tmp_path: Path) -> None:
    runs = crossed("peak_lr", [1e-3, 3e-4]).assign(warmup=lambda t: (1e6 * t["peak_lr"]).round())
    assert len(read(runs, tmp_path).left_out) == 15
    other = runs.assign(warmup=7, loss=runs["loss"] * 1.01)
    assert "warmup differs" in refused(pd.concat([runs, other], ignore_index=True), tmp_path)


# --- units


@pytest.mark.parametrize(
    ("names", "scales"),
    [
        (("Params (M)", "Tokens (M)"), (1e6, 1e6)),
        (("params_k", "tokens_k"), (1e3, 1e3)),
    ],
)
def test_units_by_name_where_the_values_could_be_counts(
    names: tuple[str, str], scales: tuple[float, float], tmp_path: Path
) -> None:
    big = grid().assign(params=grid()["params"] * 5000, tokens=grid()["tokens"] * 5000)
    runs = big.set_axis([*names, "loss"], axis=1)
    runs = runs.assign(**{k: runs[k] / by for k, by in zip(names, scales, strict=True)})
    n, d = names
    found = read(runs, tmp_path, columns_n=n, columns_d=d)
    assert values(found, found.columns.n) == list(big["params"])
    assert values(found, str(found.columns.d)) == list(big["tokens"])
    plain = big.set_axis([*names, "loss"], axis=1).rename(columns={d: "tokens"})
    assert "the medians are" in refused(plain, tmp_path, columns_n=n, columns_d="tokens")
    counts = read(plain, tmp_path, columns_n=n, columns_d="tokens", units_n=1.0)
    assert values(counts, n) == list(big["params"])


@pytest.mark.parametrize(
    ("key", "name", "scale"),
    [("d", "tokens (M)", 1e6), ("c", "compute (GFLOPs)", 1e9), ("c", "train_FLOPs", 1.0)],
)
def test_the_unit_of_a_column_alone(key: str, name: str, scale: float, tmp_path: Path) -> None:
    counts = np.geomspace(1e18, 1e22, 8) if key == "c" else np.geomspace(5e8, 6.4e10, 8)
    runs = pd.DataFrame({name: counts / scale, "loss": 2 + 100 / counts**0.15})
    given = {"columns_n": None, "columns_d": None, f"columns_{key}": name}
    found = read(runs, tmp_path, **given)
    assert values(found, str(getattr(found.columns, key))) == pytest.approx(list(counts))


def test_the_unit_of_unique_tokens(tmp_path: Path) -> None:
    runs = grid().assign(**{"unique (B)": grid()["tokens"] / 4e9})
    found = read(runs, tmp_path, columns_u="unique (B)")
    assert values(found, str(found.columns.u)) == pytest.approx(list(grid()["tokens"] / 4))
    assert note(found, "units") == "units: unique (B) is in billions"
    plain = runs.rename(columns={"unique (B)": "unique"})
    assert refused(plain, tmp_path, columns_u="unique").startswith("columns.u=unique: its median")
    assert len(read(plain, tmp_path, columns_u="unique", units_u=1e9).runs) == 15
    small = plain.assign(
        flops=6.0 * plain["params"] * plain["tokens"], params=plain["params"] / 1e6
    )
    more = {"columns_u": "unique", "columns_c": "flops", "units_u": 1e9}
    assert values(read(small, tmp_path, **more), "params × 1e+06") == list(plain["params"])
    both = plain.assign(tokens=plain["tokens"] / 1e9).rename(columns={"tokens": "tokens (B)"})
    found = read(both, tmp_path, columns_d="tokens (B)", columns_u="unique")
    assert values(found, str(found.columns.u)) == pytest.approx(list(grid()["tokens"] / 4))
    twice = plain.assign(unique=plain["tokens"] * 2)
    assert "2 of all tokens; it must be at most all" in refused(twice, tmp_path, columns_u="unique")


@pytest.mark.parametrize("names", [("params_M", "tokens_B"), ("params (millions)", "tokens (B)")])
def test_units_by_name(names: tuple[str, str], tmp_path: Path) -> None:
    n, d = names
    runs = grid().set_axis([n, d, "loss"], axis=1)
    runs = runs.assign(**{n: runs[n] / 1e6, d: runs[d] / 1e9})
    found = read(runs, tmp_path, columns_n=n, columns_d=d)
    expected = f"units: {n} is in millions, {d} is in billions, by their names"
    assert note(found, "units") == expected
    assert values(found, found.columns.n) == list(grid()["params"])
    assert values(found, str(found.columns.d)) == pytest.approx(list(grid()["tokens"]))


def test_units_by_the_compute(tmp_path: Path) -> None:
    runs = grid().assign(flops=lambda t: 6.0 * t["params"] * t["tokens"])
    small = runs.assign(params=runs["params"] / 1e6, tokens=runs["tokens"] / 1e9)
    found = read(small, tmp_path, columns_c="flops")
    assert note(found, "units") == (
        "units: params is in millions, tokens is in billions, for then C is about 6 N D"
    )
    assert values(found, str(found.columns.d)) == pytest.approx(list(grid()["tokens"]))
    days = runs.assign(flops=runs["flops"] / 8.64e19)
    found = read(days, tmp_path, columns_c="flops")
    assert "flops is in PFLOP-days, for then" in note(found, "units")
    assert values(found, str(found.columns.c)) == pytest.approx(list(runs["flops"]))
    named = days.rename(columns={"flops": "pf_days"})[["pf_days", "loss"]]
    found = read(named, tmp_path, columns_n=None, columns_d=None, columns_c="pf_days")
    assert values(found, str(found.columns.c)) == pytest.approx(list(runs["flops"]))


@pytest.mark.parametrize(
    "change",
    [
        {"params": 1e-6, "tokens": 1e-9},  # millions and billions
        {"params": 1e-9, "tokens": 1e-9},
        {"params": 1e-6},
        {"tokens": 1e-9},
        {"tokens": 1 / 524288},  # steps
        {"flops": 1e-5},
    ],
    ids=str,
)
def test_units_that_are_not_clear_are_refused(change: dict[str, float], tmp_path: Path) -> None:
    runs = grid().assign(flops=lambda t: 6.0 * t["params"] * t["tokens"])
    for name, times in change.items():
        runs[name] = runs[name] * times
    more = {"columns_c": "flops"} if "flops" in change else {}
    line = refused(runs, tmp_path, **more)
    assert "the medians are params " in line
    assert "units.n=1e6 units.d=1e9" in line
    every = {"units_n": 1.0, "units_d": 1.0, **({"units_c": 1.0} if more else {})}
    assert len(read(runs, tmp_path, **more, **every).runs) == 15


def test_units_as_given(tmp_path: Path) -> None:
    runs = grid().assign(tokens=grid()["tokens"] / 524288)
    found = read(runs, tmp_path, units_d=524288.0)
    assert values(found, str(found.columns.d)) == pytest.approx(list(grid()["tokens"]))
    assert note(found, "units") == "units: tokens is in 524288, as given"
    assert list(found.runs["tokens"]) == pytest.approx(list(runs["tokens"]))  # where= goes by these


# --- status


@pytest.mark.parametrize("name", ["State", "STATUS"])
def test_status(name: str, tmp_path: Path) -> None:
    words = ["finished", "FINISHED", "Completed", "running", "CRASHED", "Failed", "KILLED", "odd"]
    runs = grid().assign(**{name: [*words, *["finished"] * 7]})
    found = read(runs, tmp_path)
    assert list(found.left_out["reason"]) == words[3:]
    assert note(found, "status") == f"status: odd ({name}) is not known as finished"
    unread = read(grid().assign(state=["CA", "TX", "NY"] * 5), tmp_path)
    assert len(unread.runs) == 15
    assert "does not say how a run ended (CA, TX, NY)" in note(unread, "status")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("run_state", "finished", "crashed"),
        ("exit_code", "0", "137"),
        ("ExitCode", "0:0", "1:0"),
        ("outcome", "ok", "diverged"),
        ("nan", "False", "True"),
        ("has_diverged", "0", "1"),
        ("status", "published", "failed"),
        ("status", "TERMINATED", "ERROR"),
        ("job_status", "COMPLETED", "CANCELLED by 1001"),
        ("finished", "True", "False"),
        ("diverged", "no", "yes"),
    ],
)
def test_how_a_run_ended(name: str, good: str, bad: str, tmp_path: Path) -> None:
    found = read(grid().assign(**{name: [bad, *[good] * 14]}), tmp_path)
    assert list(found.left_out["reason"]) in ([bad], [f"{name}={bad}"])
    if good == "TERMINATED":
        assert note(found, "status") == "status: TERMINATED (status) is taken for finished"


def test_counts_are_no_sign_of_how_a_run_ended(tmp_path: Path) -> None:
    runs = grid().assign(failed_evals=range(15), completed_steps=7, return_mean=0.5, state_dim=64)
    assert len(read(runs, tmp_path).runs) == 15


def test_a_value_with_a_unit_of_its_own_keeps_it(tmp_path: Path) -> None:
    plain = grid()
    sizes = [f"{n / 1e6:g}" for n in plain["params"]]
    sizes[-1] = "0.256B"
    runs = plain.assign(**{"params (M)": sizes}).drop(columns="params")
    found = read(runs, tmp_path, columns_n="params (M)", columns_d="tokens")
    assert values(found, found.columns.n) == pytest.approx(plain["params"].tolist())


def test_a_value_whose_unit_is_missing_is_refused_by_its_row(tmp_path: Path) -> None:
    tokens = [f"{d / 1e9:g}B" for d in grid()["tokens"]]
    tokens[3] = tokens[3].rstrip("B")
    line = refused(grid().assign(tokens=tokens), tmp_path)
    assert line.startswith("tokens=0.02: row 4: beside a median of ")
    assert "units.d=1" in line


def test_epochs_are_named_and_losses_of_two_units_refused(tmp_path: Path) -> None:
    said = note(read(grid().assign(epochs=4), tmp_path), "epochs")
    assert said.startswith("epochs: tokens is taken for all tokens read, though epochs is up to 4")
    assert not any(line.startswith("epochs") for line in read(grid(), tmp_path).notes)
    runs = grid().assign(unit=["nats", "bits", "nats"] * 5)
    assert "unit says bits and nats" in refused(runs, tmp_path)
    assert len(read(runs, tmp_path, where="unit == 'nats'").runs) == 10


# --- seeds, and what is none


def crossed(column: str, kinds: list[Any]) -> pd.DataFrame:
    each = enumerate(kinds)
    parts = [grid().assign(**{column: k, "loss": grid()["loss"] * 1.02**i}) for i, k in each]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ("training_set", ["c4", "pile", "web"]),
        ("train_data_path", ["/a/c4", "/a/pile"]),
        ("dataset", ["c4", "pile"]),
        ("weight_decay", [0.0, 0.1]),
        ("batch size", [256, 512]),
        ("mixture", [0.5, 0.75]),
        ("gated", [True, False]),
        ("metric", ["train_loss", "val_loss"]),  # a long table
        ("eval_set", ["c4", "wikitext"]),
        ("k", [1, 2, 3]),
        ("warmup", [300, 1000]),
        ("max_steps", [300, 1000, 3000]),
        ("tag", ["adamw", "muon", "sgd"]),
        ("name", ["adamw", "muon"]),
    ],
)
def test_a_setting_is_no_seed(column: str, kinds: list[Any], tmp_path: Path) -> None:
    runs = crossed(column, kinds)
    line = refused(runs, tmp_path)
    assert f"{column} differs between runs of the same params and tokens: " in line
    assert f"columns.seed={column}" in line
    where = line.partition('where="')[2].partition('"')[0]
    assert len(read(runs, tmp_path, where=where).runs) == 15
    assert len(read(runs, tmp_path, columns_seed=column).runs) == 15 * len(kinds)
    seeded = pd.concat([runs.assign(seed=0), runs.assign(seed=1)], ignore_index=True)
    assert f"{column} differs" in refused(seeded, tmp_path)


def test_what_was_measured_refuses_nothing(tmp_path: Path) -> None:
    runs, random = grid(seeds=3, noise=0.01), np.random.default_rng(2)
    count = len(runs)
    runs = runs.assign(
        run=[f"r{i}" for i in range(count)],
        train_loss=runs["loss"] - 0.1,
        accuracy=random.random(count).round(1),
        hellaswag=random.random(count).round(3),
        date=["2024-05-01", "2024-05-02", "2024-05-03"] * 15,
        gpu=["a100", "h100", "a100"] * 15,
        hours=random.random(count).round(1),
        out_dir=["/x", "/y", "/z"] * 15,
        _step=random.integers(1, 5, count),
        steps_to_target=random.integers(1, 5, count),
        label=[f"seed {s}" for s in runs["seed"]],
    )
    found = read(runs, tmp_path)
    assert len(found.runs) == count
    assert found.columns.seed == "seed"
    for name in ("random_seed", "data_seed", "Seed"):
        other = read(runs.rename(columns={"seed": name}).drop(columns="label"), tmp_path)
        assert other.columns.seed == name
    bare = read(grid(seeds=3, noise=0.01).drop(columns="seed"), tmp_path)
    assert note(bare, "seeds").startswith("seeds: 45 rows share params and tokens with another")


# --- checkpoints


def checkpoints(name: str) -> pd.DataFrame:
    rows = [
        {name: f"r{n:g}", "params": int(n), "tokens": int(n * 4 * k), "loss": 3.0 + 1 / k + n / 1e9}
        for n in (1e6, 1e7, 1e8)
        for k in range(10, 0, -1)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", ["run", "Name", "run_id"])
def test_rows_of_one_run_are_its_checkpoints(name: str, tmp_path: Path) -> None:
    found = read(checkpoints(name), tmp_path)
    assert found.columns.run == name
    assert found.columns.cluster(found.runs) == name
    assert note(found, "runs").startswith(f"runs: 30 rows of 3 runs, by {name}")
    assert read(checkpoints(name), tmp_path, columns_run="none").columns.run is None


def test_the_last_evaluations_of_a_run(tmp_path: Path) -> None:
    found = read(checkpoints("run"), tmp_path, last=5)
    assert values(found, "tokens") == [4e7, 4e8, 4e9]
    mean = sum(1 / k for k in range(6, 11)) / 5
    assert values(found) == pytest.approx([3 + mean + n / 1e9 for n in (1e6, 1e7, 1e8)])
    assert found.columns.cluster(found.runs) is None
    assert len(found.left_out) == 27
    assert note(found, "last=5").endswith("the mean of its last 5 evaluations")
    assert refused(grid(), tmp_path, last=5).startswith("last=5: needs columns.run=")


def test_rows_that_may_be_checkpoints_are_said_to_be_taken_for_runs(tmp_path: Path) -> None:
    table = grid().assign(model=lambda rows: "m" + (rows["params"] // 1_000_000).astype(str))
    line = note(read(table, tmp_path), "runs:")
    assert line.endswith("if the rows of one model are checkpoints, columns.run=model")
    assert read(table, tmp_path, columns_run="model").columns.run == "model"
    sizes = grid(seeds=2).assign(name=lambda t: t["params"].astype(str))
    assert read(sizes, tmp_path).columns.run is None


def test_a_folder_is_a_run_only_if_its_rows_are_checkpoints(tmp_path: Path) -> None:
    assert read(grid().assign(folder="/sweep"), tmp_path).columns.run is None
    assert (
        read(grid().assign(folder=[f"/{i}" for i in range(15)]), tmp_path).columns.run == "folder"
    )
    found = read(checkpoints("folder"), tmp_path)
    assert note(found, "runs").startswith("runs: 30 rows of 3 runs, by folder")


def test_one_run_has_no_intervals() -> None:
    table = grid(noise=0.002).assign(run="a")
    law = scaling.fit(table, "chinchilla", N="params", D="tokens", loss="loss")
    found = scaling.bootstrap(law, 50, cluster="run").interval("E")
    assert np.isnan([found.low, found.high]).all()
    assert found.method == "none"
    columns = Columns(n="params", d="tokens", loss="loss", run="run")
    made = analyse(table, table[:0].assign(reason=""), columns)
    assert made.intervals == {}
    assert np.isnan([made.predictions[0].loss.low, made.predictions[0].loss.high]).all()


def test_checkpoints_without_a_name_are_noted(tmp_path: Path) -> None:
    runs = checkpoints("run").drop(columns="run").assign(step=lambda t: t["tokens"] // 1000)
    line = note(read(runs, tmp_path), "runs")
    assert "though step rises with tokens at each params; if these are checkpoints" in line
    assert read(runs, tmp_path, columns_run="params").columns.run == "params"
    assert not any(one.startswith("runs") for one in read(grid().assign(step=7), tmp_path).notes)


# --- rows


def test_rows_that_stand_twice(tmp_path: Path) -> None:
    found = read(pd.concat([grid(), grid()[3:5]], ignore_index=True), tmp_path)
    assert len(found.runs) == 15
    assert found.left_out["reason"].to_dict() == {16: "same as row 4", 17: "same as row 5"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("params,tokens,loss,loss\n1,2,3,4\n", "two columns are called loss; rename one"),
        ("params,tokens,loss\n1,2,3\nparams,tokens,loss\n1,2,3\n", "line 3 repeats the header"),
        ("1e6,2e7,3.5\n2e6,4e7,3.1\n", "has no header: its first row is 1e6, 2e7, 3.5"),
        ("params,tokens,loss\n1,2,3,5\n", "has more values in a row than columns in its first"),
    ],
)
def test_headers(text: str, line: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    assert refused(path).startswith(f"table={path}: {line}")


@pytest.mark.parametrize(
    "names",
    [
        ("params", "tokens", "loss"),
        ("N", "D", "val/loss"),
        ("params.n_params", "p.n_tokens", "m.Loss"),
    ],
)
def test_columns_with_usual_names_are_found(names: tuple[str, str, str], tmp_path: Path) -> None:
    table = grid().set_axis(list(names), axis=1).assign(**{"train/loss": 9.0})
    plain = {f"columns_{kind}": None for kind in NAMED}
    found = read(table, tmp_path, **plain)
    assert f"columns: N = {names[0]}, D = {names[1]}, loss = {names[2]}" in found.notes
    with pytest.raises(ConfigError, match="name the column of the parameters"):
        read(table.drop(columns=names[1]), tmp_path, **plain)  # half a place is no place


def test_the_column_that_varies_is_taken(tmp_path: Path) -> None:
    plain = {f"columns_{kind}": None for kind in NAMED}
    found = read(grid().assign(n=10_000, d=lambda t: t["params"] // 7), tmp_path, **plain)
    assert "columns: N = params, D = tokens, loss = loss" in found.notes
    narrow = grid().rename(columns={"params": "n"}).assign(n_params=5)
    assert "columns: N = n, D = tokens, loss = loss" in read(narrow, tmp_path, **plain).notes


def test_a_column_given_leaves_the_others_found(tmp_path: Path) -> None:
    runs = grid().assign(fresh=grid()["tokens"] // 4)
    plain = {f"columns_{kind}": None for kind in NAMED}
    found = read(runs, tmp_path, **plain, columns_u="fresh")
    assert "columns: N = params, D = tokens, U = fresh, loss = loss" in found.notes
    found = read(runs, tmp_path, **{**plain, "columns_n": "fresh"})
    assert "columns: N = fresh, D = tokens, loss = loss" in found.notes


def test_compute_and_loss_alone(tmp_path: Path) -> None:
    flops = np.geomspace(1e15, 1e20, 8)
    runs = pd.DataFrame({"flops": flops, "loss": 2 + 100 / flops**0.15})
    found = read(runs, tmp_path, columns_n=None, columns_d=None, columns_c="flops")
    where = found.columns.where(found.runs)
    _, variables, words = choice("auto", "auto", varied(found.runs, where), where)
    assert variables == {"x": "flops"}
    assert words == {"x": "training compute (FLOPs)"}


def test_zero_tokens_are_a_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    runs = grid()
    runs.loc[[0, 4], "tokens"] = [0, -5]
    found = read(runs, tmp_path)
    assert found.left_out["reason"].to_dict() == dict.fromkeys((1, 5), "tokens is not above zero")
    assert not recwarn.list


def test_repeated_tokens_where_the_best_law_has_no_use_for_them(
    tinygpt: Command, tmp_path: Path
) -> None:
    runs = grid(noise=0.002).assign(unique=lambda t: t["tokens"] // 4)
    runs.to_csv(tmp_path / "u.csv", index=False)
    words = ("columns.u=unique", "predict=n=1e9,d=5e10", "law=chinchilla")
    done = tinygpt("fit", "table=u.csv", *(f"columns.{k}={v}" for k, v in NAMED.items()), *words)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads((tmp_path / "outputs" / "fit-u" / "fit.json").read_text())["predictions"]
    assert all(one["place"]["U"] == one["place"]["D"] for one in made)


# --- losses


def test_perplexities(tmp_path: Path) -> None:
    runs = grid().assign(val_ppl=lambda t: np.exp(t["loss"])).drop(columns="loss")
    found = read(runs, tmp_path, columns_loss="val_ppl")
    assert found.columns.loss == "log(val_ppl)"
    assert values(found) == pytest.approx(list(grid()["loss"]))
    assert note(found, "loss") == "loss: val_ppl is a perplexity; its logarithm is fitted"
    hidden = runs.rename(columns={"val_ppl": "loss"})
    assert "too large for a loss per token; loss_unit=perplexity" in refused(hidden, tmp_path)
    assert values(read(hidden, tmp_path, loss_unit="perplexity")) == pytest.approx(values(found))


@pytest.mark.parametrize(
    ("name", "base"),
    [("ln_ppl", np.e), ("logppl", np.e), ("log10_ppl", 10), ("log2_perplexity", 2)],
)
def test_logarithms_of_perplexities(name: str, base: float, tmp_path: Path) -> None:
    runs = grid().assign(loss=lambda t: t["loss"] / np.log(base)).rename(columns={"loss": name})
    found = read(runs, tmp_path, columns_loss=name)
    assert values(found) == pytest.approx(list(grid()["loss"]))
    said = f"loss: {name} is the logarithm of a perplexity, to base {'e' if base == np.e else base}"
    assert note(found, "loss") == f"{said}; it is fitted in nats"


@pytest.mark.parametrize("name", ["ppl_loss", "eval/perplexity_loss", "Loss (PPL)"])
def test_a_loss_and_a_perplexity_by_its_name(name: str, tmp_path: Path) -> None:
    runs = grid().rename(columns={"loss": name})
    line = refused(runs, tmp_path, columns_loss=name)
    assert line.startswith(f"columns.loss={name}: a loss and a perplexity by its name; loss_unit=")
    assert values(read(runs, tmp_path, columns_loss=name, loss_unit="nats")) == list(grid()["loss"])


def test_nats_only_where_they_are(tmp_path: Path) -> None:
    assert read(grid(), tmp_path).columns.loss_label == "loss"
    stated = read(grid(), tmp_path, loss_unit="nats per token")
    assert stated.columns.loss_label == "loss (nats per token)"
    assert Columns().loss_label == "loss (nats per token)"
    assert Columns(loss="final_val_bits_per_byte").loss_label == "loss (bits per byte)"


# --- as a command


def test_what_was_assumed_is_printed_and_recorded(tinygpt: Command, tmp_path: Path) -> None:
    runs = pd.concat([grid(noise=0.003), grid().assign(loss=19.0)], ignore_index=True)
    runs = runs.assign(lr=[0.1] * 15 + [0.2] * 15, State=["finished"] * 29 + ["crashed"])
    runs.to_csv(tmp_path / "wandb.tsv.gz", index=False, sep="\t", decimal=",")
    done = tinygpt("fit", "table=wandb.tsv.gz", *(f"columns.{k}={v}" for k, v in NAMED.items()))
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "outputs" / "fit-wandb"
    notes = json.loads((folder / "fit.json").read_text())["notes"]
    rows = ", ".join(map(str, range(16, 28)))
    assert notes == [
        "wandb.tsv.gz, tab-separated, 30 rows, 5 columns",
        "numbers: decimal comma (loss, lr)",
        "columns: N = params, D = tokens, loss = loss, learning rate = lr",
        f"left out: 14 of 30 (another lr is better at the same place): rows {rows} and 2 more",
        "left out: 1 of 30 (crashed): row 30",
    ]
    for text in (done.stdout, (folder / "report.md").read_text()):
        for line in notes:
            assert line in " ".join(text.split())
        assert "nats per token" not in text


def test_keys_of_a_table_alone(tinygpt: Command, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "results.json").write_text("{}")
    done = tinygpt("fit", "runs=r", "units.n=1e6")
    assert done.stderr == "error: units.n: for table= only; a run's own folder says it\n"


def test_public_tables_enter_whole(real_data: Path) -> None:
    for path in sorted([*real_data.glob("runs/*.csv"), *real_data.glob("scalebench/*.csv")]):
        head = pd.read_csv(path, nrows=1)
        n, d = ("params", "tokens") if "params" in head else ("N", "D")
        c = next((name for name in ("flops", "C", "budget") if name in head), None)
        found = read(path, columns_n=n, columns_d=d, columns_c=c)
        assert not any(line.startswith(("units", "compute")) for line in found.notes)
        assert all(reason.startswith("same") for reason in found.left_out["reason"])
