"""Hybrid models: one pass against the library's own N passes, and what must stay as it was."""

import contextlib
import copy
import pickle
import sys

import models
import numpy as np
import pytest
import torch
import transformers
from hybrids import FAMILIES, VOCABULARY, tiny
from models import KeepFloat64
from reference import conversation_passes
from transformers import AutoConfig

import flexmask
from flexmask import OnePassCollator, Pass, TokenTree, demo
from flexmask.cost import _scan_flops, cost
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
    torch._dynamo.reset()  # what many tests have compiled before counts against a limit of torch's
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


@pytest.mark.parametrize("family, module", [("lfm2", "conv"), ("qwen3_5_text", "linear_attn"), ("bamba", "mamba")])
def test_a_whole_mixer_that_is_trained_beside_adapters(family, module):
    """The bug guarded: PEFT's copy of it, which runs in its place, counted as a second one."""
    from peft import LoraConfig, get_peft_model

    _, tree = row()
    model = tiny(family)
    losses = one_pass(model, tree)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=[module]))
    assert torch.equal(one_pass(adapted, tree), losses)


def library_functions(monkeypatch, model):
    """As in a process in which no such model was loaded with attn_implementation="flexmask"."""
    for module in mixers._modules(type(model)):
        for name in mixers._OURS:
            if hasattr(vars(module).get(name), "_flexmask"):
                monkeypatch.setattr(module, name, vars(module)[name].__wrapped__)
    monkeypatch.setattr(mixers, "_installed", set())


def test_a_pickled_model_in_a_new_process(monkeypatch):
    _, tree = row()
    model = tiny("qwen3_5_text")
    losses = one_pass(model, tree)
    library_functions(monkeypatch, model)
    assert torch.equal(one_pass(pickle.loads(pickle.dumps(model)), tree), losses)


# ---------------------------------------------------------------------------------------------------- who must not be silent


def test_attention_that_is_chosen_behind_the_librarys_back(monkeypatch):
    """The bug guarded: the recurrences ran along the row, from one branch into the next."""
    _, tree = row()
    model = tiny("qwen3_5_text")
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    library_functions(monkeypatch, model)
    with pytest.raises(ValueError, match="chosen behind the library's back"):
        one_pass(model, tree)


def test_weights_are_refused_without_hooks_too():
    model = models.tiny("Qwen3")
    for module in model.modules():
        module._forward_pre_hooks.clear()
    batch = OnePassCollator(Tokenizer())([row()[1]])
    with pytest.raises(ValueError, match="target_weight, which the model's own loss would ignore"):
        model(**batch, target_weight=torch.ones_like(batch["shift_labels"], dtype=torch.float32))


@pytest.mark.parametrize("family, layers", [("granitemoehybrid", "mamba"), ("lfm2", "conv")])
def test_a_model_without_attention_refuses_what_the_others_refuse(family, layers):
    """The bug guarded: the layers of attention did, so weights and masks went unread."""
    model = tiny(family, layer_types=[layers] * 4)
    batch = OnePassCollator(Tokenizer())([row()[1]])
    assert model(**batch).loss > 0
    with pytest.raises(ValueError, match="target_weight, which the model's own loss would ignore"):
        model(**batch, target_weight=torch.ones_like(batch["shift_labels"], dtype=torch.float32))
    with pytest.raises(ValueError, match="got an attention_mask, or past_key_values, beside subtree_end"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


class Nothing(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def forget(module):
    """As another library would put code of its own in place of a module's."""
    module.forward = Nothing().forward


def without(what: str):
    """The error of a layer, which is layer 2, or any if it is of another kind."""
    return pytest.raises(NotImplementedError, match=rf"layers\.\d \(\w+\) did not ask flexmask for its {what}")


def test_a_layer_that_does_not_ask_is_an_error():
    """An attention, a scan or a convolution that is replaced from outside would train in silence, and wrongly."""
    _, tree = row()
    model = tiny("qwen3_5_text")
    attention = model.model.layers[2].self_attn
    kept = attention.forward
    forget(attention)
    with without("attention"):
        one_pass(model, tree)
    attention.forward = kept
    module = sys.modules[type(model).__module__]
    for name, what in (("causal_conv1d_fn", "convolution"), ("torch_chunk_gated_delta_rule", "recurrence")):
        with pytest.MonkeyPatch.context() as patch:
            library = getattr(module, name).__wrapped__
            patch.setattr(module, name, lambda *args, library=library, **kwargs: library(*args, **kwargs))
            with without(what):
                one_pass(model, tree)
    one_pass(model, tree)


def test_a_module_that_is_put_in_place_of_another_is_an_error():
    _, tree = row()
    model = tiny("qwen3_5_text")
    model.model.layers[2].self_attn = Nothing()
    with without("attention"):
        one_pass(model, tree)
    model = tiny("falcon_h1")  # whose layers have both
    kept = model.model.layers[1].mamba.forward
    model.model.layers[1].mamba.forward = lambda *args, **kwargs: kept(*args, **kwargs | {"subtree_end": None})
    with without("recurrence and convolution"):
        one_pass(model, tree)


@pytest.mark.parametrize("family", ["Qwen3", "GPT2"])
def test_a_model_of_attention_is_watched_too(family):
    _, tree = row()
    if family == "GPT2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**sizes)
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="flexmask").eval()
        layer = model.transformer.h[1]
        layer.attn = Nothing()
    else:
        model = models.tiny(family)
        forget(model.model.layers[1].self_attn)
    with pytest.raises(NotImplementedError, match=r"(layers|h)\.1 \(\w+\) did not ask flexmask"):
        one_pass(model, tree)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_attention_that_is_changed_after_loading(family):
    """Found: such a model was not watched, and filled a cache."""
    _, tree = row()
    expected = one_pass(tiny(family), tree)
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    for hooks in (model.model._forward_pre_hooks, model.model._forward_hooks):
        hooks.clear()  # as if it had been loaded with it
    model.set_attn_implementation("flexmask")
    assert torch.equal(one_pass(model, tree), expected)
    forget(model.model.layers[2].self_attn)
    with pytest.raises(NotImplementedError, match="did not ask flexmask"):
        one_pass(model, tree)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "lfm2"])
