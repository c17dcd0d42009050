"""Weights, reductions, splits, log-probabilities and chunks against one sequence at a time, in plain PyTorch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, reference_attention, tiny
from peak_memory import needs_linux
from reference import conversation_passes, random_passes
from transformers import Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import flexmask.loss
from flexmask import Pass, TokenTree, split, tree_logprobs, tree_loss
from flexmask.collator import to_batch
from flexmask.loss import target_losses, target_weight


def losses_of(model, p: Pass):
    """Cross-entropies of the supervised tokens of a pass, run as a sequence of its own."""
    ids = torch.from_numpy(np.asarray(p.input_ids))[None]
    losses = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none"
    )
    return losses[torch.from_numpy(np.asarray(p.loss_mask, bool))[1:]]


def reduced(model, conversations, reduction):
    """The loss of N passes as the documentation puts it: a mean of tokens, of turns, or of conversations."""
    terms, weights = [], []
    for passes in conversations:
        tokens, token_weights = [], []
        for p in passes:
            losses = losses_of(model, p)
            weight = torch.ones(len(losses)) if p.token_weight is None else p.token_weight[p.loss_mask]
            weight = torch.as_tensor(weight, dtype=torch.float32)
            if reduction == "turn":
                terms.append(p.weight * (losses * weight).sum() / weight.sum())
                weights.append(p.weight)
            tokens.append(losses * weight * p.weight)
            token_weights.append(weight * p.weight)
        tokens, token_weights = torch.cat(tokens), torch.cat(token_weights)
        if reduction == "token":
            terms.append(tokens.sum())
            weights.append(token_weights.sum())
        if reduction == "conversation":
            terms.append(tokens.sum() / token_weights.sum())
            weights.append(1)
    return sum(terms) / sum(weights)


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def same_gradients(found, expected, tolerance=1e-5):
    largest = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        assert (found[name] - g).abs().max() <= tolerance * largest, name


def plain(model):
    model.set_attn_implementation(reference_attention("Qwen3"))
    return model


def weighted_conversations(seed=0):
    rng = np.random.default_rng(seed)
    conversations = [conversation_passes(rng, turns, 6, 9, 5, 500) for turns in (1, 3, 2)]
    return [
        [replace(p, weight=rng.integers(1, 9) / 4, token_weight=rng.random(len(p.input_ids))) for p in passes]
        for passes in conversations
    ]


@pytest.mark.parametrize("reduction", ["token", "turn", "conversation"])
@pytest.mark.parametrize("way", ["packed", "accumulated", "split"])
def test_reductions_are_those_of_n_passes(reduction, way):
    """Per message and per token weights; in one row, over several batches, and with every tree split into its passes."""
    conversations, model = weighted_conversations(), tiny("Qwen3")
    trees = [TokenTree.from_passes(passes, loss_reduction=reduction) for passes in conversations]
    rows = {
        "packed": [TokenTree.concat(trees)],
        "accumulated": trees,
        "split": [part for tree in trees for part in split(tree, tree.max_length)],
    }[way]
    assert len(rows) == {"packed": 1, "accumulated": 3, "split": 6}[way]
    batches = [to_batch(row) for row in rows]
    total = sum(target_weight(batch).sum() for batch in batches)
    loss = sum(tree_loss(model, batch, total) for batch in batches)
    loss.backward()
    found = gradients(model)
    expected = reduced(plain(model), conversations, reduction)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    same_gradients(found, gradients(model))


def test_a_token_supervised_twice_counts_both_weights():
    passes = [Pass([1, 2, 3, 4], [0, 0, 1, 1], 0.5), Pass([1, 2, 3, 9], [0, 0, 1, 1], 2.0)]
    tree, model = TokenTree.from_passes(passes), tiny("Qwen3")
    assert sorted(tree.target_weight.tolist()) == [0.5, 2.0, 2.5]
    torch.testing.assert_close(tree_loss(model, to_batch(tree)), reduced(plain(model), [passes], "token"))


@pytest.mark.parametrize("reduction", ["token", "turn", "conversation"])
def test_weights_of_zero_are_left_out_of_the_mean(reduction):
    """The bug guarded: 0/0 for a turn or a conversation without any weight."""
    passes, model = weighted_conversations()[1], tiny("Qwen3")
    without = TokenTree.from_passes([replace(passes[0], weight=0.0), *passes[1:]], loss_reduction=reduction)
    silent = [replace(p, token_weight=np.zeros(len(p.input_ids))) for p in passes[:2]]
    silent = TokenTree.from_passes(silent, loss_reduction=reduction)
    expected = reduced(plain(tiny("Qwen3")), [passes[1:]], reduction)
    for row in (without, TokenTree.concat([without, silent])):
        torch.testing.assert_close(tree_loss(model, to_batch(row)), expected, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(0, 1))
def test_losses_and_gradients_of_the_parts_add_up(seed, num_passes, generosity):
    """Random trees, budgets and weights: the sum over parts, each a batch of its own, is the whole."""
    rng = np.random.default_rng(seed)
    passes = [replace(p, weight=rng.integers(1, 9) / 4) for p in random_passes(rng, num_passes, vocab=500)]
    passes[0] = Pass(passes[0].input_ids, [False] + [True] * (len(passes[0].input_ids) - 1))
    tree, model = TokenTree.from_passes(passes), tiny("Qwen3", num_hidden_layers=1)
    whole = tree_loss(model, to_batch(tree), 1.0)
    whole.backward()
    expected = gradients(model)
    parts = split(tree, round(tree.max_length + generosity * (len(tree) - tree.max_length)))
    found = 0.0
    for part in parts:
        if part.num_targets:
            loss = tree_loss(model, to_batch(part), 1.0)
            loss.backward()
            found += loss.detach()
    torch.testing.assert_close(found, whole.detach(), rtol=1e-5, atol=1e-6)
    same_gradients(gradients(model), expected, 1e-4)


def plain_losses(model, batch):
    """Cross-entropies of the targets from the model's own logits, all at once."""
    ids, inputs = batch["shift_labels"][0], {name: x for name, x in batch.items() if "labels" not in name}
    return torch.nn.functional.cross_entropy(model(**inputs).logits[0].float(), ids, reduction="none")


