"""Peak memory and time of a training step on one conversation: the whole tree, branch by branch, split, and N passes.

On a model with a small vocabulary, so that activations are most of what is there beyond the weights.

python benchmarks/memory.py cpu
"""

from common import Benchmark, ratio
from training import against_first, draw_speed_and_memory

TIME, MEMORY = "time over that of one sequence at a time", "memory over that of one sequence"
SEQUENCES = "N-pass, sequences, logits at targets"
METHODS = [SEQUENCES, "one-pass", "one-pass, branch by branch", "one-pass, branches of 1.5 passes", "one-pass, split"]


def main() -> None:
    bench = Benchmark("memory", __doc__)
    bench.run(
        lambda: against_first(bench, METHODS, ratios),
        lambda *axes: draw_speed_and_memory(bench.measured, TIME, TIME, *axes),
        width=13,
        panels=2,
    )


def ratios(alone: dict, found: dict) -> dict:
    return {
        TIME: ratio(found["step"], alone["step"]),
        MEMORY: found["peak MiB"] / alone["peak MiB"],
        "predicted": found["TFLOP"] / alone["TFLOP"],
    }


if __name__ == "__main__":
    main()
