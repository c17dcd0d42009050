"""Padded batches run as prefix trees inside the model: the same values, under TRL's trainers too."""

import copy
import pickle

import datasets
import numpy as np
import pytest
import torch
import trl
from models import FAMILIES, reference_attention, tiny
from templates import tokenizer
from test_loss import gradients, same_gradients
from transformers import AutoModelForCausalLM, Llama4TextConfig, MambaConfig, MambaForCausalLM

from flexmask import Pass, TokenTree, share_prefixes, tree_logprobs
from flexmask.collator import to_batch


def sequences(seed=0):
    """A prompt with three answers, one of them twice; another prompt that shares its first tokens; and one of its own."""
    rng = np.random.default_rng(seed)
    system, first, second, own = (rng.integers(1, 512, n) for n in (20, 12, 9, 14))
    answers = [rng.integers(1, 512, n) for n in (7, 15, 10)]
    prompts = [[system, first], [system, first], [system, first], [system, second], [own]]
    answers = [answers[0], answers[1], answers[0], answers[2], answers[1]]
    return [(np.concatenate(p), a) for p, a in zip(prompts, answers)]


def padded(sequences, side):
    """input_ids and attention_mask (batch, L), and labels -100 where nothing is supervised."""
    length = max(len(p) + len(a) for p, a in sequences) + 3
    ids, mask, labels = (torch.full((len(sequences), length), fill) for fill in (5, 0, -100))
    for row, (prompt, answer) in enumerate(sequences):
        tokens = torch.from_numpy(np.concatenate([prompt, answer]))
        at = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, at], mask[row, at] = tokens, 1
        labels[row, at.stop - len(answer) : at.stop] = torch.from_numpy(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_what_it_was(family, side):
    batch, model = padded(sequences(), side), tiny(family)
    real = batch["attention_mask"].bool()
    model.set_attn_implementation(reference_attention(family))
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected = model(**batch, position_ids=positions)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.set_attn_implementation("flexmask")
    seen = []
    share_prefixes(share_prefixes(model)).get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape)
    )
    found = model(**batch)
    found.loss.backward()
    tree = TokenTree.from_passes([Pass(np.concatenate(s), np.zeros(sum(map(len, s)), bool)) for s in sequences()])
    assert seen == [(1, -(-len(tree) // 128) * 128)] and len(tree) < real.sum() * 0.7
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    same_gradients(gradients(model), expected_gradients)
    torch.testing.assert_close(model(**batch, position_ids=positions).loss, found.loss)


def test_generation_one_sequence_and_tree_batches_are_left_alone():
    model = tiny("Qwen3")
    batch = padded(sequences(), "left")
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    single = {name: x[3:4] for name, x in batch.items()}
    tree_batch = to_batch(TokenTree.from_passes([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4], [0, 0, 1])]))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def run():
        return model.generate(**prompts, **options), model(**single).loss, model(**tree_batch).loss

    expected = run()
    share_prefixes(model)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    # Without a cache, generation reads the whole batch again for every token, and may share.
    assert torch.equal(model.generate(**prompts, **options, use_cache=False), expected[0])


def test_a_row_of_nothing_but_padding_and_no_mask():
    model = tiny("Qwen3")
    batch = padded(sequences(), "right")
    del batch["labels"]
    expected = model(**batch).logits
    batch = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in batch.items()}
    found = share_prefixes(model)(**batch).logits
    real = batch["attention_mask"][:-1].bool()
    torch.testing.assert_close(found[:-1][real], expected[real], rtol=1e-4, atol=1e-4)
    same_length = batch["input_ids"][:2, :30]
    torch.testing.assert_close(model(same_length).logits[0], model(same_length[:1]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"attention_mask": torch.ones(5, 1, 50, 50)},
            ValueError,
            r"shape \(5, 1, 50, 50\), expected that of input_ids",
        ),
        ({"position_ids": torch.arange(50)[None] // 2}, ValueError, "position_ids do not count the tokens"),
        ({"attention_mask": torch.zeros(5, 50)}, ValueError, "nothing but padding"),
        ({"attention_mask": (torch.arange(50) != 5).long().expand(5, 50)}, ValueError, "padding between the tokens"),
        ({"output_hidden_states": True}, NotImplementedError, "output_hidden_states asks for values of every layer"),
    ],
)
def test_what_cannot_be_merged_is_refused(change, error, message):
    ids = padded(sequences(), "right")["input_ids"][:, :50]
    with pytest.raises(error, match=message):
        share_prefixes(tiny("Qwen3"))(**{"input_ids": ids} | change)


