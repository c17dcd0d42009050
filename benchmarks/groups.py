"""Groups of completions of one prompt (preference pairs, GRPO groups): a padded batch with logits at completions, as TRL's
GRPO makes it, the same with `flexmask.share_prefixes`, and trees. The loss is the cross-entropy of the completions.

python benchmarks/groups.py cpu
"""

from common import Benchmark, ratio
from methods import GROUP_METHODS
from training import against_first, draw_speed_and_memory


def main() -> None:
    bench = Benchmark("groups", __doc__)
    bench.run(
        lambda: against_first(bench, GROUP_METHODS, ratios),
        lambda *axes: draw_speed_and_memory(bench.measured, "faster by", "times as fast as the padded batch", *axes),
        width=13,
        panels=2,
    )


def ratios(usual: dict, found: dict) -> dict:
    faster, less = ratio(usual["step"], found["step"]), usual["TFLOP"] / found["TFLOP"]
    return {"faster by": faster, "predicted": less, "of prediction": faster["median"] / less}


if __name__ == "__main__":
    main()
