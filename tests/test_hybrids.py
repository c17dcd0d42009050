"""Hybrid models: one pass against the library's own N passes, and what must stay as it was."""

import contextlib
import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from hybrids import FAMILIES, VOCABULARY, tiny
from models import KeepFloat64
from reference import conversation_passes
from transformers import AutoConfig

import flexmask
from flexmask import OnePassCollator, Pass, TokenTree
from flexmask.integrations import mixers


class Tokenizer:
    pad_token_id = 0

    def __len__(self):
        return VOCABULARY


def group(rng, prompt: int, *completions: int) -> list[Pass]:
    prompt = rng.integers(3, VOCABULARY, prompt)
    found = []
    for length in completions:
        ids = np.concatenate([prompt, rng.integers(3, VOCABULARY, length)])
        found.append(Pass(ids, np.arange(len(ids)) >= len(prompt)))
    return found


def row() -> tuple[list[Pass], TokenTree]:
    """Chains longer and shorter than a chunk and than the filter, forks within its width, at the first token, runs of one
    token; several trees, the last of which ends in leaves of one token, just before the padding."""
    rng = np.random.default_rng(0)
    conversations = [
        conversation_passes(rng, 3, 14, 70, 20, vocab=VOCABULARY),
        conversation_passes(rng, 4, 2, 3, 1, vocab=VOCABULARY),
        group(rng, 1, 1, 30, 2),
        group(rng, 9, 1, 1, 1, 40),
    ]
    passes = [p for of in conversations for p in of]
    return passes, TokenTree.concat([TokenTree.from_passes(of) for of in conversations])


def one_pass(model, tree) -> torch.Tensor:
    """The losses of targets, pass by pass, after a backward of their sum."""
    batch = OnePassCollator(Tokenizer())([tree])
    targets = batch.pop("shift_labels")[0]
    del batch["labels"]
    losses = torch.nn.functional.cross_entropy(model(**batch).logits[0], targets, reduction="none")
    losses.sum().backward()
    return torch.cat(tree.per_pass(losses.detach()))


def n_pass(model, passes) -> torch.Tensor:
    found = []
    for p in passes:
        ids, mask = torch.from_numpy(np.asarray(p.input_ids)), torch.from_numpy(np.asarray(p.loss_mask))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]]
        losses.sum().backward()
        found.append(losses.detach())
    return torch.cat(found)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def both(model) -> tuple:
    passes, tree = row()
    losses = one_pass(model, tree)
    ours = gradients(model)
    model.set_attn_implementation("sdpa")
    expected = n_pass(model, passes)
    return losses, ours, expected, gradients(model)


def assert_same(losses, ours, expected, theirs, of_loss: float, of_gradient: float):
    assert ((losses - expected).abs() / expected).max() <= of_loss
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        assert (ours[name] - g).abs().max() <= of_gradient * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_float64(family):
    model = tiny(family, torch.float64)
    with KeepFloat64():
        assert_same(*both(model), 1e-10, 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_float32(family):
    assert_same(*both(tiny(family)), 1e-5, 1e-4)


KINDS = ("qwen3_5_text", "kimi_linear", "bamba", "falcon_h1", "lfm2")


@pytest.mark.parametrize("family", KINDS)
def test_checkpointing_and_autocast(family):
    _, tree = row()
    model = tiny(family)
    losses = one_pass(model, tree)
    plain = gradients(model)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(one_pass(model, tree), gradients(model), losses, plain, 1e-6, 1e-6)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = one_pass(model, tree)
    assert not torch.equal(rounded, losses)
    assert ((rounded - losses) / losses).abs().mean() < 0.02
    gradients(model)


@pytest.mark.parametrize("family", KINDS)
def test_compiled_without_a_graph_break(family):
    """By the compiler's front end alone; test_recurrence.py compiles the operators to the end."""
    _, tree = row()
    model = tiny(
        family, **({"first_k_dense_replace": 4} if family == "kimi_linear" else {})
    )  # a loop over experts breaks it
    losses = one_pass(model, tree)
    plain = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(one_pass(compiled, tree), gradients(model), losses, plain, 1e-5, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_tree_it_is_the_library(family):
    """Padded batches, evaluation and generation: bit by bit what they are with the library's own functions."""
    model = tiny(family).eval()
    model.set_attn_implementation("sdpa")
    mask = (torch.arange(20) >= torch.tensor([[0], [7], [13]])).long()
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0)) * mask

    def found():
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask).logits
            text = model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return padded, model(input_ids=ids).logits.detach(), text

    ours = found()
    module = sys.modules[type(model).__module__]
    replaced = {name: f for name, f in vars(module).items() if hasattr(f, "_flexmask")}
    assert replaced
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(module, name, function.__wrapped__)
        theirs = found()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_copies_pickles_and_adapters():
    from peft import LoraConfig, get_peft_model

    _, tree = row()
    model = tiny("qwen3_5_text")
    losses = one_pass(model, tree)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one_pass(other, tree), losses)
    adapted = get_peft_model(model, LoraConfig(target_modules=["in_proj_qkv", "out_proj", "q_proj"]))
    assert torch.equal(one_pass(adapted, tree), losses)


