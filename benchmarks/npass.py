"""A training step (forward, backward, optimiser) on the same conversations: one-pass, and every form of N-pass in use.

Every row has the time beside the prediction, which is the ratio of counted FLOPs (`flexmask.cost`): "of prediction" is
(time / time of one-pass) / (FLOPs / FLOPs of one-pass). On a CPU the methods of a group take turns.

python benchmarks/npass.py cpu
"""

from common import Benchmark, ratio
from methods import METHODS
from training import against_first, draw_speed_and_memory

RATIO = "one-pass is faster by"


def main() -> None:
    bench = Benchmark("npass", __doc__)
    bench.run(
        lambda: against_first(bench, getattr(bench.settings, "methods", METHODS), ratios),
        lambda *axes: draw_speed_and_memory(bench.measured, RATIO, "time over that of one-pass", *axes),
        width=13,
        panels=2,
    )


def ratios(ours: dict, found: dict) -> dict:
    slower, more = ratio(found["step"], ours["step"]), found["TFLOP"] / ours["TFLOP"]
    return {RATIO: slower, "predicted": more, "of prediction": slower["median"] / more}


if __name__ == "__main__":
    main()
