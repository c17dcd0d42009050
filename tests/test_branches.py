"""A step branch by branch against the same step of the whole tree, which other tests hold against N passes."""

import hybrids
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KeepFloat64, tiny
from peak_memory import needs_linux, peak_bytes
from reference import conversation_passes, forest, random_parents
from test_architectures import tiny as hybrids_and_others
from test_transformers import Vocabulary, rows_of_unequal_size

from flexmask import (
    OnePassCollator,
    OnePassTrainer,
    OnePassTrainingArguments,
    Pass,
    TokenTree,
    backward_by_branches,
    branches,
    loss,
    tree_loss,
)
from flexmask.branches import _common, plan
from flexmask.collator import to_batch


def in_order(pieces, path=()):
    """(piece, the pieces that it continues), in the order in which they run."""
    for piece in pieces:
        yield piece, path
        yield from in_order(piece.inside, (*path, piece))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 4), st.floats(0, 1.2))
def test_pieces(seed, length, roots, generosity):
    """Every token once, after all its ancestors, which are in its piece or in those that it continues; and never more in memory
    than allowed."""
    parent = random_parents(np.random.default_rng(seed), length, roots)
    ends, positions, visible = forest(parent)
    budget = round(generosity * length)
    pieces = plan(ends, budget)
    alone = (parent < 0) & (ends == np.arange(length) + 1)
    seen = []
    for piece, path in in_order(pieces):
        before = [place for earlier in path for place in earlier.places.tolist()]
        assert sorted(before + piece.places.tolist()) == before + piece.places.tolist(), "as in the row"
        within = {*before, *piece.places.tolist()}
        assert len(within) <= max(budget, positions.max() + 1)
        assert all(within.issuperset(np.flatnonzero(visible[place])) for place in piece.places)
        seen += piece.places.tolist()
    assert sorted(seen) == np.flatnonzero(~alone).tolist()
    if (~alone).sum() <= budget:
        assert len(pieces) == (not alone.all())


def test_a_conversation_is_cut_into_its_history_and_its_turns():
    passes = conversation_passes(np.random.default_rng(0), 4, 10, 30, 5)
    tree = TokenTree.from_passes(passes)
    [history] = plan(tree.subtree_end, 0)
    assert len(history.places) == 3 * 10 + 2 * 5
    assert sorted(len(piece.places) for piece in history.inside) == [35, 35, 35, 50], "the last turn with its question"
    [history] = plan(tree.subtree_end, len(history.places) + 2 * 35)
    assert sorted(len(piece.places) for piece in history.inside) == [35, 50, 70]
    assert [len(piece.places) for piece in plan(tree.subtree_end, len(tree))] == [len(tree)]


def rows():
    rng = np.random.default_rng(0)
    turns, trunk = conversation_passes(rng, 5, 20, 40, 15, 512), rng.integers(0, 512, 150)
    forks = [
        [
            Pass(np.append(trunk[:at], rng.integers(0, 512, n)), np.arange(at + n) >= at, weight=n / 20)
            for at, n in group
        ]
        for group in ([(149, 30), (100, 70), (100, 20), (3, 90)], [(140, 3), (1, 1)])
    ]
    deep = [
        *forks[0],
        *(Pass(np.append(p.input_ids, [7] * 20), np.arange(len(p.input_ids) + 20) % 2) for p in forks[0]),
    ]
    trees = [TokenTree.from_passes(passes) for passes in (turns, forks[0], forks[1], deep)]
    return {"turns": trees[0], "forks": trees[1], "forest": TokenTree.concat(trees[:3]), "deep": trees[3]}


ROWS = rows()


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def whole(model, batch, total_weight=None):
    value = tree_loss(model, batch, total_weight)
    value.backward()
    return value.detach(), gradients(model)


def by_branches(model, batch, *given, **options):
    value = backward_by_branches(model, batch, *given, **options)
    return value, gradients(model)


