"""FLOPs and activations against counts by hand, and against what PyTorch's own counter sees in real steps."""

import numpy as np
import pytest
import torch
import transformers
from models import COMMON, FAMILIES, tiny
from reference import conversation_passes
from torch.utils.flop_counter import FlopCounterMode

import flexmask.attention
from flexmask import Pass, TokenTree, cost
from flexmask.attention import using_backend
from flexmask.backends import flash
from flexmask.collator import to_inputs
from flexmask.mask import block_lists, count_tiles


def tree_of(turns=4, h=60, t=150, r=90):
    return TokenTree.from_passes(conversation_passes(np.random.default_rng(0), turns, h, t, r, 500))


def config_of(family, **options):
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**COMMON | FAMILIES[family] | options)


def test_a_small_llama_by_hand():
    """Hidden size 32, 4 query and 2 key/value heads of 8, MLP of 48, 2 layers, 512 tokens in the vocabulary."""
    tree = tree_of()
    found = cost(tree, config_of("Llama"))
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    lengths = [60 * i + 90 * (i - 1) + 150 + 90 for i in range(1, 5)]
    assert found.one_pass.tokens == len(tree) and found.n_pass.tokens == sum(lengths)
    assert found.one_pass.linear_flops == 3 * 2 * weights * len(tree)
    assert found.n_pass.linear_flops == 3 * 2 * weights * sum(lengths)
    tiles = sum(n * (n + 1) // 2 for n in (-(-length // 128) for length in lengths))
    assert found.n_pass.attention_flops == 3.5 * 2 * 4 * (8 + 8) * 2 * tiles * 128**2
    assert found.n_pass.loss_flops == found.one_pass.loss_flops == 3 * 2 * 32 * 512 * 4 * 240
    assert found.n_pass_all_logits.loss_flops == 3 * 2 * 32 * 512 * sum(lengths)
    assert found.n_pass_all_logits.linear_flops == found.n_pass.linear_flops
    assert found.speed_up == found.n_pass.flops / found.one_pass.flops > 1
    assert "all, TFLOP" in str(found)


def test_logits_too_many_to_be_kept_are_computed_twice(monkeypatch):
    """Four products for those of the tree, 960 of them; three for those of a pass, 240 at most, which are kept."""
    monkeypatch.setattr("flexmask.loss.CHUNK_LOGITS", 300 * 512)
    found = cost(tree_of(), config_of("Llama"))
    assert found.one_pass.loss_flops == 4 * 2 * 32 * 512 * 960
    assert found.n_pass.loss_flops == 3 * 2 * 32 * 512 * 960


def test_passes_keep_the_activations_of_the_longest():
    tree = tree_of()
    found = cost(tree, config_of("Llama"))
    longest = TokenTree.from_passes(tree.passes()[3:])
    assert found.n_pass.activation_bytes == cost(longest, config_of("Llama")).one_pass.activation_bytes
    assert found.n_pass.activation_bytes / found.one_pass.activation_bytes == pytest.approx(len(longest) / len(tree))


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_those_of_a_real_step(family):
    """Forward and backward of the model without its output layer, counted by PyTorch. The first layer's input needs no
    gradient, and attention is an operator that this counter does not know."""
    tree, model = tree_of(2), tiny(family)
    model.set_attn_implementation("flexmask")
    if family in ("Qwen3Moe", "GptOss"):
        model.set_experts_implementation("batched_mm" if family == "Qwen3Moe" else "eager")
    with FlopCounterMode(display=False) as counter:
        model.base_model(**to_inputs(tree, pad_to_multiple_of=1), use_cache=False)
    found = cost(tree, model.config).one_pass.linear_flops / 3
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_sliding_windows_cost_their_tiles():
    """Mistral has a window of 24 in all layers; of Gemma 3's two layers one is full."""
    tree = tree_of(1, 60, 900, 100)
    full, partial = count_tiles(
        torch.from_numpy(tree.subtree_end)[None],
        position_ids=torch.from_numpy(tree.position_ids)[None],
        sliding_window=24,
    )
    blocks = -(-len(tree) // 128)
    assert full + partial == 2 * blocks - 1 < blocks * (blocks + 1) // 2
    windowed = cost(tree, config_of("Mistral")).one_pass.attention_flops
    everything = cost(tree, config_of("Mistral", sliding_window=None)).one_pass.attention_flops
    assert windowed / everything == (2 * blocks - 1) / (blocks * (blocks + 1) / 2)
    assert cost(tree, config_of("Gemma3")).one_pass.attention_flops == (windowed + everything) / 2


def test_gathered_keys_are_those_of_the_backend():
    tree = tree_of(3)
    for window in (None, 24):
        gathered = flash.sequences(torch.from_numpy(tree.subtree_end)[None], sliding_window=window).read
        config = config_of("Mistral", sliding_window=window)
        per_key = config.num_key_value_heads * 2 * config.head_dim * 2
        found = cost(tree, config)
        assert found.one_pass.gathered_bytes == len(gathered) * per_key
        assert found.n_pass.gathered_bytes == int(tree.pass_lengths.max()) * per_key
        assert "gathered keys, GiB" in str(found)


def test_tiles_are_those_of_the_lists():
    tree = tree_of(6)
    ends = torch.from_numpy(tree.subtree_end)[None]
    lists = block_lists(ends)
    assert count_tiles(ends) == (int(lists.full_kv_num.sum()), int(lists.kv_num.sum()))


def test_the_chosen_backend_does_not_matter():
    """Which would have to run on tensors that have no values."""
    config = config_of("Llama", intermediate_size=49)  # of no other test: the count of a configuration is kept
    with using_backend("triton"):
        found = cost(tree_of(), config)
        assert flexmask.attention._override == "triton"
    assert found.one_pass.attention_flops == cost(tree_of(), config_of("Llama")).one_pass.attention_flops > 0


def test_activations_are_what_autograd_keeps():
    tree = TokenTree.from_passes([Pass(np.arange(384), np.arange(384) > 0)])
    model = tiny("Qwen3", torch.bfloat16).train()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(**to_inputs(tree), use_cache=False)
    expected = sum(s.nbytes() for address, s in kept.items() if address not in weights)
    assert cost(tree, model.config).one_pass.activation_bytes == pytest.approx(expected, rel=0.02)


def test_architectures_that_cannot_be_trained_so_are_refused():
    with pytest.raises(NotImplementedError, match="mamba"):
        cost(tree_of(1), transformers.MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1))


def test_a_forward_that_depends_on_values_is_not_counted():
    options = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.ModernBertDecoderConfig(**options, pad_token_id=0)
    with pytest.raises(NotImplementedError, match="modernbert-decoder cannot be counted: its code depends on values"):
        cost(tree_of(1), config)