class Library:
    """The implementation that computes losses where logits are large, which is everywhere here, and a count of its calls."""

    def __init__(self, name, patch):
        self.name, self.calls, self.reductions, choose = name, 0, set(), flexmask.loss._library_loss

        def library_loss(device, dtype):
            # Liger-Kernel is for GPUs; without one it runs in Triton's interpreter.
            losses = None if name == "chunks" else choose("cuda" if name == "liger" else "cpu", dtype)
            return losses and self.counted(losses)

        patch.setattr(flexmask.loss, "_library_loss", library_loss)
        patch.setattr(flexmask.loss, "CHUNK_LOGITS", 5 * 512)

    def counted(self, losses):
        def call(*args, **how):
            self.calls += 1
            self.reductions.add(how.get("reduction", "none"))
            return losses(*args, **how)

        return call


@pytest.fixture(params=["chunks", "torch", "liger"])
def library(request, monkeypatch):
    if request.param == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    if request.param == "liger":
        pytest.importorskip("liger_kernel", reason="Liger-Kernel is an optional dependency")
    return Library(request.param, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_large_logits_give_the_same_losses_and_gradients(family, library):
    """Gemma 2 caps its logits: that goes through its own output layer, in chunks."""
    model = tiny(family)
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 3, 6, 9, 5, 500)))
    expected = plain_losses(model, batch)
    weight = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    (expected * weight).sum().backward()
    expected_gradients = gradients(model)
    found = target_losses(model, batch)
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Chunks repeat the operations of the whole; the libraries sum in another order.
    same_gradients(gradients(model), expected_gradients, 1e-6 if library.name == "chunks" else 1e-5)
    assert library.calls == (library.name != "chunks" and family != "Gemma2")
    assert "forward" not in model.base_model.__dict__ and not model._forward_hooks, "the model is left as it was"


