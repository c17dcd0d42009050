"""Time and memory of a training step on one conversation that is split into K parts: K = 1 is one-pass, K = N is N-pass.

For each number of `parts` the smallest max_tokens is taken that does with so many. Even with rows as short as the longest
pass, short passes share a part; so the most parts are fewer than the turns, and N-pass is a row of its own.

python benchmarks/split.py cpu
"""

from common import Benchmark
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
    ours = [row for row in rows if row["method"] == "one-pass"]
    parts, seconds, memory = zip(*((row["parts"], row["step"]["median"], row["peak MiB"]) for row in ours))
    over_parts.plot(parts, [s / seconds[0] for s in seconds], "o-", label="step time")
    over_parts.plot(parts, [m / memory[0] for m in memory], "s-", label="peak memory")
    over_parts.plot(parts, [row["tokens run"] / ours[0]["tokens run"] for row in ours], "^:", label="tokens run")
    over_parts.set(xlabel="parts K", ylabel="over those of one part", ylim=(0, None))
    over_parts.legend()
    trade.plot(memory, seconds, "o-")
    for x, y, k in zip(memory, seconds, parts):
        trade.annotate(f"K = {k}", (x, y), xytext=(5, 5), textcoords="offset points")
    for row in rows[len(ours) :]:
        trade.plot(row["peak MiB"], row["step"]["median"], "kx", label=row["method"])
        trade.legend()
    trade.set(xlabel="peak MiB beyond the weights", ylabel="step, seconds", xlim=(0, None), ylim=(0, None))


if __name__ == "__main__":
    main()