def test_a_tree_needs_no_use_cache_false():
    """The library fills a cache unless it is told not to, and a convolution with a cache reads more than the row."""
    _, tree = row()
    batch = OnePassCollator(Tokenizer())([tree])
    model = tiny("lfm2").eval()
    output = model(**batch)
    assert output.past_key_values is None
    with pytest.raises(ValueError, match="past_key_values"):
        model(**batch, past_key_values=flexmask_cache(model))


def flexmask_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


# ---------------------------------------------------------------------------------------------------- who must not be silent


def attention_of_another_library(module):
    def forward(hidden_states, **kwargs):
        return hidden_states, None

    module.forward = forward


def test_a_layer_that_does_not_ask_is_an_error():
    """An attention, a scan or a convolution that is replaced from outside would train in silence, and wrongly."""
    _, tree = row()
    model = tiny("qwen3_5_text")
    attention = model.model.layers[2].self_attn
    kept = attention.forward
    attention_of_another_library(attention)
    with pytest.raises(NotImplementedError, match=r"layers\.2\.self_attn \(Qwen3_5Attention\) did not ask"):
        one_pass(model, tree)
    attention.forward = kept
    module = sys.modules[type(model).__module__]
    for name, count in (("causal_conv1d_fn", 3), ("torch_chunk_gated_delta_rule", 3)):
        with pytest.MonkeyPatch.context() as patch:
            library = getattr(module, name).__wrapped__
            patch.setattr(module, name, lambda *args, library=library, **kwargs: library(*args, **kwargs))
            with pytest.raises(NotImplementedError, match=f"{count} of {count} layers that call {name}"):
                one_pass(model, tree)


def test_a_layer_that_is_put_in_place_of_another_is_an_error():
    class Other(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    _, tree = row()
    model = tiny("qwen3_5_text")
    model.model.layers[2].self_attn = Other()
    with pytest.raises(NotImplementedError, match=r"layers\.2 \(Qwen3_5DecoderLayer\)"):
        one_pass(model, tree)


def test_an_attention_model_is_watched_too():
    import models

    _, tree = row()
    model = models.tiny("Qwen3")
    attention_of_another_library(model.model.layers[1].self_attn)
    with pytest.raises(NotImplementedError, match=r"layers\.1\.self_attn \(Qwen3Attention\) did not ask"):
        one_pass(model, tree)


@pytest.mark.parametrize(
    ("name", "value"), [("seq_idx", torch.zeros(1, 256, dtype=torch.int32)), ("cu_seq_lens_q", torch.tensor([0, 256]))]
)
def test_packed_sequences_beside_a_tree_are_refused(name, value):
    _, tree = row()
    batch = OnePassCollator(Tokenizer())([tree])
    with pytest.raises(ValueError, match=f"{name} beside subtree_end"):
        tiny("qwen3_5_text")(**batch, **{name: value})


@pytest.mark.parametrize(
    ("family", "reason"),
    [("jamba", "Mamba 1"), ("zamba", "Mamba 1"), ("minimax", "code of their own"), ("mamba2", "position_ids")],
)
def test_refused_with_the_reason(family, reason):
    with pytest.raises(NotImplementedError, match=f"{family} cannot be trained.*{reason}"):
        flexmask.integrations.transformers.check_config(AutoConfig.for_model(family))


def test_a_mixer_that_takes_no_keywords_is_refused(monkeypatch):
    """As that of LFM 2 was in transformers 5.17."""
    model = tiny("lfm2")
    mixer = type(model.model.layers[0].conv)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None):
        return causal_conv1d_fn(hidden_states)  # noqa: F821, only its name is read

    monkeypatch.setattr(mixer, "forward", forward)
    mixers._called.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.callback(mixers._called.cache_clear)
        assert "Lfm2ShortConv does not receive subtree_end" in mixers.refusal(type(model), ("conv",))