def same(found, expected, of_loss, of_gradients):
    torch.testing.assert_close(found[0], expected[0], rtol=of_loss, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(g.abs().max() for g in expected[1].values())
    difference = max(((found[1][name] - g).abs().max() / largest).item() for name, g in expected[1].items())
    assert difference <= of_gradients, f"{difference:.1e}"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Gemma3", "Mistral", "Qwen3Moe"])
def test_losses_and_gradients_are_those_of_the_tree(family, row):
    """With windows, soft-cap and experts; padding at the end, weights, forks at any place, pieces in pieces."""
    model, batch = tiny(family, torch.float64), to_batch(ROWS[row])
    with KeepFloat64():
        expected = whole(model, batch)
        for tokens in (0, ROWS[row].max_length + 60):
            same(by_branches(model, batch, tokens_in_memory=tokens), expected, 1e-10, 1e-8)


def test_frozen_layers():
    model, batch = tiny("Qwen3", torch.float64), to_batch(ROWS["deep"])
    for part in (model.get_input_embeddings(), model.model.layers[0]):
        part.requires_grad_(False)
    same(by_branches(model, batch), whole(model, batch), 1e-6, 1e-6)


def test_pieces_padded_to_whole_blocks(monkeypatch):
    """As on a GPU: what is kept of a piece are its tokens, and not its padding."""
    monkeypatch.setattr(branches, "_QUERIES", {"cpu": 128})
    model, tokens = tiny("Gemma3", torch.float64), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    batch = to_batch(ROWS["deep"])
    with KeepFloat64():
        found = by_branches(model, batch)
        assert len(tokens) > 2 and all(n % 128 == 0 for n in tokens)
        same(found, whole(model, batch), 1e-10, 1e-8)


def test_llama4_whose_queries_are_scaled_by_their_positions():
    model, batch = hybrids_and_others("llama4_text").double(), to_batch(ROWS["turns"])
    for name in ("input_ids", "shift_labels"):
        batch[name] = batch[name] % model.config.vocab_size
    same(by_branches(model, batch), whole(model, batch), 1e-6, 1e-6)


@pytest.mark.parametrize("family", ["GptOss", "Qwen3"])
def test_in_float32(family):
    """gpt-oss with its sinks, whose experts have no float64; and keys that flash reads."""
    model, batch = tiny(family, head_dim=16), to_batch(ROWS["forest"])
    same(by_branches(model, batch), whole(model, batch), 1e-6, 1e-5)


def test_every_token_is_computed_once():
    model, tokens = tiny("Qwen3"), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.extend(args[0][0].tolist()))
    backward_by_branches(model, to_batch(ROWS["forest"]))
    assert sorted(tokens) == sorted(ROWS["forest"].input_ids.tolist())


def test_the_sum_is_divided_by_the_weight_that_is_given():
    model, batch = tiny("Qwen3", torch.float64), to_batch(ROWS["forest"])
    same(by_branches(model, batch, 12.5), whole(model, batch, 12.5), 1e-10, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_under_gradient_checkpointing(family, reentrant):
    model, batch = tiny(family), to_batch(ROWS["deep"])
    expected = whole(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    same(by_branches(model, batch), expected, 1e-6, 1e-5)


def test_large_logits_in_chunks(monkeypatch):
    model, batch = tiny("Qwen3", torch.float64), to_batch(ROWS["forest"])
    expected = whole(model, batch)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 7 * 512)
    same(by_branches(model, batch), expected, 1e-6, 1e-5)
    monkeypatch.setattr(loss, "_library_loss", lambda device, dtype: None)
    same(by_branches(model, batch), expected, 1e-6, 1e-6)


def test_compiled():
    """The graph breaks at every layer, and what comes of it is right."""
    model, batch = tiny("Qwen3", num_hidden_layers=1), to_batch(ROWS["turns"])
    expected = whole(model, batch)
    torch._dynamo.reset()
    model.compile(backend="eager")
    same(by_branches(model, batch), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj"], ["v_proj"]])
def test_adapters(modules):
    """With those of queries alone the keys of the first layer have no gradient."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=modules, init_lora_weights=False)
    model = get_peft_model(tiny("Qwen3", torch.float64), lora)
    batch = to_batch(ROWS["turns"])
    expected = whole(model, batch)
    assert all("lora" in name for name in expected[1])
    same(by_branches(model, batch), expected, 1e-6, 1e-6)


def test_autocast():
    """As far from float32 as the whole tree under autocast is, at most twice."""
    model, batch = tiny("Qwen3"), to_batch(ROWS["forest"])
    _, exact = whole(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = [way(model, batch)[1] for way in (by_branches, whole)]
    largest = max(g.abs().max() for g in exact.values())
    error = [max(((of[name] - g).abs().max() / largest).item() for name, g in exact.items()) for of in found]
    assert error[0] <= 2 * error[1]


def test_gradients_of_many_branches_are_added_up_in_float32():
    """In bfloat16 a hundred branches on one beginning: rounding each sum to 8 bits would lose most of them."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 512, 40)
    passes = [Pass(np.append(trunk, rng.integers(0, 512, 4)), np.arange(44) >= 40) for _ in range(100)]
    batch = to_batch(TokenTree.from_passes(passes))
    model = tiny("Qwen3")
    _, exact = whole(model, batch)
    model = model.bfloat16()
    name = "model.layers.0.self_attn.v_proj.weight"
    found = [way(model, batch)[1][name].float() for way in (by_branches, whole)]
    error = [((of - exact[name]).norm() / exact[name].norm()).item() for of in found]
    assert error[0] <= 2 * error[1]


@needs_linux
def test_memory_is_that_of_the_longest_pass():
    """A model whose activations are most of its memory; six branches on a history."""
    passes = conversation_passes(np.random.default_rng(0), 6, 60, 600, 60, 512)
    tree = TokenTree.from_passes(passes)
    model = tiny("Qwen3", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64)
    batch = to_batch(tree)
    longest = to_batch(TokenTree.from_passes(passes[-1:]))
    whole(model, longest)  # what the first step alone allocates
    alone, branches, tree_peak = (
        peak_bytes(lambda step=step, of=of: step(model, of))
        for step, of in ((whole, longest), (by_branches, batch), (whole, batch))
    )
    assert len(tree) > 3 * len(passes[-1].input_ids)
    print(alone, branches, tree_peak)
    assert branches < 1.15 * alone < 0.5 * tree_peak


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(tmp_path, accumulation):
    def trained(tokens_in_memory):
        arguments = OnePassTrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
            gradient_accumulation_steps=accumulation, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
            tokens_in_memory=tokens_in_memory,
        )  # fmt: skip
        trainer = OnePassTrainer(
            tiny("Qwen3"),
            arguments,
            train_dataset=rows_of_unequal_size("turn"),
            data_collator=OnePassCollator(Vocabulary()),
        )
        trainer.train()
        return trainer.model.state_dict(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    (weights, losses), (expected, expected_losses) = trained(0), trained(None)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


def test_the_shape_that_holds_all_others():
    a, b = (((), ()), ()), ((((),),), (), ())
    assert _common([a, b]) == ((((),), ()), (), ()) == _common([b, a])
    assert _common([(), ()]) == ()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: hybrids.tiny("qwen3_5_text", vocab_size=512), "recurrent or convolutional layers"),
        (lambda: tiny("Qwen3Moe", output_router_logits=True), "router's loss"),
    ],
)
def test_what_cannot_be_cut_is_refused(change, message):
    with pytest.raises(NotImplementedError, match=message):
        backward_by_branches(change(), to_batch(ROWS["turns"]))


def test_a_batch_with_more_in_it_is_refused():
    batch = to_batch(ROWS["turns"])
    with pytest.raises(ValueError, match="the batch has token_type_ids, of which nobody knows how to cut it"):
        backward_by_branches(tiny("Qwen3"), batch | {"token_type_ids": batch["input_ids"]})


def test_a_layer_that_attends_twice_is_refused():
    """Its keys would be taken for one another's."""
    model = tiny("Qwen3")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(NotImplementedError, match="attends several times"):
        backward_by_branches(model, to_batch(ROWS["turns"]))
