"""Groups of completions of one prompt (preference pairs, GRPO groups): a padded batch with logits at completions, as TRL's
GRPO makes it, the same with `flexmask.share_prefixes`, and trees. The loss is the cross-entropy of the completions.

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

            def against_usual() -> dict:
                found = run({**settings, **what, "method": method})
                before = usual or found
                return found | {
                    "faster by": before["step"]["median"] / found["step"]["median"],
                    "predicted": before["TFLOP"] / found["TFLOP"],
                }

            found = bench.attempt(against_usual, group=group, method=method)
            if method == "padded batch" and found is None:
                break
            usual = usual or found


def draw(rows: list[dict], speed, memory) -> None:
    rows = [row for row in rows if "error" not in row]
    bars(speed, rows, "group", "method", "faster by", mark="predicted")
    bars(memory, rows, "group", "method", "peak MiB")
    speed.set(ylabel="times as fast as the padded batch (line: predicted)", title="training step")
    memory.set(ylabel="MiB beyond the weights", title="peak memory")
    speed.legend(fontsize=7)


if __name__ == "__main__":
    main()
