"""Draw the mask of a made-up conversation, its parts named: the picture of the README.

python examples/mask_picture.py docs/mask.png
"""

import sys

import numpy as np

from flexmask import Pass, TokenTree
from flexmask.inspect import draw_mask


def main(path: str, turns: int = 4, h: int = 120, t: int = 200, r: int = 100) -> None:
    context, passes, names = [], [], []

    def part(name: str, tokens: int) -> list[int]:
        """New token ids, so that each token says which part it belongs to."""
        names.extend([name] * tokens)
        return list(range(len(names) - tokens, len(names)))

    for i in range(1, turns + 1):
        context = context + part(f"h{i}", h)
        thought, response = part(f"t{i}", t), part(f"r{i}", r)
        ids = np.array(context + thought + response)
        passes.append(Pass(ids, np.arange(len(ids)) >= len(context)))
        context = context + response
    tree = TokenTree.from_passes(passes)
    draw_mask(tree, path, labels=[names[i] for i in tree.input_ids.tolist()])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mask.png")
