"""One pass against N passes, model by model, template by template, shape by shape.

The N passes are plain sequences through the library's own attention. Losses are taken from the logits, because the
library's loss works in float32.
"""

import contextlib
import copy

import numpy as np
import pytest
import torch
from models import FAMILIES, KeepFloat64, reference_attention, tiny
from reference import conversation_passes
from templates import CHAT, PLAIN, TOOL_LOOP, TOOLS, answer, call, tokenizer, user

from flexmask import OnePassCollator, Pass, TokenTree, render_passes
from flexmask.packing import join


class Vocabulary:
    pad_token_id = 0

    def __len__(self):
        return 512


def one_pass(model, conversations, in_one_row=TokenTree.concat):
    """Per-token losses of every pass, from one row that holds all conversations; gradients of their sum."""
    row = in_one_row([TokenTree.from_passes(passes) for passes in conversations])
    batch = OnePassCollator(Vocabulary())([row])
    batch.pop("target_weight", None)  # of tokens that several passes supervise; each has its losses here
    logits = model(**batch).logits[0]
    losses = row.per_pass(torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="none"))
    torch.cat(losses).sum().backward()
    return [x.detach() for x in losses], gradients(model)


def n_passes(model, conversations):
    found = []
    for p in (p for passes in conversations for p in passes):
        ids = torch.from_numpy(np.asarray(p.input_ids))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        supervised = torch.from_numpy(np.asarray(p.loss_mask))[1:]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[supervised]
        losses.sum().backward()
        found.append(losses.detach())
    return found, gradients(model)


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def differences(family, conversations, dtype, in_one_row=TokenTree.concat, **overrides):
    """(largest relative difference of a per-token loss, largest gradient difference relative to the largest)."""
    model = tiny(family, dtype, **overrides)
    with KeepFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        model.set_attn_implementation("flexmask")
        losses, grads = one_pass(model, conversations, in_one_row)
        model.set_attn_implementation(reference_attention(family))
        expected_losses, expected_grads = n_passes(model, conversations)
    assert [len(x) for x in losses] == [len(x) for x in expected_losses]
    losses, expected_losses = torch.cat(losses), torch.cat(expected_losses)
    assert set(grads) == set(expected_grads)
    largest = max(g.abs().max() for g in expected_grads.values())
    return (
        ((losses - expected_losses).abs() / expected_losses).max().item(),
        max(((grads[name] - g).abs().max() / largest).item() for name, g in expected_grads.items()),
    )


def shapes():
    """Conversations of every shape the issue names, as passes."""
    rng = np.random.default_rng(0)
    qwen = tokenizer("qwen3")
    like_the_response = [
        user("Q?"),
        answer("The answer is 42.", "The answer is 41. No, 42."),
        user("Why?"),
        answer("Hm."),
    ]
    system, summary, *parts = (rng.integers(1, 512, n) for n in (11, 6, *[5] * 12))

    def answered(*context):
        """A pass of what is given, the last part supervised."""
        ids = np.concatenate(context)
        return Pass(ids, np.arange(len(ids)) >= len(ids) - len(context[-1]))

    return {
        "samples of one prompt at two turns": [
            [answered(system, parts[0], x) for x in parts[1:5]]
            + [answered(system, parts[0], parts[1], parts[5], x) for x in parts[6:9]]
        ],
        "rollouts that fork inside an answer": [
            [
                answered(system, np.concatenate([parts[0], x]))
                for x in (parts[1], parts[2], np.append(parts[1], parts[3]))
            ]
        ],
        "context summarised": [
            [answered(system, *parts[:3]), answered(system, *parts[:5]), answered(system, summary, *parts[3:8])]
        ],
        "oldest context dropped": [[answered(system, *parts[i : i + 4]) for i in range(0, 8, 2)]],
        "1 turn": [conversation_passes(rng, 1, 9, 14, 5, 512)],
        "2 turns": [conversation_passes(rng, 2, 9, 14, 5, 512)],
        "24 turns": [conversation_passes(rng, 24, 5, 7, 3, 512)],
        "longer than a block": [conversation_passes(rng, 4, 50, 120, 40, 512)],
        "many in a row": [conversation_passes(rng, n, 6, 9, 4, 512) for n in (1, 5, 2, 3, 1)],
        "no reasoning": [render_passes(PLAIN, qwen)],
        "some without reasoning": [render_passes([CHAT[0], *CHAT[1:3], *PLAIN[3:5], *CHAT[5:]], qwen)],
        "empty reasoning": [render_passes([m | {"reasoning_content": ""} for m in PLAIN], qwen)],
        "system prompt": [render_passes(CHAT, qwen)],
        "tool loop": [render_passes(TOOL_LOOP, qwen, tools=TOOLS)],
        "reasoning begins like the response": [render_passes(like_the_response, qwen)],
    }


