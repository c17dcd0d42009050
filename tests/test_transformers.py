"""attn_implementation="flexmask" in the library's own machinery: loading, padding, caches, compiling, the Trainer."""

import importlib
import json

import numpy as np
import pytest
import torch
from models import reference_attention, tiny
from reference import conversation_passes
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import flexmask
from flexmask import OnePassCollator, TokenTree, pack
from flexmask.integrations.transformers import DeferredMask


class Vocabulary:
    pad_token_id = 0

    def __len__(self):
        return 512


def batch_of(*turns, seed=0):
    rng = np.random.default_rng(seed)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, 9, 14, 5, 512)) for n in turns]
    return OnePassCollator(Vocabulary())(trees)


def rows_of_unequal_size(loss_reduction="token"):
    rng = np.random.default_rng(0)
    rows = [
        TokenTree.from_passes(conversation_passes(rng, n, 9, 14, 5, 512), loss_reduction=loss_reduction)
        for n in (1, 4, 2, 6)
    ]
    assert len({row.num_targets for row in rows}) == 4
    return rows


PLAIN_FAMILIES = ["Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "GptOss"]


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_without_a_tree_padded_batches_are_as_with_the_librarys_attention(family):
    model = tiny(family)
    torch.manual_seed(0)
    ids = torch.randint(1, 512, (2, 60))
    for left in (True, False):
        mask = torch.ones_like(ids)
        mask[1, :13] = 0
        mask = mask if left else mask.flip(1)
        found = {}
        for name in ("flexmask", reference_attention(family)):
            model.set_attn_implementation(name)
            found[name] = model(input_ids=ids, attention_mask=mask, labels=ids)
        ours, theirs = found.values()
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.logits[mask.bool()], theirs.logits[mask.bool()])


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_the_same_tokens(family, cache):
    model = tiny(family)
    torch.manual_seed(0)
    ids = torch.randint(1, 512, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for name in ("flexmask", reference_attention(family)):
        model.set_attn_implementation(name)
        options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        found.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_packed_sequences_without_subtree_end_are_the_librarys_packed_sequences():
    model = tiny("Qwen3")
    ids = torch.randint(1, 512, (1, 50))
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[:, :20], model(input_ids=ids[:, :20]).logits)
    torch.testing.assert_close(together[:, 20:], model(input_ids=ids[:, 20:]).logits)


def test_a_tree_batch_makes_no_dense_mask(monkeypatch):
    """The bug guarded: tree positions look like packed documents to the library, which then builds an L×L mask."""
    monkeypatch.setattr(DeferredMask, "dense", property(lambda self: pytest.fail("a dense mask was made")))
    for family in ("Qwen3", "Gemma3"):
        tiny(family)(**batch_of(3, 2))


def test_loads_from_a_folder_and_saves_without_a_trace(tmp_path):
    tiny("Qwen3").save_pretrained(tmp_path)
    assert "flexmask" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flexmask")
    assert model.config._attn_implementation == "flexmask"
    expected = tiny("Qwen3")(**batch_of(3)).loss
    torch.testing.assert_close(model(**batch_of(3)).loss, expected)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "GptOss"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, batch = tiny(family), batch_of(3, 2)
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "GptOss"])
def test_compiled_model_has_no_graph_break_and_the_same_gradients(family):
    model, batch = tiny(family), batch_of(3, 2)
    expected = model(**batch, use_cache=False).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    whole = family != "GptOss"  # the library's experts break the graph themselves
    compiled = torch.compile(model, fullgraph=whole, backend="aot_eager")
    loss = compiled(**batch, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_a_cache_object_does_not_disturb_training():
    model, batch = tiny("Gemma3"), batch_of(3)
    torch.testing.assert_close(model(**batch, use_cache=True).loss, model(**batch, use_cache=False).loss)


def test_what_a_tree_cannot_be_combined_with():
    batch = batch_of(2)
    model = tiny("Qwen3")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -5:] = 0
    with pytest.raises(ValueError, match=r"attention_mask, or past_key_values.* beside subtree_end"):
        model(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention dropout is 0.1.*attention_dropout=0.0"):
        tiny("Qwen3", attention_dropout=0.1).train()(**batch)
    past = model(input_ids=batch["input_ids"][:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values.* beside subtree_end"):
        model(**batch, past_key_values=past)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "GptOss"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "registered_later"])
def test_a_tree_batch_for_another_attention_is_refused(family, attention):
    """The bug guarded: it ignores subtree_end, and trains the row as one long sequence."""
    if attention == "sdpa" and reference_attention(family) != "sdpa":
        attention = "eager"
    AttentionInterface.register("registered_later", lambda *args, **kwargs: pytest.fail("ran"))
    model = tiny(family)
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=rf'got a tree batch, but the model has attn_implementation="{attention}"'):
        model(**batch_of(2))


def test_importing_again_changes_nothing():
    before = AttentionInterface.get_interface, PreTrainedModel.get_correct_attn_implementation
    importlib.reload(flexmask)
    assert before == (AttentionInterface.get_interface, PreTrainedModel.get_correct_attn_implementation)


@pytest.mark.parametrize("family", ["Gemma3", "GptOss"])
def test_compiled_without_a_tree(family):
    model = tiny(family)
    ids = torch.randint(1, 512, (1, 40))
    expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)


def test_autocast_with_float32_weights():
    model, batch = tiny("Qwen3"), batch_of(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    torch.testing.assert_close(loss, model(**batch).loss, rtol=2e-2, atol=0)
    loss.backward()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_step_is_the_mean_over_all_targets_of_n_passes(tmp_path, accumulation):
    """One plain SGD step of the unmodified Trainer, rows of different sizes, against the gradient computed by hand."""
    rng = np.random.default_rng(0)
    trees = [TokenTree.from_passes(conversation_passes(rng, n, 9, 14, 5, 512)) for n in (1, 4)]
    rows = pack(trees, 128)
    assert len(rows) == 2 and rows[0].num_targets != rows[1].num_targets
    rows = rows if accumulation == 2 else rows[:1]
    collator = OnePassCollator(Vocabulary())

    plain = tiny("Qwen3")
    total = sum(row.num_targets for row in rows)
    for row in rows:
        (plain(**collator([row])).loss * row.num_targets / total).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in plain.named_parameters()}

    model = tiny("Qwen3")
    arguments = TrainingArguments(
        tmp_path, remove_unused_columns=False, per_device_train_batch_size=1, max_steps=1, learning_rate=0.1,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
        report_to="none", use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
    json.dumps(trainer.state.log_history)
