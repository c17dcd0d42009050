"""Writes the tables of README.md and benchmarks/README.md from the results: what stands between the marks

    <!-- table: NAME_SIZE -->
    <!-- end -->

or, for the rows of several sizes in one table, NAME_SIZE+SIZE.

python benchmarks/report.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from common import PLAIN, ratio

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
SHOWN = ("torch", "triton", "transformers")  # versions in a caption
OF = {"headline": "npass", "side_by_side": "npass", "overhead": "preprocessing", "at_scale": "preprocessing"}  # tables
MISSING = "–"  # of a row that failed, that an interrupted run has not reached, or that has no such thing


def render(page: str) -> str:
    """A page with its tables written anew."""
    return MARKED.sub(lambda found: found[1] + _table(found[2], found[3]) + found[4], page)


def _table(name: str, sizes: str) -> str:
    paths = [HERE / "results" / f"{OF.get(name, name)}_{size}.json" for size in sizes.split("+")]
    results = [json.loads(path.read_text()) for path in paths]
    tables = [TABLES[name](result) for result in results]
    head = tables[0][0]
    lines = [head, ["---"] * len(head), *(line for table in tables for line in table[1:])]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    about = [", ".join(dict.fromkeys(of_each)) for of_each in zip(*map(_about, results))]  # what is the same, once
    return f"{text}\n*{'; '.join(filter(None, about))}*\n"


def _about(result: dict) -> list[str]:
    """For a caption: model, machine, versions, date, command."""
    settings, versions = result["settings"], result["versions"]
    shape = settings.get("shape", "")
    model = f"the shape of {shape} of vocabulary" if "," in shape else f"{shape}'s shape" if shape else ""
    model += f", {settings['layers']} layers" if isinstance(settings.get("layers"), int) else ""
    shown = ", ".join(f"{package} {version}" for package, version in versions.items() if package in SHOWN)
    notes = []
    if "cuda" in versions and "liger-kernel" in versions:  # there it computes the loss of trees
        notes.append(f"with liger-kernel {versions['liger-kernel']}")
    if not result["finished"]:
        notes.append("stopped before the end")
    command = f"`{result['command']}`" + (f" ({', '.join(notes)})" if notes else "")
    return [model, result["machine"], shown, result["date"], command]


def npass(result: dict) -> list[list[str]]:
    """Seconds of one-pass; times that of the others. Without the groups of which an interrupted run has one-pass and nothing to
    compare it with."""
    groups = _by(result["rows"], "group", "method")
    return _columns(
        [row for row in result["rows"] if list(groups[row["group"]]) != ["one-pass"] or "error" in row],
        {
            "conversations": lambda row: row["group"],
            "method": lambda row: row["method"],
            "tokens run": lambda row: f"{row['tokens run']:,}",
            "step": lambda row: _seconds(row["step"]),
            "tokens/s": lambda row: f"{row['tokens/s']:,.0f}",
            "times one-pass": lambda row: _times(row["one-pass is faster by"]),
            "predicted": lambda row: f"{row['predicted']:.2f}×",
            "of prediction": lambda row: f"{row['of prediction']:.2f}",
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
        },
    )


def headline(result: dict) -> list[list[str]]:
    """One-pass against N-pass as it is usual, and against the N-pass that it is least faster than. Of complete groups."""
    usual, faster_by = "N-pass, sequences", "one-pass is faster by"
    table = [
        ["conversations", "tokens", "one sequence at a time", "the best N-pass", "one-pass", "faster by", "predicted"]
    ]
    for group, of in _by(result["rows"], "group", "method").items():
        done = {method: row for method, row in of.items() if "error" not in row}
        if not {"one-pass", usual} <= set(done) or set(of) != set(result["methods"]):
            continue
        best = min(
            (method for method in done if method.startswith("N-pass")), key=lambda m: done[m][faster_by]["median"]
        )
        failed = "".join(f"; {method} failed" for method in of if method not in done)
        times = [f"{done[method]['step']['median']:.1f} s" for method in (usual, best, "one-pass")]
        times[1] += f" ({best.removeprefix('N-pass, ')}{failed})"
        faster = ", ".join(_times(done[method][faster_by]) for method in (usual, best))
        predicted = ", ".join(f"{done[method]['predicted']:.2f}×" for method in (usual, best))
        tokens = f"{done[usual]['tokens']:,} → {done['one-pass']['tokens run']:,}"
        table.append([group, tokens, *times, faster, predicted])
    return table


def side_by_side(result: dict) -> list[list[str]]:
    """A line for each group: seconds, times one-pass and peak memory of every method that was measured beside one-pass."""
    columns = {
        "one-pass": "one-pass",
        "packed rows": "N-pass, packed",
        "padded batches": "N-pass, padded batches",
        "one sequence at a time, logits at targets": "N-pass, sequences, logits at targets",
        "published one-pass": "published one-pass",
    }

    def cell(row: dict) -> str:
        times, gib = row["one-pass is faster by"]["median"], row["peak MiB"] / 2**10
        return f"{row['step']['median']:.2f} s, {times:.2f}×, {gib:.1f} GiB"

    table = [["conversations", "tokens", *columns]]
    for group, of in _by(_measured(result), "group", "method").items():
        if len(of) > 1 and "one-pass" in of:
            tokens = f"{of['one-pass']['tokens']:,} → {of['one-pass']['tokens run']:,}"
            cells = [cell(of[method]) if method in of else MISSING for method in columns.values()]
            table.append([group, tokens, *cells])
    return table


def attention(result: dict) -> list[list[str]]:
    """Forward and backward of all contenders, problem by problem."""
    problems = [tuple(row[key] for key in ("conversation", "length", "heads", "dtype")) for row in result["rows"]]
    order = sorted(range(len(problems)), key=lambda i: problems.index(problems[i]))
    return _columns(
        [result["rows"][i] for i in order],
        {
            "row": lambda row: row["conversation"],
            "tokens": lambda row: f"{row['length']:,}",
            "heads": lambda row: f"{row['heads']}, {row['dtype']}",
            "visible, of visited tiles": lambda row: (
                MISSING if row["attention"] == PLAIN else f"{row['visible']:.0%}, {row['visible of visited tiles']:.0%}"
            ),
            "attention": lambda row: row["attention"],
            "forward": lambda row: _milliseconds(row["forward"]),
            "backward": lambda row: _milliseconds(row["backward"]) if "backward" in row else MISSING,
            "TFLOP/s, forward, backward": lambda row: ", ".join(
                [f"{row['forward TFLOP/s']:.3g}", f"{row['backward TFLOP/s']:.3g}" if "backward" in row else MISSING]
            ),
        },
    )


def growth(result: dict) -> list[list[str]]:
    methods = result["settings"]["methods"]
    table = [["turns", *(f"{method}: tokens, step, peak" for method in methods)]]
    for n, of in _by(_measured(result), "turns", "method").items():
        rows = [of.get(method) for method in methods]
        cells = [
            f"{r['tokens run']:,}, {_seconds(r['step'])}, {r['peak MiB']:,.0f} MiB" if r else MISSING for r in rows
        ]
        table.append([str(n), *cells])
    fitted = [result.get("exponents", {}).get(method) for method in methods]
    cells = [f"turns^{e['step, seconds']:.2f} (counted: {e['FLOPs, counted']:.2f})" if e else MISSING for e in fitted]
    table.append([f"time, from {result['settings']['fit_from']} turns on", *cells])
    return table


def split(result: dict) -> list[list[str]]:
    whole = next((row for row in _measured(result) if row["parts"] == 1), None)  # without it nothing is compared
    return _columns(
        result["rows"],
        {
            "": lambda row: f"K = {row['parts']}" if row["method"] == "one-pass" else row["method"],
            "tokens run": lambda row: f"{row['tokens run']:,}",
            "step": lambda row: _seconds(row["step"]),
            "time over K = 1": lambda row: _times(ratio(row["step"], whole["step"])) if whole else MISSING,
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
            "over K = 1": lambda row: f"{row['peak MiB'] / whole['peak MiB']:.2f}×" if whole else MISSING,
        },
    )


def memory(result: dict) -> list[list[str]]:
    """Of a step, over that of one sequence at a time."""
    return _columns(
        result["rows"],
        {
            "conversation": lambda row: row["group"],
            "": lambda row: row["method"],
            "tokens run": lambda row: f"{row['tokens run']:,}",
            "step": lambda row: _seconds(row["step"]),
            "over one sequence at a time": lambda row: _times(row["time over that of one sequence at a time"]),
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
            "over one sequence": lambda row: f"{row['memory over that of one sequence']:.2f}×",
        },
    )


def rows(result: dict) -> list[list[str]]:
    """What sharing saves, and how long it takes to plan."""
    columns = {
        "conversations": lambda row: row["dataset"],
        "tokens of a row": lambda row: f"{row['max_tokens']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "tokens run": lambda row: f"{row['tokens run']:,}",
        "fewer by": lambda row: f"{row['fewer tokens by']:.2f}×",
        "fewer FLOPs by": lambda row: f"{row['fewer FLOPs by']:.2f}×" if "fewer FLOPs by" in row else MISSING,
        "rows (separate)": lambda row: f"{row['rows']:,} ({row['rows, separate']:,})",
        "planned in": lambda row: f"{row['seconds to plan']:.2f} s",
    }
    if any("seconds of a stream" in row for row in result["rows"]):
        columns["as a stream, with its rows made"] = lambda row: (
            f"{row['seconds of a stream']:.0f} s, {row['rows of a stream']:,} rows"
        )
    return _columns(result["rows"], columns)


def groups(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            "batch": lambda row: row["group"],
            "": lambda row: row["method"],
            "tokens run": lambda row: f"{row['tokens run']:,}",
            "step": lambda row: _seconds(row["step"]),
            "faster by": lambda row: _times(row["faster by"]),
            "predicted": lambda row: f"{row['predicted']:.2f}×",
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
        },
    )


def loss_memory(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            "loss": lambda row: row["loss"],
            "forward and backward": lambda row: _seconds(row["step"]),
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
            "of it the gradient of the output layer": lambda row: f"{row['gradient, MiB']:,.0f} MiB",
            "value": lambda row: f"{row['value']:.6f}",
        },
    )


STAGE = {
    "conversations": lambda row: f"{row['conversations']:,}, {row['dataset']}",
    "stage": lambda row: row["stage"],
    "time": lambda row: _seconds(row["seconds"]),
}


def preprocessing(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            **STAGE,
            "share": lambda row: f"{row['share']:.1%}",
            "tokens/s": lambda row: f"{row['tokens/s']:,}",
            "tokens N-pass / tree": lambda row: f"{row['tokens N-pass / tree']:.2f}",
            "padding of rows": lambda row: f"{row['padding of rows']:.1%}",
        },
    )


def recurrence(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            "layer": lambda row: row["layer"],
            "conversation": lambda row: row["conversation"],
            "": lambda row: row["method"],
            "tokens of the tree, of the passes": lambda row: f"{row['tokens of the tree']:,}, {row['tokens']:,}",
            "forward and backward": lambda row: _seconds(row["seconds"]),
            "faster than N-pass": lambda row: _times(row["N-pass over it"]),
            "of the ratio of tokens": lambda row: f"{row['of the ratio of tokens']:.2f}",
            "peak memory": lambda row: f"{row['peak MiB']:,.0f} MiB",
            "differs, output and gradients": lambda row: (
                f"{row['output differs by']:.0e}, {row['gradients differ by']:.0e}"
            ),
        },
    )


def overhead(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            **STAGE,
            "times rendering and tokenising": lambda row: _times(row["times rendering and tokenising"]),
        },
    )


def at_scale(result: dict) -> list[list[str]]:
    return _columns(
        result["rows"],
        {
            **STAGE,
            "of it after imports": lambda row: f"{row['of it until rows']:.3g} s",
            "rows": lambda row: f"{row['rows']:,}",
            "resident": lambda row: f"{row['resident MiB']:,.0f} MiB",
            "of it not of files": lambda row: f"{row['of it not of files MiB']:,.0f} MiB",
            "after 100 batches": lambda row: f"{row['after 100 batches MiB']:,.0f} MiB",
            "peak": lambda row: f"{row['peak MiB']:,.0f} MiB",
            "on disk": lambda row: f"{row['on disk MiB']:,.0f} MiB",
        },
    )


def accuracy(result: dict) -> list[list[str]]:
    table = _columns(
        result["rows"],
        {
            "": lambda row: row["model"],
            "loss, first and last step": lambda row: f"{row['first loss']:.4f}, {row['last loss']:.4f}",
            "held-out answers right": lambda row: f"{row['right']} of {row['answers']}",
            "by turn": lambda row: ", ".join(map(str, row["right by turn"])),
        },
    )
    if "same_texts" not in result:
        return table
    same = f"{result['same_texts']} texts the same"
    return [*table, ["difference", f"{result['largest_difference']:.1e} at most", same, ""]]


def kernel_configs(result: dict) -> list[list[str]]:
    """The three fastest of each kernel, and the pinned one."""
    kinds, chosen = {}, []
    for row in result["rows"]:
        kinds.setdefault((row["head size"], row["kernel"]), []).append(row)
    for rows in kinds.values():
        fastest = sorted((row for row in rows if "error" not in row), key=lambda row: row["time"]["median"])[:3]
        chosen += fastest + [row for row in rows if row["pinned"] and row not in fastest]
    return _columns(
        chosen,
        {
            "kernel": lambda row: row["kernel"],
            "head size": lambda row: str(row["head size"]),
            "queries, keys, warps, stages": lambda row: row["m, n, warps, stages"].strip("()"),
            "": lambda row: "pinned" if row["pinned"] else "",
            "time": lambda row: _milliseconds(row["time"]),
        },
    )


TABLES: dict[str, Callable[[dict], list[list[str]]]] = {
    table.__name__: table
    for table in (
        headline, side_by_side, npass, attention, growth, split, memory, rows, groups, loss_memory, preprocessing, overhead,
        at_scale, accuracy, kernel_configs, recurrence,
    )
}  # fmt: skip


MARKED = re.compile(rf"(<!-- table: ({'|'.join(TABLES)})_([\w+.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _measured(result: dict) -> list[dict]:
    return [row for row in result["rows"] if "error" not in row]


def _columns(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> list[list[str]]:
    """The heads, and a line for each row; of one that failed what there is."""

    def text(cell: Callable[[dict], str], row: dict) -> str:
        try:
            return cell(row)
        except KeyError:
            if "error" not in row:
                raise
            return MISSING

    return [list(columns), *([text(cell, row) for cell in columns.values()] for row in rows)]


def _by(rows: list[dict], outer: str, inner: str) -> dict:
    found = {}
    for row in rows:
        found.setdefault(row[outer], {})[row[inner]] = row
    return found


def _seconds(measured: dict) -> str:
    return f"{measured['median']:.3g} s" + _from_to(measured, ".3g")


def _times(ratio: dict) -> str:
    return f"{ratio['median']:.2f}×" + _from_to(ratio, ".2f")


def _from_to(measured: dict, form: str) -> str:
    least, greatest = (format(measured[which], form) for which in ("min", "max"))
    return f" ({least} to {greatest})" if least != greatest else ""


def _milliseconds(measured: dict) -> str:
    milliseconds = measured["median"] * 1e3
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text()
        after = render(before)
        page.write_text(after)
        print(f"{page.relative_to(HERE.parent)}: {'as it was' if after == before else 'written'}")
