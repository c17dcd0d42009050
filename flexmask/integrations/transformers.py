"""`attn_implementation="flexmask"` for Hugging Face models.

With `subtree_end` in the batch, attention is over the tree. Without it, everything is as with the library's own
`sdpa`: padding masks, key/value caches, `generate`. A model that a tree would train wrongly is refused: by what its
class and configuration say, when it is loaded; by what a layer is called with, at the first batch.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.import_utils import is_tracing

from ..attention import tree_attention
from ..mask import depths, once_per_forward
from ..messages import ConversationError
from . import mixers
from .hand_over import HandOver
from .ulysses import RankShare

NAME = "flexmask"

# Types of layers that mix tokens only through the attention function, or not at all.
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
# Families that no rule below catches and that a tree still would train wrongly, found by running all of them.
_REFUSED = {
    "doge": "its attention layers add scores of their own to the mask",
    "kosmos_2_5_text_model": "it counts positions from its padding token on",
    "moshi": "in some versions of transformers its attention layers do not receive subtree_end",
    "nemotron": "its attention layers do not receive subtree_end",
}


class DeferredMask:
    """The arguments of a mask function, until an attention call without `subtree_end` needs the mask itself.

    The library asks for masks before any layer runs, and does not say whether the batch is a tree. Making the dense
    mask then would cost what this package exists to avoid.
    """

    def __init__(self, arguments: dict):
        self.arguments = arguments

    @functools.cached_property
    def dense(self) -> Tensor | None:
        return sdpa_mask(**self.arguments)

    def __getitem__(self, at: tuple) -> DeferredMask | Tensor:
        """A part of the mask (batch, heads, queries, keys); all of it stays deferred. (Gemma 4 asks for the last queries.)"""
        if all(part in (slice(None), slice(0, None)) for part in at):
            return self
        return sdpa_mask(**self.arguments | {"allow_is_causal_skip": False})[at]

    def reach(self) -> tuple[int | None, int | None]:
        """The sliding window, and the size of the chunks beyond which attention does not reach; both None for a plain causal
        mask. Layers need not be told of it otherwise.

        Raises:
            NotImplementedError: a mask of another kind.
        """
        config, size = self.arguments["config"], self.arguments.get("local_size")
        kind = None
        if "allow_is_bidirectional_skip" in self.arguments:
            kind = "sees tokens in both directions"
        elif self.arguments.get("use_vmap"):
            kind = "has exceptions of its own (for images, say)"
        if kind:
            raise _refuse(config, f"its attention mask {kind}")
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if size is None:
            return None, None
        if (size == window) == (size == chunk):
            raise _refuse(
                config, f"its attention mask reaches {size} tokens, with a window of {window} and chunks of {chunk}"
            )
        return (size, None) if size == window else (None, size)


def _mask_function(**arguments) -> Tensor | DeferredMask | None:
    may_be_tree = arguments.get("attention_mask") is None and arguments["q_length"] == arguments["kv_length"]
    return DeferredMask(arguments) if may_be_tree else sdpa_mask(**arguments)


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    subtree_end: Tensor | None = None,
    hand_over: HandOver | None = None,
    rank_share: RankShare | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    if subtree_end is None:
        mask = attention_mask.dense if isinstance(attention_mask, DeferredMask) else attention_mask
        return _plain_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

    window, positions = _check_layer(module, attention_mask, dropout, subtree_end, kwargs)
    mixers.note()
    query, sinks = _at_temperature(module, query, subtree_end, rank_share), kwargs.get("s_aux")
    if hand_over is not None:
        key, value = hand_over.extend(module, key, value)
    if rank_share is not None:
        query, key, value = rank_share.to_heads(query, key, value)
        sinks = None if sinks is None else rank_share.own(sinks, 0)
    out = tree_attention(
        query,
        key,
        value,
        subtree_end,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sliding_window=window,
        position_ids=positions,
        sinks=sinks,
    )
    if rank_share is not None:
        out = rank_share.to_tokens(out)
    return out.transpose(1, 2).contiguous(), None


def _plain_attention(module, query, key, value, mask: Tensor | None, **kwargs):
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    # PyTorch's attention has neither soft-cap nor sinks; the model's own eager function has, and adds float masks.
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kwargs)[0], None


def _at_temperature(module, query: Tensor, subtree_end: Tensor, rank_share: RankShare | None) -> Tensor:
    """Queries of Llama 4's layers without rotary embeddings, which it scales by their places in the row, scaled by their
    positions in the pass instead (arXiv 2501.19399)."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    places = torch.arange(query.shape[2], device=query.device)
    exact = torch.promote_types(query.dtype, torch.float32)
    positions = once_per_forward(depths, subtree_end)
    positions = positions[:, -query.shape[2] :] if rank_share is None else rank_share.own(positions)
    factor = scale(positions).to(exact) / scale(places).to(exact)
    return (query * factor[:, None, :, None]).to(query.dtype)


