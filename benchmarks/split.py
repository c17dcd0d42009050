"""Time and memory of a training step on one conversation that is split into K parts: K = 1 is one-pass, K = N is N-pass.

For each number of `parts` the smallest max_tokens is taken that does with so many. Even with rows as short as the longest
pass, short passes share a part; so the most parts are fewer than the turns, and N-pass is a row of its own.

python benchmarks/split.py cpu
"""

from common import Benchmark, number
from training import measure_steps

SEQUENCES = "N-pass, sequences, logits at targets"


def main() -> None:
    bench = Benchmark("split", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.measured, *axes), width=13, panels=2)


def fill(bench: Benchmark) -> None:
    settings = vars(bench.settings)
    spec = {**settings, "conversations": 1, "turns": [settings["turns"]] * 2}
    rows = [{"parts": parts, "method": "one-pass"} for parts in settings["parts"]]
    specs = [{**spec, **row} for row in rows] + [{**spec, "parts": None, "method": SEQUENCES}]
    rows.append({"parts": settings["turns"], "method": SEQUENCES})
    for row, found in zip(rows, measure_steps(specs)):
        bench.add(**row, **found)


def draw(rows: list[dict], over_parts, trade) -> None:
    """Time and memory over K; and one against the other."""
    ours, others = ([row for row in rows if (row["method"] == "one-pass") == which] for which in (True, False))
    for value, style in (("step", "o-"), ("peak MiB", "s-"), ("tokens run", "^:")):
        numbers = [number(row[value]) for row in ours]
        over_parts.plot([row["parts"] for row in ours], [n / numbers[0] for n in numbers], style, label=value)
    over_parts.set(xlabel="parts K", ylabel="over those of the fewest parts", ylim=(0, None))
    over_parts.legend()
    trade.plot([row["peak MiB"] for row in ours], [row["step"]["median"] for row in ours], "o-")
    for row in ours:
        at = (row["peak MiB"], row["step"]["median"])
        trade.annotate(f"K = {row['parts']}", at, xytext=(5, 5), textcoords="offset points")
    for row in others:
        trade.plot(row["peak MiB"], row["step"]["median"], "kx", label=row["method"])
        trade.legend()
    trade.set(xlabel="peak MiB beyond the weights", ylabel="step, seconds", xlim=(0, None), ylim=(0, None))


if __name__ == "__main__":
    main()
