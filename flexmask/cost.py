"""What a training step takes, counted and not measured: floating-point operations and bytes of activations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .attention import using_backend
from .backends.flash import gathered_keys, head_size
from .integrations.transformers import NAME
from .loss import chunk_size
from .mask import BLOCK_SIZE, count_tiles
from .recurrence.chunks import CHUNK, CHUNK_PER_CHANNEL
from .tree import TokenTree

# Forward, and backward twice that. Attention computes its scores again in the backward: five products to two.
_STEP, _ATTENTION_STEP = 3, 3.5
_PROBE_TOKENS = 128


@dataclass(frozen=True)
class Cost:
    """One training step, forward and backward, of a tree or of separate sequences.

    Attributes:
        tokens: that go through the model, padding not counted.
        logits: places at which logits are computed.
        linear_flops: of everything that is multiplied with weights, but for the output layer.
        attention_flops: of the 128×128 tiles that hold a visible pair.
        loss_flops: of the output layer, whose logits are computed twice where they are too many to be kept (by some libraries'
            losses they are not, see `flexmask.loss`).
        activation_bytes: kept for the backward, without gradient checkpointing, in bfloat16; without logits, of which a chunk
            is held at a time.
        gathered_bytes: of the keys and values that backend `flash` gathers on CUDA, for one layer at a time, in bfloat16; of
            the sequence with the most. In the backward their gradients come beside them, once and, if query heads share keys,
            once more for each query head.
    """

    tokens: int
    logits: int
    linear_flops: float
    attention_flops: float
    loss_flops: float
    activation_bytes: int
    gathered_bytes: int

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops + self.loss_flops


@dataclass(frozen=True)
class CostComparison:
    """A tree, and its passes as separate sequences. `str()` of it is a table.

    Attributes:
        one_pass: the tree.
        n_pass: the passes, with logits where there is a target.
        n_pass_all_logits: the passes as trainers run them that take labels of -100, with logits of every token.
    """

    one_pass: Cost
    n_pass: Cost
    n_pass_all_logits: Cost

    @property
    def speed_up(self) -> float:
        """FLOPs of `n_pass` over those of `one_pass`."""
        return self.n_pass.flops / self.one_pass.flops

    def __str__(self) -> str:
        lines = [f"{'one step':<28}{'one tree':>12}{'N passes':>12}{'ratio':>8}{'all logits':>13}{'ratio':>8}"]
        one, n, everything = self.one_pass, self.n_pass, self.n_pass_all_logits
        for name, attribute, unit in (
            ("linear layers, TFLOP", "linear_flops", 1e12),
            ("attention, TFLOP", "attention_flops", 1e12),
            ("output layer, TFLOP", "loss_flops", 1e12),
            ("all, TFLOP", "flops", 1e12),
            ("activations, GiB", "activation_bytes", 2**30),
            ("gathered keys, GiB", "gathered_bytes", 2**30),
        ):
            a, b, c = (getattr(cost, attribute) / unit for cost in (one, n, everything))
            if name.endswith("GiB"):  # sequences are run one after the other
                lines.append(f"{name:<28}{a:>12.3g}{b:>12.3g}{'':>8}{c:>13.3g}   of the longest pass, for N passes")
            else:
                lines.append(f"{name:<28}{a:>12.3g}{b:>12.3g}{b / a:>8.2f}{c:>13.3g}{c / a:>8.2f}")
        return "\n".join(lines)


def cost(tree: TokenTree, config: PreTrainedConfig) -> CostComparison:
    """Count a training step of a tree (a conversation, or a packed row), and of its passes run one after the other.

    A multiplication and an addition are two operations. Linear layers and activations are counted on the model itself,
    built from the configuration without memory for weights; recurrences by chunks (`flexmask.recurrence`), as if every one were
    full; attention as 2 · (head_dim + value_dim) for each pair of each visited tile and head (FlashAttention-2, arXiv
    2307.08691, section 4), with the sliding windows of the layers that have them (Llama 4's chunks count as windows of their
    size). The backward is twice the forward, 2.5 times in attention. Norms, activation functions and the optimiser are not
    counted. N passes one after the other keep the activations of one pass at a time: of the longest.

    Args:
        tree: what is trained.
        config: of a causal LM.

    Raises:
        ValueError: transformers knows no causal LM for this configuration.
        NotImplementedError: an architecture that a tree would train wrongly, or whose code depends on values.
    """
    key = (type(config), config.to_json_string(use_diff=False))
    if key not in _models:
        if len(_models) == 16:
            _models.clear()
        try:
            _models[key] = _model(config)
        except DataDependentOutputException as error:
            raise NotImplementedError(
                f"the FLOPs of {config.model_type} cannot be counted: its code depends on values, of which there are none"
            ) from error
    model = _models[key]
    chunk = chunk_size(config.get_text_config().vocab_size)
    lengths = tree.pass_lengths

    def step(sequences: list[tuple[np.ndarray, np.ndarray]], tokens: int, logits: list[int], kept: int) -> Cost:
        attention = sum(
            flops * sum(_tiles(*sequence, window) for sequence in sequences)
            for window, flops in model.tile_flops.items()
        )
        return Cost(
            tokens=tokens,
            logits=sum(logits),
            linear_flops=_STEP * model.linear_flops * tokens,
            attention_flops=_ATTENTION_STEP * attention,
            loss_flops=model.logits_flops * sum(n * (4 if n > chunk else _STEP) for n in logits),
            activation_bytes=round(model.activation_bytes * kept),
            gathered_bytes=max(
                (
                    of_key * gathered_keys(torch.from_numpy(ends)[None], sliding_window=window)
                    for window, of_key in model.key_bytes.items()
                    for ends, _ in sequences
                ),
                default=0,
            ),
        )

    passes = [(np.full(n, n, np.int32), np.arange(n)) for n in lengths.tolist()]
    total, longest = int(lengths.sum()), int(lengths.max())
    n_pass = step(passes, total, tree.pass_supervised.tolist(), longest)
    return CostComparison(
        one_pass=step([(tree.subtree_end, tree.position_ids)], len(tree), [tree.num_targets], len(tree)),
        n_pass=n_pass,
        n_pass_all_logits=replace(n_pass, logits=total, loss_flops=_STEP * model.logits_flops * total),
    )


def _tiles(subtree_end: np.ndarray, position_ids: np.ndarray, window: int | None) -> int:
    ends, positions = torch.from_numpy(subtree_end)[None], torch.from_numpy(position_ids)[None]
    return sum(count_tiles(ends, position_ids=positions, sliding_window=window))


def _grouped_product_flops(states, weights, *args, out_shape=None, **kwargs) -> int:
    """(tokens, in), sorted by expert, times the (experts, in, out) of theirs. PyTorch's counter does not know it."""
    return 2 * states[0] * weights[-2] * weights[-1]