# What a layer refuses, too: a model whose attention was chosen behind the library's back has no hooks.
_WEIGHTS_UNREAD = (
    "the batch has target_weight, which the model's own loss would ignore; use flexmask.tree_loss(model, batch), or "
    "flexmask.OnePassTrainer"
)
_MASK_BESIDE_TREE = (
    "got an attention_mask, or past_key_values, beside subtree_end; a tree batch takes neither: it is a whole row, and its "
    "padding sees itself"
)


def _chunk_beginnings(subtree_end: Tensor, *, size: int) -> Tensor:
    return depths(subtree_end) // size * size


def _check_layer(module, mask, dropout: float, subtree_end: Tensor, kwargs: dict) -> tuple[int | None, Tensor | None]:
    """Refuse a layer that is called with what a tree cannot have. Returns its sliding window and the positions it counts in,
    if it has one."""
    config = module.config
    if not torch.compiler.is_compiling():
        check_config(config)
        text = config.get_text_config(decoder=True)
        if not mixers.is_installed(_model_class(text) or _model_class(config)):
            raise ValueError(
                "the recurrent layers of the model do not know of the tree, because its attention was chosen behind the "
                f'library\'s back; load it with attn_implementation="{NAME}", or call model.set_attn_implementation("{NAME}")'
            )
    if "target_weight" in kwargs:
        raise ValueError(_WEIGHTS_UNREAD)
    if isinstance(mask, Tensor):
        raise ValueError(_MASK_BESIDE_TREE)
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, and tree attention has none; "
            "set it to 0 when loading the model: from_pretrained(…, attention_dropout=0.0)"
        )
    layer = type(module).__name__
    if not getattr(module, "is_causal", True):
        raise _refuse(config, f"{layer} is not causal")
    if kwargs.get("position_bias") is not None:
        raise _refuse(config, f"{layer} adds a bias to the attention scores")
    window, chunk = mask.reach() if mask is not None else (None, None)
    if kwargs.get("sliding_window") not in (None, window):
        raise _refuse(config, f"{layer} has a window of {kwargs['sliding_window']}, and its attention mask {window}")

    limit, positions = _rotary_limit(config), kwargs.get("position_ids")
    if (window or limit) and positions is None:
        raise _refuse(config, f"{layer} is not told the position_ids of the batch")
    if (window or limit) and positions.shape[-1] < subtree_end.shape[1]:  # of some of the tokens
        positions = once_per_forward(depths, subtree_end)
    if limit is not None and not is_tracing(subtree_end):  # a check reads values
        longest = once_per_forward(_longest_path, subtree_end, position_ids=positions)
        if longest > limit:
            raise _refuse(
                config,
                f"a pass has {longest} tokens, and beyond {limit} the rotary embedding of a token depends on the length "
                "of its whole pass, of which a tree holds many; leave out longer passes (max_length)",
            )
    if chunk is not None:
        # The beginnings of their chunks are less than a chunk apart where they are equal.
        return chunk, once_per_forward(_chunk_beginnings, subtree_end, size=chunk)
    return window, None if window is None else positions


def _rotary_limit(config) -> int | None:
    """Tokens of a pass up to which its length does not change its rotary embedding; None if it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def _longest_path(subtree_end: Tensor, *, position_ids: Tensor) -> int:
    return int(position_ids.max()) + 1


def check_config(config: PreTrainedConfig, model_class: type | None = None) -> None:
    """Refuse an architecture that one-pass training would train wrongly.

    Args:
        config: of a causal LM, or of a model that has one inside.
        model_class: the class to judge by if transformers has none for this configuration.

    Raises:
        NotImplementedError: naming the architecture and the reason.
    """
    text = config.get_text_config(decoder=True)
    text_class = _model_class(text) or _model_class(config) or model_class
    encoder = hasattr(text, "is_decoder") and hasattr(text, "add_cross_attention")
    layer_types = tuple(getattr(text, "layer_types", None) or ())
    reason = _refusal(text.model_type, layer_types, encoder, text_class, _model_class(config) or text_class)
    if reason:
        raise _refuse(config, reason)


def inner_model(model: torch.nn.Module) -> PreTrainedModel:
    """The Hugging Face model in whatever is around it (PEFT, DDP, …).

    Raises:
        TypeError: there is none.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(f"got a {type(model).__name__}, expected a Hugging Face model")
    return inner


