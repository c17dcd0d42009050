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
MARKED = re.compile(r"(<!-- table: (\w+)_(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    return f"{text}\n*{result['machine']}; {versions}; {result['date']}; `{result['command']}`*\n"


SHOWN = ("torch", "triton", "transformers")


def npass(result: dict) -> list[list[str]]:
    """Seconds of one-pass; times that of the others."""
    groups = _by(result["rows"], "group", "method")
    others = [method for method in next(iter(groups.values())) if method != "one-pass"]
    table = [["conversations", "tokens N-pass / run", "one-pass", *others]]
    for group, of in groups.items():
        ours = of["one-pass"]
        cells = [f"{ours['tokens'] / ours['tokens run']:.2f}", f"{_seconds(ours['step'])}, {ours['peak MiB']:,.0f} MiB"]
        for method in others:
            if "error" in of[method]:
                cells.append(of[method]["error"].split(":")[0])
            else:
                cells.append(f"{of[method]['one-pass is faster by']:.2f}× ({of[method]['predicted']:.2f}×)")
        table.append([group, *cells])
    return table


def headline(result: dict) -> list[list[str]]:
    """One-pass against three of the others."""
    usual, strongest = "N-pass, sequences", "N-pass, packed"
    table = [
        [
            "conversations",
            "tokens",
            "N-pass, one by one",
            "N-pass, packed",
            "one-pass",
            "faster than the first, the second",
        ]
    ]
    for group, of in _by(result["rows"], "group", "method").items():
        times = [f"{of[method]['step']['median']:.1f} s" for method in (usual, strongest, "one-pass")]
        faster = [f"{of[method]['one-pass is faster by']:.2f}×" for method in (usual, strongest)]
        table.append([group, f"{of[usual]['tokens']:,} → {of['one-pass']['tokens run']:,}", *times, ", ".join(faster)])
    return table


def attention(result: dict) -> list[list[str]]:
    """Forward and backward, at every length."""
    rows = [row for row in result["rows"] if "error" not in row]
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
    turns = _by(result["rows"], "turns", "method")
    methods = list(next(iter(turns.values())))
    table = [["turns", *(f"{method}: tokens, step, peak" for method in methods)]]
    for n, of in turns.items():
        cells = (
            f"{r['tokens run']:,}, {_seconds(r['step'])}, {r['peak MiB']:,.0f} MiB"
            for r in map(of.__getitem__, methods)
        )
        table.append([str(n), *cells])
    of_time = [result["exponents"][method] for method in methods]
    cells = (f"turns^{e['step, seconds']:.2f} (counted: {e['FLOPs, counted']:.2f})" for e in of_time)
    table.append([f"time, from {result['settings']['fit_from']} turns on", *cells])
    return table


def split(result: dict) -> list[list[str]]:
    table = [["", "tokens run", "step", "time over K = 1", "peak memory", "over K = 1"]]
    first = result["rows"][0]
    for row in result["rows"]:
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
    for row in result["rows"]:
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
    for row in result["rows"]:
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
    table = [["", "training", "loss, first and last step", "held-out answers right", "by turn"]]
    for row in result["rows"]:
        table.append(
            [
                row["model"],
                f"{row['seconds']:.0f} s",
                f"{row['first loss']:.4f}, {row['last loss']:.4f}",
                f"{row['right']} of {row['answers']}",
                ", ".join(map(str, row["right by turn"])),
            ]
        )
    answers = result["rows"][0]["answers"]
    table.append(
        [
            "difference",
            "",
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


def _by(rows: list[dict], outer: str, inner: str) -> dict:
    found = {}
    for row in rows:
        found.setdefault(row[outer], {})[row[inner]] = row
    return found


def _seconds(measured: dict) -> str:
    spread = f" ({measured['min']:.3g} to {measured['max']:.3g})" if measured["repeats"] > 1 else ""
    return f"{measured['median']:.3g} s{spread}"


def _milliseconds(measured: dict) -> str:
    return f"{measured['median'] * 1e3:.3g} ms"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