def _scan_flops(query, key, value, gate, *args, out_shape=None, **kwargs) -> int:
    """Of a recurrence, by chunks of S tokens: in each, pairs of queries and keys, and what is written for them; the state is
    read, and written. With the delta rule pairs of keys, too, a triangular system, and what the state takes away."""
    (_, length, heads, value_size), (key_heads, key_size) = value, key[2:]
    size = CHUNK if len(gate) == 3 else CHUNK_PER_CHANNEL
    state, pairs = 2 * key_size * value_size, 2 * size * key_size
    flops = key_heads * pairs + heads * (2 * state + 2 * size * value_size)
    if args[0] is not None:
        flops += key_heads * pairs + heads * (state + size * (key_size + value_size))
    return length * flops


_UNKNOWN_TO_PYTORCH = {
    torch.ops.aten._grouped_mm: _grouped_product_flops,
    torch.ops.flexmask.tree_scan: _scan_flops,
}


@dataclass(frozen=True)
class _Model:
    """The forward of a model: FLOPs of a token, of its logits, of a tile in all layers of a window; bytes of a key and its value
    in the layer of a window that has the most; bytes of a token."""

    linear_flops: float
    logits_flops: float
    tile_flops: dict[int | None, int]
    key_bytes: dict[int | None, int]
    activation_bytes: float


_models: dict[tuple[type, str], _Model] = {}  # configuration, as JSON -> what was counted


def _model(config: PreTrainedConfig) -> _Model:
    """Run the model once on fake tensors, which have shapes only, and record what it does."""
    config = type(config).from_dict(config.to_dict())  # without what was chosen for a model: attention, experts
    with FakeTensorMode(), using_backend("blockwise"):  # whose operator is recorded
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.bfloat16).train()
        tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long)
        inputs = {"input_ids": tokens, "position_ids": tokens, "subtree_end": tokens.to(torch.int32)}
        weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        saved = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            saved.append(x)  # kept alive, so that no two share an address
            return x

        calls = _AttentionCalls()
        with (
            FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_PYTORCH) as flops,
            calls,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            model.base_model(**inputs, use_cache=False)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    text = config.get_text_config()
    return _Model(
        linear_flops=flops.get_total_flops() / _PROBE_TOKENS,
        logits_flops=2 * text.hidden_size * text.vocab_size,
        tile_flops=dict(calls.tile_flops),
        key_bytes=calls.key_bytes,
        activation_bytes=sum(size for storage, size in storages.items() if storage not in weights) / _PROBE_TOKENS,
    )


class _AttentionCalls(TorchDispatchMode):
    """Records the calls of tree attention, by the `blockwise` operator. What convolutions compute again at forks, of which
    fake tensors do not know how many there are, is left out."""

    def __init__(self):
        super().__init__()
        self.tile_flops = Counter()  # window -> of all its layers
        self.key_bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.flexmask.blockwise_forward.default:
            query, key, value, *_, window = args
            self.tile_flops[window] += 2 * query.shape[1] * (query.shape[-1] + value.shape[-1]) * BLOCK_SIZE**2
            of_key = key.shape[1] * 2 * head_size(key.shape[-1], value.shape[-1]) * key.dtype.itemsize
            self.key_bytes[window] = max(of_key, self.key_bytes.get(window, 0))
        if function is torch.ops.flexmask.conv_windows.default:
            subtree_end, width = args
            return tuple(subtree_end.new_empty(shape, dtype=torch.int64) for shape in ((0, width), (0,)))
        return function(*args, **kwargs or {})