def _before_forward(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    """Refuse a tree batch that is no longer what the collator made, so that its loss would be another one's.

    Raises:
        ValueError: telling what is missing, and who takes it away.
    """
    if kwargs.get("subtree_end") is None:
        return
    if "target_weight" in kwargs:
        raise ValueError(_WEIGHTS_UNREAD)
    if isinstance(kwargs.get("attention_mask"), Tensor):
        raise ValueError(_MASK_BESIDE_TREE)
    if kwargs.get("position_ids") is None:
        raise ValueError(
            "a tree batch without position_ids: positions would be places in the row; hand them over. (PEFT's prompt tuning and "
            "prefix tuning take them out, and put tokens in front that the tree does not have: train LoRA instead)"
        )
    if model.get_output_embeddings() is None:
        # (Gemma 4's body takes it.)
        unread = not torch.compiler.is_compiling() and "logits_to_keep" in kwargs
        if unread and "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            raise ValueError(
                "something calls the body of the model with a tree batch to compute a loss of its own (the fused output layer of "
                "TRL's SFTTrainer does so, or it is no causal LM, but a classifier) and does not know logits_to_keep; make the "
                "batch with OnePassCollator(…, target_per_position=True), or use flexmask's OnePassTrainer, on a causal LM"
            )
        return
    labels, targets, places = (kwargs.get(name) for name in ("labels", "shift_labels", "logits_to_keep"))
    if (labels is None) != (targets is None):
        raise ValueError(
            "a tree batch has both labels and shift_labels, or neither, and "
            f"{'labels are' if labels is None else 'shift_labels are'} missing. The Trainer takes labels out for a "
            "compute_loss_func or a label_smoothing_factor, which shift them by one token, while a target need not be the right "
            "neighbour of where it is predicted; leave those out, or compute a loss from flexmask.tree_logprobs"
        )
    if targets is not None and isinstance(places, Tensor) and places.shape != targets.shape[1:]:
        raise ValueError(
            f"a tree batch with {places.numel()} logits_to_keep for {targets.numel()} targets: the batch was cut or joined on "
            'its way. Accelerate does so for an iterable dataset, unless accelerator_config={"dispatch_batches": False}'
        )
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "alora_invocation_tokens: PEFT looks for them in the whole row, where other passes have theirs; train LoRA without"
        )
    if (ids := kwargs.get("input_ids")) is not None and not is_tracing(ids):
        check_embedded(model, int(ids.max()))
    check_noise(model)