@pytest.mark.parametrize("weights", [None, [1.0, 0.25], [0.0, 1.0], [3.0, 0.5, 0.0, 1.0]])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_weighted_sums_of_large_logits(family, weights, library):
    """Of one weight or two the libraries sum, with gradients that are ready after the forward; of more, losses of targets."""
    model = tiny(family)
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 3, 6, 9, 5, 500)))
    count = batch["shift_labels"].shape[1]
    if weights is not None:
        batch["target_weight"] = torch.tensor(weights).repeat(count)[None, :count]
    plain = {name: x for name, x in batch.items() if name != "target_weight"}
    weight = target_weight(batch)
    expected = 0.3 * (plain_losses(model, plain) * weight).sum() / weight.sum()
    expected.backward()
    expected_gradients = gradients(model)
    found = 0.3 * tree_loss(model, batch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    same_gradients(gradients(model), expected_gradients, 1e-6 if library.name == "chunks" else 1e-5)
    fused = library.name != "chunks" and family != "Gemma2"
    different = {1.0} if weights is None else set(weights) - {0.0}  # those of weight 0 are not computed
    assert library.calls == fused * (len(different) if len(different) <= 2 else 1)
    assert library.reductions <= ({"none"} if len(different) > 2 else {"sum"})


@pytest.mark.parametrize("options", [{"logit_scale": 0.3}, {"logit_scale": 1.0}])
def test_a_scale_of_logits_is_kept(options, library):
    """Cohere scales its logits, and scales that are 1 are none."""
    from models import COMMON
    from transformers import CohereConfig, CohereForCausalLM

    config = {name: value for name, value in COMMON.items() if name != "head_dim"} | options
    torch.manual_seed(0)
    model = CohereForCausalLM._from_config(CohereConfig(**config), attn_implementation="flexmask").eval()
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    torch.testing.assert_close(target_losses(model, batch), plain_losses(model, batch), rtol=1e-6, atol=1e-6)
    assert library.calls == (library.name != "chunks" and options["logit_scale"] == 1)


def test_an_output_layer_of_zeros_does_not_pass_for_a_plain_one(library):
    """The bug guarded: with all logits zero a soft-cap or a scale cannot be seen, and its gradient would be lost."""
    model = tiny("Gemma2", tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    target_losses(model, batch)
    assert library.calls == 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_bias_of_the_output_layer_and_an_adapter_on_it_count(lora, library):
    """An adapter is no plain linear layer, so it goes through chunks."""
    from peft import LoraConfig, get_peft_model

    model = tiny("Qwen3", tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(512))
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    expected = plain_losses(model, batch)
    expected.sum().backward()
    expected_gradients = gradients(model)
    found = target_losses(model, batch)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    same_gradients(gradients(model), expected_gradients)
    assert library.calls == (library.name != "chunks" and not lora)


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_an_output_layer_that_is_changed_from_outside_is_no_plain_one(way, library):
    """The bug guarded: what a hook on the layer, or a forward put on it, does to logits was left out."""
    model = tiny("Qwen3")
    if way == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    else:
        plain_forward = model.lm_head.forward
        model.lm_head.forward = lambda states: plain_forward(states) * 0.5
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    torch.testing.assert_close(target_losses(model, batch), plain_losses(model, batch), rtol=1e-6, atol=1e-6)
    assert library.calls == 0


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_logits_that_are_changed_outside_the_model_are_refused(change, library):
    """The bug guarded: on rows of few targets the change counted, on others not."""
    model = tiny("Qwen3")

    def halved(output):
        output["logits"] = output.logits * 0.5
        return output

    if change == "hook":
        model.register_forward_hook(lambda module, args, output: halved(output))
    else:
        own = model.forward
        model.forward = lambda *args, **kwargs: halved(own(*args, **kwargs))
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    with pytest.raises(RuntimeError, match="something around Qwen3ForCausalLM changes its logits"):
        target_losses(model, batch)


class Unusual(Qwen3ForCausalLM):
    """As code from the hub is written: it asks the output layer for its dtype, and may call its body around its hooks."""

    around_hooks = False

    def forward(self, logits_to_keep=0, labels=None, **kwargs):
        body = self.model.forward if self.around_hooks else self.model
        states = body(**kwargs).last_hidden_state[:, logits_to_keep]
        return CausalLMOutputWithPast(logits=self.lm_head(states.to(self.lm_head.weight.dtype)).float() * 0.5)


@pytest.mark.parametrize("around_hooks", [False, True])
def test_unusual_models(around_hooks, library):
    """The second one has all logits at once, since what gave its states is not known."""
    torch.manual_seed(0)
    model = Unusual._from_config(tiny("Qwen3").config, attn_implementation="flexmask").eval()
    model.around_hooks = around_hooks
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    torch.testing.assert_close(target_losses(model, batch), plain_losses(model, batch), rtol=1e-6, atol=1e-6)
    assert library.calls == 0


def test_an_output_layer_of_its_own_weights_is_trained_under_autocast(library):
    """The bug guarded: of weights that were cast without gradients first, autocast's cache keeps a copy without them."""
    if library.name == "liger":
        pytest.skip("Triton's interpreter is wrong in bfloat16")
    found = []
    for chunk in (2**26, 5 * 512):
        flexmask.loss.CHUNK_LOGITS = chunk
        model = tiny("Qwen3", tie_word_embeddings=False)
        batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = tree_loss(model, batch, observe=lambda logits, targets: None)
        loss.backward()
        found.append(model.lm_head.weight.grad)
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm() and found[0].norm() > 0


def test_rows_through_a_compiled_model(library):
    """Losses in the place of logits, and nothing compiled anew for the next row."""
    torch._dynamo.reset()
    model = tiny("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    graphs, counted = [], torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for seed in range(4):
        batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(seed), 3, 6, 9, 5, 500)))
        torch.testing.assert_close(tree_loss(compiled, batch), tree_loss(model, batch), rtol=1e-6, atol=1e-6)
        graphs.append(counted["unique_graphs"] - before)
    assert graphs[1] == graphs[-1] <= 4, graphs
    torch._dynamo.reset()