def test_a_copy_runs_its_own_weights():
    """The bug guarded: a deep copy ran the original's body, silently; and a pickle of the model could not be made."""
    model = share_prefixes(tiny("Qwen3"))
    batch = padded(sequences(), "right")
    expected = model(**batch).loss
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    lengths = []

    def loss(model):
        hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: lengths.append(args[0].numel()))
        found = model(**batch).loss
        hook.remove()
        return found

    shared, alone = 128, batch["input_ids"].numel()
    for again, length in ((copied, shared), (unpickled, alone)):
        torch.testing.assert_close(loss(again), expected)
        torch.testing.assert_close(loss(share_prefixes(again)), expected)
        assert lengths == [length, shared]
        lengths.clear()
    inner = copied.model.forward
    copied.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as Accelerate wraps
    assert torch.equal(loss(share_prefixes(copied)), expected) and lengths.pop() == shared
    copied(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in copied.parameters())


def test_padding_between_tokens_with_their_positions():
    batch, model = padded(sequences(), "left"), tiny("Qwen3")
    batch["attention_mask"][0, -4] = 0
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**batch, position_ids=positions)
    found = share_prefixes(model)(**batch, position_ids=positions)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)


def test_tuples_by_configuration_and_caches():
    model = share_prefixes(tiny("Qwen3"))
    batch = padded(sequences(), "right")
    expected = model(**batch).loss
    model.config.return_dict = False
    assert torch.equal(model(**batch)[0], expected)
    model.config.return_dict = True
    assert model(**batch, use_cache=True).past_key_values.get_seq_length() == batch["input_ids"].shape[1]


def test_models_that_cannot_share_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1))
    mamba.config._attn_implementation = "flexmask"  # as from an old checkpoint: loading checks it, too
    with pytest.raises(NotImplementedError, match="mamba cannot be trained"):
        share_prefixes(mamba)
    model = tiny("Qwen3")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='attn_implementation="sdpa", expected "flexmask"'):
        share_prefixes(model)
    with pytest.raises(TypeError, match="got a Linear, expected a Hugging Face model"):
        share_prefixes(torch.nn.Linear(2, 2))


def test_a_body_that_is_not_known_as_one_is_refused():
    config = Llama4TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexmask")
    if model.base_model is not model:
        pytest.skip("in this version of transformers Llama 4 knows its body")
    with pytest.raises(NotImplementedError, match="does not know the body inside it as its base_model"):
        share_prefixes(model)


def test_a_body_alone_shares_prefixes():
    model, batch = tiny("Qwen3"), padded(sequences(), "right")
    del batch["labels"]
    expected = model.model(**batch).last_hidden_state
    found = share_prefixes(model.model)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def test_noise_on_embeddings_is_refused():
    """The bug guarded: it was scaled by the length of the merged row, and the same for all that share a beginning."""
    model = share_prefixes(tiny("Qwen3")).train()
    model.get_input_embeddings().neftune_noise_alpha = 5
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        model(**padded(sequences(), "right"))


