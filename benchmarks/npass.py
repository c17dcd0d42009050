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

            def against_ours() -> dict:
                found = run({**settings, **what, "method": method})
                ours_or_itself = ours or found
                slower = found["step"]["median"] / ours_or_itself["step"]["median"]
                more = found["TFLOP"] / ours_or_itself["TFLOP"]
                return found | {"one-pass is faster by": slower, "predicted": more, "of prediction": slower / more}

            found = bench.attempt(against_ours, group=group, method=method)
            if method == "one-pass" and found is None:
                break
            ours = ours or found


def draw(rows: list[dict], speed, memory) -> None:
    """Time over that of one-pass, with the prediction as a mark; and peak memory."""
    rows = [row for row in rows if "error" not in row]
    bars(speed, rows, "group", "method", "one-pass is faster by", mark="predicted")
    bars(memory, rows, "group", "method", "peak MiB")
    speed.set(ylabel="time over that of one-pass (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


if __name__ == "__main__":
    main()