def test_mixed_precision_of_accelerate_reaches_the_library(monkeypatch):
    """The bug guarded: Accelerate switches autocast on around the model's forward, and off before hooks on it run."""
    asked = []

    def library_loss(device, dtype):
        asked.append(dtype)
        return lambda states, weight, targets, bias, **how: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(states, weight, bias).float(), targets, reduction="none"
        )

    monkeypatch.setattr(flexmask.loss, "_library_loss", library_loss)
    monkeypatch.setattr(flexmask.loss, "CHUNK_LOGITS", 5 * 512)
    AcceleratorState._reset_state()  # of tests before this one in the same process
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tiny("Qwen3"))
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    expected, found = plain_losses(model, batch), target_losses(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32 and asked == [torch.bfloat16]


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="came with torch 2.13")
def test_chunks_of_one_target_at_least(monkeypatch):
    sizes = []
    original = torch.nn.functional.linear_cross_entropy

    def record(*args, options, **kwargs):
        sizes.append(options.batch_chunk_size)
        return original(*args, options=options, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", record)
    monkeypatch.setattr(flexmask.loss, "CHUNK_LOGITS", 100)
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    model = tiny("Qwen3")
    torch.testing.assert_close(target_losses(model, batch), plain_losses(model, batch), rtol=1e-6, atol=1e-6)
    assert sizes == [1]


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_sixteen_bits_give_losses_in_float32(way, library):
    """The bug guarded: PyTorch's fused loss rounds the losses of 16-bit states to 16 bits."""
    # Triton's interpreter is wrong in bfloat16, and LayerNorms of the library need its range in autocast.
    dtype = torch.float16 if library.name == "liger" else torch.bfloat16
    model = tiny("Qwen3", dtype if way == "weights" else torch.float32)
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        expected, found = plain_losses(model, batch), target_losses(model, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    found.sum().backward()
    assert library.calls == (library.name == "liger")


def test_the_libraries_are_chosen_by_device_and_dtype(monkeypatch):
    choose = flexmask.loss._library_loss
    for liger in (True, False):
        monkeypatch.setattr(flexmask.loss, "_has_liger", lambda liger=liger: liger)
        found = {(d, t): choose(d, t) is not None for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16)}
        torchs = hasattr(torch.nn.functional, "linear_cross_entropy")
        assert found == {
            ("cpu", torch.float32): torchs,
            ("cpu", torch.bfloat16): False,
            ("cuda", torch.float32): torchs or liger,
            ("cuda", torch.bfloat16): liger,
        }


def test_log_probabilities_of_each_pass():
    """And through gradient checkpointing, LoRA, and a wrapper around the model."""
    rng = np.random.default_rng(0)
    passes = conversation_passes(rng, 3, 6, 9, 5, 500)
    tree, model = TokenTree.from_passes(passes), tiny("Qwen3")
    found = tree.per_pass(tree_logprobs(model, tree))
    from_batch = tree.per_pass(tree_logprobs(model, to_batch(tree)))
    for p, logprobs, again in zip(passes, found, from_batch, strict=True):
        assert torch.equal(logprobs, again) and logprobs.requires_grad
        expected = torch.log_softmax(
            plain(tiny("Qwen3"))(input_ids=torch.from_numpy(p.input_ids)[None]).logits[0, :-1], -1
        )
        ids = torch.from_numpy(p.input_ids)[1:]
        expected = expected[torch.arange(len(ids)), ids][torch.from_numpy(p.loss_mask)[1:]]
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_chunks_inside_peft_checkpointing_and_a_wrapper(monkeypatch):
    from peft import LoraConfig, get_peft_model

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.inside = module, []

        def forward(self, **kwargs):
            output = self.module(**kwargs)
            self.inside.append(output.logits.shape[1])
            return output

    model = tiny("Qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    wrapper = Wrapper(get_peft_model(model, LoraConfig(target_modules="all-linear")).train())
    batch = to_batch(TokenTree.from_passes(conversation_passes(np.random.default_rng(0), 2, 6, 9, 5, 500)))
    tree_loss(wrapper, batch).backward()
    expected = gradients(wrapper)
    monkeypatch.setattr(flexmask.loss, "CHUNK_LOGITS", 5 * 512)
    tree_loss(wrapper, batch).backward()
    same_gradients(gradients(wrapper), expected, 1e-6)
    assert wrapper.inside == [batch["shift_labels"].shape[1], 1], "losses are computed inside the wrapper (DDP's hooks)"


def test_a_weighted_batch_is_refused_by_the_models_own_loss():
    batch = to_batch(TokenTree.from_passes([Pass([1, 2, 3], [0, 1, 1], 0.5)]))
    with pytest.raises(ValueError, match="target_weight, which the model's own loss would ignore; use"):
        tiny("Qwen3")(**batch)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": -1.0}, "pass 0: weights must be finite in float32 and not negative; weight is -1.0"),
        ({"weight": float("nan")}, "weights must be finite"),
        ({"weight": 1e39}, "weights must be finite in float32"),
        ({"token_weight": [1.0, float("inf"), 1.0]}, "weights must be finite"),
        ({"token_weight": [1.0, 1.0, -1.0]}, "weights must be finite in float32 and not negative"),
        ({"input_ids": [1.5, 2.5, 3.5]}, "pass 0: input_ids are float64, expected integers"),
        ({"token_weight": [1.0]}, r"token_weight has shape \(1,\) for 3 tokens"),
    ],
)
def test_bad_weights(change, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.from_passes([replace(Pass([1, 2, 3], [0, 1, 1]), **change)])
    with pytest.raises(ValueError, match="loss_reduction is 'mean', expected one of token, turn, conversation"):
        TokenTree.from_passes([Pass([1, 2, 3], [0, 1, 1])], loss_reduction="mean")


@needs_linux
@pytest.mark.parametrize("implementation", ["chosen", "chunks"])
def test_memory_of_the_loss_does_not_grow_with_the_targets(implementation):
    """A vocabulary of 50,000 and 3,000 targets: 572 MiB of logits, and as much again for each of their derivatives."""
    code = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from peak_memory import peak_bytes
from models import tiny
import flexmask.loss
from flexmask import Pass, TokenTree, tree_loss
from flexmask.collator import to_batch
flexmask.loss.CHUNK_LOGITS = 2**24  # smaller blocks would fragment the heap of the C library
if sys.argv[2] == "chunks":
    flexmask.loss._library_loss = lambda device, dtype: None
model = tiny("Qwen3", vocab_size=50_000)
def run(length):
    batch = to_batch(TokenTree.from_passes([Pass(np.arange(length), np.arange(length) > 0)]))
    return peak_bytes(lambda: tree_loss(model, batch).backward()) // 2**20
run(1_000)  # warm up
print(run(1_000), run(3_001))
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), implementation]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert many - few < 100, (few, many)