def one_by_one(model, prompt, answer):
    """Log-probabilities of an answer, run as a sequence of its own."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    return logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(answer) :]


def tree_of(sequences):
    return TokenTree.from_passes(
        [Pass(np.concatenate(s), np.arange(len(s[0]) + len(s[1])) >= len(s[0])) for s in sequences]
    )


def dpo(policy, reference, beta=0.1):
    """DPO (arXiv 2305.18290, equation 7) of the log-probabilities of a chosen and a rejected answer."""
    margins = [(p.sum() - r.sum()) for p, r in zip(policy, reference)]
    return -torch.nn.functional.logsigmoid(beta * (margins[0] - margins[1]))


def grpo(policy, old, rewards, epsilon=0.2):
    """GRPO's clipped objective (arXiv 2402.03300, equation 3, without the divergence), mean per answer, then over them."""
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    losses = []
    for new, before, advantage in zip(policy, old, advantages):
        ratio = (new - before).exp()
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("way", ["tree_logprobs", "share_prefixes"])
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_preference_and_group_losses_are_those_of_separate_sequences(objective, way):
    """Losses and gradients; the reference (old) policy is another model."""
    group = sequences()[:2] if objective == "dpo" else sequences()[:3]
    rewards = torch.tensor([1.0, 0.0, 0.4])
    with torch.no_grad():
        other = [one_by_one(tiny("Qwen3", seed=0, initializer_range=0.28), *s) for s in group]
    model = tiny("Qwen3")

    def loss_of(logprobs):
        return dpo(logprobs, other) if objective == "dpo" else grpo(logprobs, other, rewards)

    expected = loss_of([one_by_one(model, *s) for s in group])
    expected.backward()
    expected_gradients = gradients(model)
    if way == "tree_logprobs":
        tree = tree_of(group)
        found = loss_of(tree.per_pass(tree_logprobs(model, tree)))
    else:
        batch = padded(group, "right")
        labels = batch.pop("labels")[:, 1:]
        logprobs = torch.log_softmax(share_prefixes(model)(**batch).logits[:, :-1], -1)
        logprobs = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        found = loss_of([row[label >= 0] for row, label in zip(logprobs, labels)])
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    same_gradients(gradients(model), expected_gradients, 2e-5)
    assert expected != 0


def train_with_trl(kind, shared, folder):
    """Two steps of a trainer of TRL as it is, on a model that shares prefixes or does not. -> losses, weights, tokens run."""
    vocabulary = tokenizer("qwen3")
    model = tiny("Qwen3", vocab_size=len(vocabulary))
    common = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True,
        "learning_rate": 0.05, "optim": "sgd", "save_strategy": "no", "report_to": "none", "seed": 1, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    if shared:
        share_prefixes(model)
    tokens = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel()) if torch.is_grad_enabled() else None
    )
    questions = [f"What is {i} plus {i}, please, in words?" for i in range(8)]
    if kind == "dpo":
        reference = tiny("Qwen3", seed=3, vocab_size=len(vocabulary))
        data = [{"prompt": q, "chosen": f" It is {2 * i}.", "rejected": f" {i}!"} for i, q in enumerate(questions)]
        trainer = trl.DPOTrainer(
            model, share_prefixes(reference) if shared else reference, trl.DPOConfig(**common, beta=0.5),
            train_dataset=datasets.Dataset.from_list(data), processing_class=vocabulary,
        )  # fmt: skip
    else:
        arguments = trl.GRPOConfig(
            **common, num_generations=4, max_completion_length=8, temperature=1.0, beta=0.0, num_iterations=2,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model, lambda completions, **_: [float(len(c)) + c.count("e") for c in completions], arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": q} for q in questions]), processing_class=vocabulary,
        )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in model.named_parameters()}, sum(tokens)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_trls_trainers_take_the_same_steps(kind, tmp_path):
    losses, weights, tokens = train_with_trl(kind, False, tmp_path)
    found_losses, found_weights, found_tokens = train_with_trl(kind, True, tmp_path)
    assert found_losses == pytest.approx(losses, rel=1e-4, abs=1e-6) and len(losses) == 2
    start = tiny("Qwen3", vocab_size=len(tokenizer("qwen3"))).state_dict()
    moved = max((weights[name] - start[name]).abs().max() for name in weights)
    assert moved > 1e-4
    for name, expected in weights.items():
        assert (found_weights[name] - expected).abs().max() <= 1e-4 * moved, name
    assert found_tokens < tokens