def check_noise(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose embeddings have NEFTune's noise."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
        raise ValueError(
            "neftune_noise_alpha: NEFTune scales its noise by the length of a sequence, and a row holds many; leave it out"
        )


def check_embedded(model: PreTrainedModel, largest: int) -> None:
    """Refuse token ids up to `largest`, if the model has no embedding for that.

    Raises:
        ConversationError: telling how many it has.
    """
    embedding = model.get_input_embeddings()
    embedding = embedding.get_base_layer() if hasattr(embedding, "get_base_layer") else embedding  # in an adapter
    embedded = getattr(embedding, "num_embeddings", None)
    if embedded is not None and largest >= embedded:
        raise ConversationError(
            f"token id {largest} has no embedding, the model has {embedded}; is this its tokenizer? "
            "(resize_token_embeddings for added tokens)"
        )


def with_router_loss(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configurations that ask for a router's loss: of a model, and of the causal LM inside it."""
    both = {id(of): of for of in (config, config.get_text_config(decoder=True))}
    return [of for of in both.values() if getattr(of, "output_router_logits", False)]


def check_in_parts(config: PreTrainedConfig, option: str, model_class: type | None = None) -> None:
    """Refuse an architecture of which a row cannot be run in parts, one after the other or on several ranks.

    Args:
        config: of a causal LM, or of a model that has one inside.
        option: that asks for it.
        model_class: the class to judge by if transformers has none for this configuration.

    Raises:
        NotImplementedError: its layers hand on more than keys and values; it has a loss of the whole row.
    """
    text = config.get_text_config(decoder=True)
    text_class = _model_class(text) or _model_class(config) or model_class
    reason = None
    if _is_recurrent(text_class, getattr(text, "layer_types", None) or ()):
        reason = "its recurrent or convolutional layers hand on states, which only the whole row has"
    elif with_router_loss(config):
        reason = "its router's loss is one of all tokens of a row; set output_router_logits=False"
    if reason:
        raise NotImplementedError(
            f"{text.model_type} cannot be trained with {option}: {reason}. Leave {option} out, or take smaller rows "
            "(max_tokens), which splits trees"
        )


def _refuse(config, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f'{config.model_type} cannot be trained with attn_implementation="{NAME}": {reason}. Train each turn as a sequence '
        "of its own, without flexmask"
    )


def _model_class(config: PreTrainedConfig) -> type | None:
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _is_recurrent(text_class: type | None, layer_types: Sequence[str]) -> bool:
    return bool(text_class and text_class._is_stateful) or not mixers.RECURRENT.isdisjoint(layer_types)


@functools.lru_cache(maxsize=256)
def _refusal(
    model_type: str, layer_types: tuple[str, ...], encoder: bool, text_class: type | None, model_class: type | None
) -> str | None:
    """Why a model would be trained wrongly, or None. `model_class` is `text_class`, or a larger model around it."""
    others = sorted(set(layer_types) - _LAYERS - mixers.RECURRENT)
    if others:
        return f"it has layers of type {', '.join(others)}, which flexmask does not know"
    if model_type in _REFUSED:
        return _REFUSED[model_type]
    if text_class is None:
        return None
    recurrent = _is_recurrent(text_class, layer_types)
    if recurrent and (reason := mixers.refusal(text_class, layer_types)):
        return reason
    if not text_class._can_set_attn_implementation():
        return "its attention does not go through the library's attention interface"
    if not (text_class._supports_attention_backend or recurrent):  # of those the layers are watched
        return "its attention layers are not declared to receive what the model is called with, subtree_end here"
    if "position_ids" not in inspect.signature(text_class.forward).parameters:
        return "it takes no position_ids: it counts places in the row, not positions in the pass"
    if "logits_to_keep" not in inspect.signature(model_class.forward).parameters:
        return "it takes no logits_to_keep, so its loss cannot be that of the targets"
    if encoder:
        return "it is an encoder by design, in which tokens see each other in both directions"
    return None


@functools.cache  # once, however often it is called
def register() -> None:
    """Make `attn_implementation="flexmask"` known to transformers, and two of its lookups stricter, process-wide.

    A model that is loaded with it is checked (`get_correct_attn_implementation`), and every other attention of that
    interface refuses a tree batch (`AttentionInterface.get_interface`), which it would take for one long sequence.
    (Architectures without the interface, or that drop keywords, cannot be told: they never see `subtree_end`.)
    """
    AttentionInterface.register(NAME, _attention_function)
    AttentionMaskInterface.register(NAME, _mask_function)
    _check_when_loading()
    _refuse_trees_elsewhere()


def _refuse_trees_elsewhere() -> None:
    library_lookup = AttentionInterface.get_interface

    @functools.wraps(library_lookup)
    def get_interface(self, attn_implementation, default):
        function = library_lookup(self, attn_implementation, default)
        return function if attn_implementation == NAME else functools.partial(_without_tree, function)

    AttentionInterface.get_interface = get_interface


def _without_tree(function, module, *args, subtree_end: Tensor | None = None, **kwargs):
    """Another attention function than ours, on a batch that is no tree."""
    if subtree_end is not None:
        raise ValueError(
            f'got a tree batch, but the model has attn_implementation="{module.config._attn_implementation}", which '
            f'cannot read subtree_end; load it with attn_implementation="{NAME}", or call '
            f'model.set_attn_implementation("{NAME}")'
        )
    return function(module, *args, **kwargs)


def _check_when_loading() -> None:
    """Every model asks itself, here, whether it can have the attention it is given; for ours it may be refused."""
    library_check = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(library_check)
    def checked(self, requested_attention, *args, **kwargs):
        if requested_attention == NAME:
            if self.can_generate():
                check_config(self.config, type(self))
            mixers.install(type(self))
            mixers.watch(self)  # when it is built, itself; when its attention is changed later, what is in it
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and _before_forward not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        return library_check(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked
