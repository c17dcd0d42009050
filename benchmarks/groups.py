"""Groups of completions of one prompt (preference pairs, GRPO groups): the padded batch of a trainer such as TRL's, the
same with `flexmask.share_prefixes`, and trees.

python benchmarks/groups.py cpu
"""

from common import Benchmark, bars
from training import GROUP_METHODS, run


def main() -> None:
    bench = Benchmark("groups", __doc__)
    bench.run(lambda: fill(bench), lambda *axes: draw(bench.rows, *axes), width=13, panels=2)


def fill(bench: Benchmark) -> None:
    settings = vars(bench.settings)
    for group, what in settings["groups"].items():
        usual = None
        for method in GROUP_METHODS:
            found = run({**settings, **what, "method": method})
            usual = usual or found
            bench.add(
                group=group, method=method, **found,
                **{
                    "faster by": usual["step"]["median"] / found["step"]["median"],
                    "predicted": usual["TFLOP"] / found["TFLOP"],
                },
            )  # fmt: skip


def draw(rows: list[dict], speed, memory) -> None:
    bars(speed, rows, "group", "method", "faster by")
    bars(memory, rows, "group", "method", "peak MiB")
    speed.set(ylabel="times as fast as the padded batch", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


if __name__ == "__main__":
    main()
