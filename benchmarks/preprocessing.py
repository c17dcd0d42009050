"""Where the time goes between a chat file and packed rows: rendering and tokenising, tree building, packing.

python benchmarks/preprocessing.py FILE.jsonl --tokenizer FOLDER --reasoning_format '<think>\\n{reasoning}\\n</think>\\n\\n'
"""

import argparse
import time

from common import save, table
from transformers import AutoTokenizer

from flexmask import TokenTree, pack, render_passes
from flexmask.data import load_conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--reasoning_format")
    parser.add_argument("--max_tokens", type=int, default=8192)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    reasoning_format = args.reasoning_format and args.reasoning_format.replace("\\n", "\n")
    seconds = {}

    def stage(name, function):
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    conversations = stage("load and check", lambda: load_conversations(args.dataset_name))
    passes = stage(
        "render and tokenise",
        lambda: [render_passes(c["messages"], tokenizer, reasoning_format=reasoning_format) for c in conversations],
    )
    trees = stage("build trees", lambda: [TokenTree.from_passes(p) for p in passes])
    rows = stage("pack", lambda: pack(trees, args.max_tokens))

    tokens = sum(map(len, trees))
    n_pass = sum(int(tree.pass_lengths.sum()) for tree in trees)
    ours = (seconds["build trees"] + seconds["pack"]) / seconds["render and tokenise"]
    found = [{"stage": name, "seconds": s, "tokens/s": round(tokens / s)} for name, s in seconds.items()]
    print(table(found))
    print(f"{len(trees)} conversations, {n_pass} tokens in passes, {tokens} in trees ({n_pass / tokens:.2f}x)")
    print(f"{len(rows)} rows of {args.max_tokens}, {1 - tokens / (len(rows) * args.max_tokens):.2%} padding")
    print(f"trees and packing take {ours:.1%} of the time of rendering and tokenising")
    more = {"conversations": len(trees), "tokens_n_pass": n_pass, "tokens": tokens, "rows_packed": len(rows)}
    print("saved", save("preprocessing", found, share_of_trees_and_packing=ours, **more).name)


if __name__ == "__main__":
    main()