def test_share_prefixes(family):
    """The padded batch, sequences of a single token among it; and a layer that does not ask is an error there, too."""
    ids = torch.randint(3, VOCABULARY, (5, 30), generator=torch.Generator().manual_seed(0))
    ids[:, :12] = ids[0, :12]
    mask = torch.ones_like(ids)
    mask[1, 25:], mask[2, 1:], mask[3, 1:] = 0, 0, 0
    ids[3, 0] = ids[2, 0] + 1
    model = tiny(family, torch.float64).eval()
    with torch.no_grad(), KeepFloat64():
        for rows in (slice(None), slice(3)):  # with two sequences of one token, and with one
            batch = {"input_ids": ids[rows], "attention_mask": mask[rows]}
            expected = model.forward(**batch).logits
            flexmask.share_prefixes(model)
            found = model(**batch).logits
            model.base_model.forward = model.base_model.padded_forward
            assert ((found - expected) * mask[rows, :, None]).abs().max() < 1e-9
    flexmask.share_prefixes(model)
    forget(model.model.layers[2].self_attn)
    with pytest.raises(NotImplementedError, match="did not ask flexmask"):
        model(input_ids=ids[:2].clone(), attention_mask=mask[:2])


def test_layers_that_are_compiled_one_by_one():
    _, tree = row()
    model = tiny("qwen3_5_text")
    losses = one_pass(model, tree)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(one_pass(model, tree), losses)


def test_layers_that_do_not_run_need_not_ask():
    _, tree = row()
    model = models.tiny("Qwen3", num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    one_pass(model, tree)


def test_several_models_in_turns():
    _, tree = row()
    trees, library = tiny("qwen3_5_text"), tiny("qwen3_5_text")
    library.set_attn_implementation("sdpa")
    ids = torch.arange(3, 40)[None]
    expected, losses = library(input_ids=ids).logits, one_pass(trees, tree)
    assert torch.equal(library(input_ids=ids).logits, expected)
    assert torch.equal(one_pass(trees, tree), losses)
    with pytest.raises(ValueError, match="tree batch"):
        one_pass(library, tree)


def test_the_language_model_of_a_multimodal_one():
    text = tiny("qwen3_5_text", torch.float64)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(
        text_config=text.config.to_dict() | {"rope_parameters": rope}, vision_config=vision
    )
    model = transformers.Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="flexmask")
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.visual = None  # a tree holds text
    with KeepFloat64():
        assert_same(*both(model.to(torch.float64).train()), 1e-10, 1e-8)


def test_a_routers_loss_inside_a_multimodal_model(tmp_path):
    """The bugs guarded: asked for in the configuration of its language model, it was left out in silence of what is trained,
    and verify compared a mean with it to one without."""
    text = tiny("qwen3_5_moe_text", vocab_size=512).config
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}
    options = {"rope_parameters": rope, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(text_config=text.to_dict() | options, vision_config=vision)
    model = transformers.Qwen3_5MoeForConditionalGeneration._from_config(config, attn_implementation="flexmask")
    model.model.visual = None
    conversations = demo.conversations(2)
    tokenizer = demo.train_tokenizer(demo.texts(conversations), vocab_size=512)
    report = flexmask.verify(model.eval(), tokenizer, conversations)
    assert report, str(report)
    assert model.config.text_config.output_router_logits
    batch = flexmask.OnePassCollator(tokenizer)(conversations)
    trainer = flexmask.OnePassTrainer(model, flexmask.OnePassTrainingArguments(str(tmp_path), use_cpu=True))
    found, expected = trainer.compute_loss(model.train(), dict(batch)), model(**batch)
    assert expected.aux_loss > 0 and torch.equal(found, expected.loss)


def test_cost_counts_recurrences():
    _, tree = row()
    costs = {family: cost(tree, tiny(family).config).one_pass for family in ("qwen3_5_text", "bamba", "lfm2")}
    config = tiny("qwen3_5_text").config
    without = cost(tree, type(config)(**config.to_dict() | {"layer_types": ["full_attention"] * 4})).one_pass
    assert costs["qwen3_5_text"].linear_flops > without.linear_flops * 0.5
    assert all(found.linear_flops > 0 and found.attention_flops > 0 for found in costs.values())
    # One layer's scan, by hand: 4 heads of values, 2 of keys, 8 × 12; chunks of 64.
    inputs = [(1, 64, 2, 8), (1, 64, 2, 8), (1, 64, 4, 12), (1, 64, 4)]
    by_hand = 64 * (2 * 2 * 64 * 8 * 2 + 4 * (3 * 2 * 8 * 12 + 2 * 64 * 12 + 64 * (8 + 12)))
    assert _scan_flops(*inputs, (1, 64, 4), None, None) == by_hand


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
