"""Writes the tables of README.md and benchmarks/README.md from the results: what stands between the marks

    <!-- table: NAME_SIZE -->
    <!-- end -->

python benchmarks/report.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")


def render(page: str) -> str:
    """A page with its tables written anew."""
    return MARKED.sub(lambda found: found[1] + _table(found[2], found[3]) + found[4], page)


def _table(name: str, size: str) -> str:
    benchmark = "npass" if name == "headline" else name
    result = json.loads((HERE / "results" / f"{benchmark}_{size}.json").read_text())
    head, *rows = TABLES[name](result)
    lines = [head, ["---"] * len(head), *rows]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if package in SHOWN)
    settings = result["settings"]
    model = f"{settings['shape']}'s shape" if "shape" in settings else ""
    model += f", {settings['layers']} layers" if settings.get("layers") else ""
    about = [model, result["machine"], versions, result["date"], f"`{result['command']}`"]
    return f"{text}\n*{'; '.join(filter(None, about))}*\n"


SHOWN = ("torch", "triton", "transformers")


MISSING = "–"  # a row that failed, or that an interrupted run has not reached


def npass(result: dict) -> list[list[str]]:
    """Seconds of one-pass; times that of the others."""
    groups = _by(result["rows"], "group", "method")
    methods = list(next(iter(groups.values())))
    table = [["conversations", *(f"{method}: step, memory" for method in methods)]]
    for group, of in groups.items():
        cells = []
        for method in methods:
            row = of.get(method, {"error": MISSING})
            if "error" in row:
                cells.append(row["error"].split(":")[0])
                continue
            ratio = f", {row['one-pass is faster by']:.2f}× ({row['predicted']:.2f}×)" * (method != "one-pass")
            cells.append(f"{_seconds(row['step'])}{ratio}, {row['peak MiB']:,.0f} MiB")
        table.append([group, *cells])
    return table


def headline(result: dict) -> list[list[str]]:
    """One-pass against N-pass as it is usual, and against the fastest N-pass of the group."""
    usual = "N-pass, sequences"
    table = [["conversations", "tokens", "one sequence at a time", "the fastest N-pass", "one-pass", "faster by"]]
    for group, of in _by(result["rows"], "group", "method").items():
        of = {method: row for method, row in of.items() if "error" not in row}
        if "one-pass" not in of or usual not in of:
            continue
        fastest = min((m for m in of if m.startswith("N-pass")), key=lambda m: of[m]["step"]["median"])
        times = [f"{of[method]['step']['median']:.1f} s" for method in (usual, fastest, "one-pass")]
        times[1] += f" ({fastest.removeprefix('N-pass, ')})"
        faster = [f"{of[method]['one-pass is faster by']:.2f}×" for method in (usual, fastest)]
        table.append([group, f"{of[usual]['tokens']:,} → {of['one-pass']['tokens run']:,}", *times, ", ".join(faster)])
    return table


def attention(result: dict) -> list[list[str]]:
    """Forward and backward, at every length."""
    rows = _measured(result)
    table = [["row", "tokens", "heads", "visible", "attention", "forward", "backward", "TFLOP/s, forward, backward"]]
    for row in rows:
        table.append(
            [
                row["conversation"],
                f"{row['length']:,}",
                row["heads"],
                f"{row['visible']:.0%}",
                row["attention"],
                _milliseconds(row["forward"]),
                _milliseconds(row["backward"]),
                f"{row['forward TFLOP/s']:.3g}, {row['backward TFLOP/s']:.3g}",
            ]
        )
    return table


def growth(result: dict) -> list[list[str]]:
    turns = _by(_measured(result), "turns", "method")
    methods = list(next(iter(turns.values())))
    table = [["turns", *(f"{method}: tokens, step, peak" for method in methods)]]
    for n, of in turns.items():
        rows = [of.get(method) for method in methods]
        cells = [
            f"{r['tokens run']:,}, {_seconds(r['step'])}, {r['peak MiB']:,.0f} MiB" if r else MISSING for r in rows
        ]
        table.append([str(n), *cells])
    fitted = [result["exponents"].get(method) for method in methods]
    cells = [f"turns^{e['step, seconds']:.2f} (counted: {e['FLOPs, counted']:.2f})" if e else MISSING for e in fitted]
    table.append([f"time, from {result['settings']['fit_from']} turns on", *cells])
    return table


def split(result: dict) -> list[list[str]]:
    table = [["", "tokens run", "step", "time over K = 1", "peak memory", "over K = 1"]]
    first = _measured(result)[0]
    for row in _measured(result):
        table.append(
            [
                f"K = {row['parts']}" if row["method"] == "one-pass" else row["method"],
                f"{row['tokens run']:,}",
                _seconds(row["step"]),
                f"{row['step']['median'] / first['step']['median']:.2f}×",
                f"{row['peak MiB']:,.0f} MiB",
                f"{row['peak MiB'] / first['peak MiB']:.2f}×",
            ]
        )
    return table


def groups(result: dict) -> list[list[str]]:
    table = [["batch", "", "tokens run", "step", "faster by (predicted)", "peak memory"]]
    for row in _measured(result):
        table.append(
            [
                row["group"],
                row["method"],
                f"{row['tokens run']:,}",
                _seconds(row["step"]),
                f"{row['faster by']:.2f}× ({row['predicted']:.2f}×)",
                f"{row['peak MiB']:,.0f} MiB",
            ]
        )
    return table


def loss_memory(result: dict) -> list[list[str]]:
    table = [["loss", "forward and backward", "peak memory", "of it the gradient of the output layer", "value"]]
    for row in _measured(result):
        table.append(
            [
                row["loss"],
                _seconds(row["step"]),
                f"{row['peak MiB']:,.0f} MiB",
                f"{row['gradient, MiB']:,.0f} MiB",
                f"{row['value']:.6f}",
            ]
        )
    return table


def preprocessing(result: dict) -> list[list[str]]:
    table = [["conversations", "stage", "time", "share", "tokens/s", "tokens N-pass / tree", "padding of rows"]]
    for row in result["rows"]:
        table.append(
            [
                f"{row['conversations']:,}, {row['dataset']}",
                row["stage"],
                _seconds(row["seconds"]),
                f"{row['share']:.1%}",
                f"{row['tokens/s']:,}",
                f"{row['tokens N-pass / tree']:.2f}",
                f"{row['padding of rows']:.1%}",
            ]
        )
    return table


def accuracy(result: dict) -> list[list[str]]:
    table = [["", "loss, first and last step", "held-out answers right", "by turn"]]
    for row in result["rows"]:
        table.append(
            [
                row["model"],
                f"{row['first loss']:.4f}, {row['last loss']:.4f}",
                f"{row['right']} of {row['answers']}",
                ", ".join(map(str, row["right by turn"])),
            ]
        )
    if "same_texts" not in result:
        return table
    answers = result["rows"][0]["answers"]
    table.append(
        [
            "difference",
            f"{result['largest_difference']:.1e} at most",
            f"{result['same_texts']} of {answers} texts the same",
            "",
        ]
    )
    return table


TABLES: dict[str, Callable[[dict], list[list[str]]]] = {
    table.__name__: table
    for table in (headline, npass, attention, growth, split, groups, loss_memory, preprocessing, accuracy)
}


MARKED = re.compile(rf"(<!-- table: ({'|'.join(TABLES)})_(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _measured(result: dict) -> list[dict]:
    return [row for row in result["rows"] if "error" not in row]


def _by(rows: list[dict], outer: str, inner: str) -> dict:
    found = {}
    for row in rows:
        found.setdefault(row[outer], {})[row[inner]] = row
    return found


def _seconds(measured: dict) -> str:
    spread = f" ({measured['min']:.3g} to {measured['max']:.3g})" if measured["repeats"] > 1 else ""
    return f"{measured['median']:.3g} s{spread}"


def _milliseconds(measured: dict) -> str:
    return f"{measured['median'] * 1e3:,.0f} ms"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
