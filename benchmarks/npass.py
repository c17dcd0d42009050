"""A training step (forward, backward, optimiser) on the same conversations: one-pass, and every form of N-pass in use.

Every row has the time beside the prediction, which is the ratio of counted FLOPs (`flexmask.cost`): "of prediction" is
(time / time of one-pass) / (FLOPs / FLOPs of one-pass). On a CPU each method runs in a process of its own.

python benchmarks/npass.py cpu
"""

from common import Benchmark, bars
from training import METHODS, run


def main() -> None:
    bench = Benchmark("npass", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.rows, *axes), width=13, panels=2)


def fill(bench: Benchmark) -> None:
    settings = vars(bench.settings)
    for group, what in settings["groups"].items():
        ours = None
        for method in METHODS:
            try:
                found = run({**settings, **what, "method": method})
            except Exception as error:
                bench.add(group=group, method=method, error=f"{type(error).__name__}: {str(error)[-300:]}")
                continue
            if method == "one-pass":
                ours = found
            if ours:
                slower = found["step"]["median"] / ours["step"]["median"]
                more = found["TFLOP"] / ours["TFLOP"]
                found |= {"one-pass is faster by": slower, "predicted": more, "of prediction": slower / more}
            bench.add(group=group, method=method, **found)


def draw(rows: list[dict], speed, memory) -> None:
    """Time over that of one-pass, with the prediction as a mark; and peak memory."""
    rows = [row for row in rows if "predicted" in row]
    bars(speed, rows, "group", "method", "one-pass is faster by")
    bars(memory, rows, "group", "method", "peak MiB")
    for bar, row in zip(
        (bar for container in speed.containers for bar in container),
        sorted(rows, key=lambda row: list(METHODS).index(row["method"])),
    ):
        speed.plot(bar.get_x() + bar.get_width() / 2, row["predicted"], "k_", markersize=12)
    speed.set(ylabel="time over that of one-pass (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


if __name__ == "__main__":
    main()
