import math

import pytest
import torch
from models import tiny
from templates import CHAT, TOOL_LOOP, TOOLS, tokenizer
from transformers import AttentionInterface

import flexmask
from flexmask import ConversationError
from flexmask.integrations import transformers as integration

CONVERSATIONS = [{"messages": CHAT}, {"messages": TOOL_LOOP, "tools": TOOLS}]


def verify(model, conversations=CONVERSATIONS, **options):
    return flexmask.verify(model, tokenizer("qwen3"), conversations, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_model_passes(dtype):
    report = verify(tiny("Qwen3", dtype))
    assert report, str(report)
    assert report.dtype == dtype and [c.conversations for c in report.comparisons] == [(0,), (1,), (0, 1)]
    first = report.comparisons[0]
    assert first.passes == 3 and first.tokens_one_pass < first.tokens_n_pass
    assert "the same losses" in str(report) and f"{first.tokens_n_pass}" in str(report)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Mistral"])
def test_families_that_need_another_reference(family):
    report = verify(tiny(family))
    assert report, str(report)
    assert report.reference == ("sdpa" if family == "Mistral" else "eager")


def broken_attention(change):
    """The attention function with its arguments changed."""

    def function(*args, subtree_end=None, **kwargs):
        if subtree_end is not None:
            subtree_end, kwargs = change(subtree_end, kwargs)
        return integration._attention_function(*args, subtree_end=subtree_end, **kwargs)

    return function


def leaking(subtree_end, kwargs):
    return torch.full_like(subtree_end, subtree_end.shape[1]), kwargs  # one causal sequence


def without_positions(subtree_end, kwargs):
    places = torch.arange(subtree_end.shape[1])[None]
    return subtree_end, kwargs | {"position_ids": places}  # a window counted in row places


def leaking_into_the_next_tree(subtree_end, kwargs):
    subtree_end = subtree_end.clone()
    subtree_end[:, 0] = subtree_end.shape[1]
    return subtree_end, kwargs


@pytest.mark.parametrize(
    "family, change",
    [("Qwen3", leaking), ("Mistral", without_positions), ("Qwen3", leaking_into_the_next_tree)],
)
def test_faults_are_found(monkeypatch, family, change):
    """Planted faults: branches see each other; a window that counts places in the row; packed trees see each other."""
    model = tiny(family)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flexmask", broken_attention(change))
    report = verify(model)
    assert not report and "DIFFERENT LOSSES" in str(report)
    assert report.loss_difference > 1e-3


def test_wrong_gradients_are_found(monkeypatch):
    """Planted fault: right losses, and a backward that forgets part of dk."""
    from flexmask.backends import flash

    right = flash._backward

    def wrong(*args):
        dq, dk, dv = right(*args)
        return dq, 0.9 * dk, dv

    monkeypatch.setattr(flash, "_backward", wrong)
    report = verify(tiny("Qwen3"))
    assert report.loss_difference < 1e-5 and not report
    assert verify(tiny("Qwen3"), gradients=False), "without gradients the fault cannot show"


def test_mixture_of_experts_with_a_load_balancing_loss():
    """The bug guarded: the model's own mean had the router's loss in it, and the N passes' had not."""
    model = tiny("Qwen3Moe", output_router_logits=True)
    report = verify(model)
    assert report, str(report)
    assert model.config.output_router_logits


def test_a_fault_in_the_models_own_loss_is_found(monkeypatch):
    """Planted fault: right logits, and a loss that is the sum over a wrong number of targets."""
    model = tiny("Qwen3")
    right = model.loss_function
    monkeypatch.setattr(type(model), "loss_function", lambda self, *a, **k: right(*a, **k) * 1.01, raising=False)
    report = verify(model)
    assert report.loss_difference < 1e-5 and not report


def test_a_frozen_model_is_compared_without_gradients():
    report = verify(tiny("Qwen3").requires_grad_(False))
    assert report and report.gradient_difference is None


def test_in_16_bits_the_verdict_says_what_it_is_worth():
    assert "small faults do not show" in str(verify(tiny("Qwen3", torch.bfloat16)))
    assert "small faults do not show" not in str(verify(tiny("Qwen3")))


def test_autocast_around_it_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        report = verify(tiny("Qwen3"))
    assert report, str(report)
    assert report.dtype == torch.float32


def test_the_coarsest_dtype_decides():
    model = tiny("Qwen3", torch.bfloat16)
    model.lm_head.to(torch.float32)
    model.model.norm.register_forward_hook(lambda module, args, output: output.float())
    report = verify(model)
    assert report and report.dtype == torch.bfloat16


def test_nan_fails():
    model = tiny("Qwen3")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    assert not verify(model)


def test_model_is_left_as_it_was():
    model = tiny("Qwen3").train()
    model.model.layers[1].eval()  # frozen, say
    model.set_attn_implementation("sdpa")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    verify(model)
    assert model.training and model.model.layers[0].mlp.training and not model.model.layers[1].mlp.training
    assert model.config._attn_implementation == "sdpa"
    assert (model.lm_head.weight.grad == 1).all() and model.model.norm.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_peft_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny("Qwen3"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    report = verify(model)
    assert report and report.gradient_difference > 0


def test_no_conversations_and_no_model():
    with pytest.raises(ConversationError, match="has the keys text, expected messages"):
        verify(tiny("Qwen3"), [{"text": "Hi"}])
    with pytest.raises(ValueError, match="no conversations"):
        verify(tiny("Qwen3"), [])
    with pytest.raises(TypeError, match="expected a Hugging Face model"):
        verify(torch.nn.Linear(2, 2))
