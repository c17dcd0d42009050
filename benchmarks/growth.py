"""How time and memory of a training step grow with the number of turns, and the exponents of that growth.

The exponents are slopes of a straight line through the points of at least `fit_from` turns, both axes logarithmic.

python benchmarks/growth.py cpu
"""

import numpy as np
from common import Benchmark
from training import measure_steps


def main() -> None:
    bench = Benchmark("growth", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench, *axes), width=13, panels=3)


def fill(bench: Benchmark) -> None:
    settings = vars(bench.settings)
    for turns in settings["turns"]:
        spec = {**settings, "conversations": 1, "turns": [turns, turns], "fixed": True}
        specs = [{**spec, "method": method} for method in settings["methods"]]
        for method, found in zip(settings["methods"], measure_steps(specs)):
            bench.add(turns=turns, method=method, **found)


def exponent(rows: list[dict], value) -> float:
    return float(np.polyfit(np.log([row["turns"] for row in rows]), np.log([value(row) for row in rows]), 1)[0])


VALUES = {
    "step, seconds": lambda row: row["step"]["median"],
    "FLOPs, counted": lambda row: row["TFLOP"] * 1e12,
    "peak MiB beyond the weights": lambda row: row["peak MiB"],
}


def draw(bench: Benchmark, *axes) -> None:
    exponents = bench.more["exponents"] = {}
    for axis, (name, value) in zip(axes, VALUES.items()):
        for method in dict.fromkeys(row["method"] for row in bench.measured):
            rows = [row for row in bench.measured if row["method"] == method and value(row) > 0]
            fitted = [row for row in rows if row["turns"] >= bench.settings.fit_from]
            label = method
            if len(fitted) > 1:
                exponents.setdefault(method, {})[name] = power = exponent(fitted, value)
                label += f": turns^{power:.2f}"
            axis.loglog([row["turns"] for row in rows], [value(row) for row in rows], "o-", label=label)
        axis.set(xlabel="turns", ylabel=name)
        axis.legend(fontsize=7)
    bench.save()


if __name__ == "__main__":
    main()
