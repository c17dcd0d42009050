"""A training step (forward, backward, optimiser) on the same conversations: one-pass, and every form of N-pass in use.

Every row has the time beside the prediction, which is the ratio of counted FLOPs (`flexmask.cost`): "of prediction" is
(time / time of one-pass) / (FLOPs / FLOPs of one-pass). On a CPU each method runs in a process of its own.

python benchmarks/npass.py cpu
"""

import numpy as np
from common import Benchmark, machine
from training import METHODS, run


def main() -> None:
    bench = Benchmark("npass", __doc__)
    settings = bench.settings
    print(machine())
    for group, what in settings.groups.items():
        common = vars(settings) | what
        common.pop("groups")
        ours = None
        for method in settings.methods or METHODS:
            try:
                found = run(common | {"method": method})
            except Exception as error:
                bench.add(group=group, method=method, error=f"{type(error).__name__}: {str(error)[-300:]}")
                continue
            ours = ours or found
            slower = found["step"]["median"] / ours["step"]["median"]
            more = found["TFLOP"] / ours["TFLOP"]
            bench.add(
                group=group, method=method, **found,
                **{"one-pass is faster by": slower, "predicted": more, "of prediction": slower / more},
            )  # fmt: skip
    bench.plot(lambda *axes: draw(bench.rows, *axes), width=13, panels=2)
    print("saved", bench.path.name)


def draw(rows: list[dict], speed, memory) -> None:
    """Speed of one-pass over each method, with the prediction as a mark; and peak memory."""
    rows = [row for row in rows if "error" not in row]
    groups, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "method"))
    for i, method in enumerate(methods):
        of_method = {row["group"]: row for row in rows if row["method"] == method}
        at = np.arange(len(groups)) + (i - len(methods) / 2 + 0.5) * 0.8 / len(methods)
        for axis, key in ((speed, "one-pass is faster by"), (memory, "peak MiB")):
            axis.bar(at, [of_method.get(g, {}).get(key, 0) for g in groups], 0.8 / len(methods), label=method)
        speed.plot(at, [of_method.get(g, {}).get("predicted", np.nan) for g in groups], "k_", markersize=12)
    speed.set(ylabel="time over that of one-pass (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    for axis in (speed, memory):
        axis.set_xticks(range(len(groups)), groups, fontsize=7)
    speed.legend(fontsize=7)


if __name__ == "__main__":
    main()