SHAPES = shapes()
CONVERSATIONS = [*SHAPES["many in a row"], *SHAPES["longer than a block"], *SHAPES["system prompt"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family):
    """The issue's bounds: losses 1e-10 relative, gradients 1e-8 relative to the largest."""
    loss, gradient = differences(family, CONVERSATIONS, torch.float64)
    assert loss <= 1e-10 and gradient <= 1e-8, f"loss {loss:.1e}, gradient {gradient:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family):
    """Losses within the issue's bound; gradients as far as float32 rounding goes (float64 above is the proof)."""
    loss, gradient = differences(family, CONVERSATIONS, torch.float32)
    assert loss <= 1e-5 and gradient <= 1e-4, f"loss {loss:.1e}, gradient {gradient:.1e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_conversation(shape):
    loss, gradient = differences("Gemma3", SHAPES[shape], torch.float64)
    assert loss <= 1e-10 and gradient <= 1e-8, f"loss {loss:.1e}, gradient {gradient:.1e}"


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_conversations_that_begin_alike_in_one_tree(family):
    """Samples of a conversation, one of them twice, and another conversation behind the same system prompt, against each pass
    of each conversation by itself."""
    rng = np.random.default_rng(0)
    system = rng.integers(0, 512, 150)

    def behind(context, passes):
        return [
            Pass(np.append(context, p.input_ids), np.append(np.zeros(len(context), bool), p.loss_mask)) for p in passes
        ]

    sampled, other = (behind(system, conversation_passes(rng, n, 30, 40, 20, 512)) for n in (3, 2))
    again = [
        *sampled[:-1],
        behind(np.asarray(sampled[-1].input_ids)[:-50], conversation_passes(rng, 1, 1, 30, 9, 512))[0],
    ]
    conversations = [sampled, again, sampled, other]
    row = join([TokenTree.from_passes(passes) for passes in conversations])
    assert len(row) < 0.6 * sum(len(TokenTree.from_passes(passes)) for passes in conversations)
    loss, gradient = differences(family, conversations, torch.float64, join)
    assert loss <= 1e-10 and gradient <= 1e-8, f"loss {loss:.1e}, gradient {gradient:.1e}"


LONG_TOOL_LOOP = [
    *TOOL_LOOP,
    user("More?"),
    call(16, 1, "16 + 1."),
    {"role": "tool", "content": "17"},
    answer("17.", "Ok."),
]
TEMPLATES = {
    "qwen3": ("qwen3", CHAT, {}),
    "qwen3 with tools": ("qwen3", LONG_TOOL_LOOP, {"tools": TOOLS}),
    "qwen3 without thinking": ("qwen3", PLAIN, {"enable_thinking": False}),
    "qwen3.5": ("qwen3_5_think", CHAT, {}),
    "glm-4.5": ("glm4moe", CHAT, {}),
    "glm-4.5 with tools": ("glm4moe", LONG_TOOL_LOOP, {"tools": TOOLS}),
    "gpt-oss": ("gptoss", CHAT, {}),
    "gpt-oss with tools": ("gptoss", LONG_TOOL_LOOP, {"tools": TOOLS}),
    "deepseek-r1 distill": ("deepseek_r1_distill", CHAT, {}),
    "llama 3": ("llama3", PLAIN, {}),
    "llama 3 with a reasoning format": ("llama3", CHAT, {"reasoning_format": "<think>{reasoning}</think>"}),
    "without reasoning": ("qwen2_5", PLAIN, {}),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(template):
    family, messages, options = TEMPLATES[template]
    passes = render_passes(copy.deepcopy(messages), tokenizer(family), **options)
    tree = TokenTree.from_passes(passes)
    assert len(tree) < sum(len(p.input_ids) for p in passes)
    loss, gradient = differences("Qwen3", [passes], torch.float64)
    assert loss <= 1e-10 and gradient <= 1e-8, f"loss {loss:.1e}, gradient {gradient:.1e}"


def test_the_models_own_loss_is_the_mean_over_targets():
    """model(**batch).loss on an unmodified model, with and without the Trainer's num_items_in_batch."""
    model = tiny("Qwen3")
    losses, _ = one_pass(model, CONVERSATIONS)
    losses = torch.cat(losses)
    row = TokenTree.concat([TokenTree.from_passes(passes) for passes in CONVERSATIONS])
    batch = OnePassCollator(Vocabulary())([row])
    torch.testing.assert_close(model(**batch).loss, losses.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model(**batch, num_items_in_batch=10).loss, losses.sum() / 10, rtol=1e-6, atol=0)


def test_a_planted_leak_is_caught():
    """The comparison can fail: one key made visible to one branch too many."""
    passes = SHAPES["2 turns"][0]
    model = tiny("Qwen3", torch.float64)
    tree = TokenTree.from_passes(passes)
    batch = OnePassCollator(Vocabulary())([tree])
    right = model(**batch).logits
    leaf = int(np.flatnonzero(tree.subtree_end < len(tree))[-1])
    ends = batch["subtree_end"].clone()
    ends[0, : leaf + 1] = ends[0, : leaf + 1].clamp(min=len(tree))
    wrong = model(**batch | {"subtree_end": ends}).logits
    assert (right - wrong).abs().max() > 1e-4


# What the published code gets wrong, each pinned down by a comparison that the fault fails.


def test_first_generated_token_is_predicted_from_the_prompt_and_not_from_its_left_neighbour():
    """Published fault: one-token label shift in the row; the first target of a branch is read from the history copy."""
    rng = np.random.default_rng(1)
    passes = conversation_passes(rng, 3, 9, 14, 5, 512)
    tree = TokenTree.from_passes(passes)
    first_of_branch = [int(x[0]) for x in tree.per_pass(np.arange(tree.num_targets))]
    last_of_prompt = [p.input_ids[np.argmax(p.loss_mask) - 1] for p in passes]
    assert tree.input_ids[tree.target_index[first_of_branch]].tolist() == last_of_prompt

    model = tiny("Qwen3", torch.float64)
    batch = OnePassCollator(Vocabulary())([tree])
    right = torch.nn.functional.cross_entropy(model(**batch).logits[0], batch["labels"][0], reduction="none")
    targets = np.array([np.flatnonzero((tree.input_ids == t) & (np.arange(len(tree)) > i))[0] for i, t in
                        zip(tree.target_index, tree.target_ids, strict=True)])  # fmt: skip
    shifted = batch | {"logits_to_keep": torch.from_numpy(targets - 1)}
    wrong = torch.nn.functional.cross_entropy(model(**shifted).logits[0], batch["labels"][0], reduction="none")
    changed = ((right - wrong).abs() > 1e-6).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(first_of_branch), "the shift is wrong exactly where a branch begins"


def test_every_turn_is_trained_once_and_the_last_is_not_duplicated():
    """Published faults: a turn without reasoning is never trained; the last turn is duplicated for nothing."""
    passes = render_passes([*CHAT[:3], *PLAIN[3:5], *CHAT[5:]], tokenizer("qwen3"))
    tree = TokenTree.from_passes(passes)
    assert tree.num_targets == sum(int(np.sum(p.loss_mask)) for p in passes)
    last = np.asarray(passes[-1].input_ids)
    text = tokenizer("qwen3").decode(tree.input_ids)
    assert text.count("Answer three.") == 1 and text.count("Answer two.") == 2 and len(last) <= len(tree)


def test_history_and_target_may_be_different_tokens():
    """Published fault: response tokens are copied, which is wrong where history ends a message differently."""
    tok = tokenizer("gptoss")
    passes = render_passes(CHAT, tok)
    tree = TokenTree.from_passes(passes)
    stop, end = (tok.convert_tokens_to_ids(t) for t in ("<|return|>", "<|end|>"))
    assert (tree.target_ids == stop).sum() == 3, "each answer ends with the token that stops generation"
    history = np.ones(len(tree), bool)
    for path_end in np.flatnonzero(tree.input_ids == stop):
        history[path_end] = False
    assert (tree.input_ids[history] == end).sum() > 3 and stop not in tree.input_ids[history]


def test_a_row_is_as_long_as_its_tokens_and_no_mask_is_dense():
    """Published fault: a dense (batch, 1, L, L) mask for every batch."""
    tree = TokenTree.from_passes([Pass(np.arange(300), np.arange(300) > 0)])
    batch = OnePassCollator(Vocabulary())([tree])
    assert max(tensor.numel() for tensor in batch.values()) == 384
