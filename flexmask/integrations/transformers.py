"""`attn_implementation="flexmask"` for Hugging Face models.

With `subtree_end` in the batch, attention is over the tree. Without it, everything is as with the library's own
`sdpa`: padding masks, key/value caches, `generate`.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..attention import tree_attention

NAME = "flexmask"

# Layers that mix tokens only through the attention function.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Families whose class looks fine and which still would train wrongly; found by tests/test_architectures.py.
_REFUSED = {
    "nemotron": "its attention layers do not receive the keywords given to the model, subtree_end among them",
}


class DeferredMask:
    """The arguments of a mask function, until an attention call without `subtree_end` needs the mask itself.

    The library asks for masks before any layer runs, and does not say whether the batch is a tree. Making the dense
    mask then would cost what this package exists to avoid.
    """

    def __init__(self, arguments: dict):
        self.arguments = arguments
        self.made: Tensor | None = None
        self.is_made = False

    def make(self) -> Tensor | None:
        if not self.is_made:
            self.made, self.is_made = sdpa_mask(**self.arguments), True
        return self.made


def _mask_function(**arguments) -> Tensor | DeferredMask | None:
    check_config(arguments["config"])
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
    **kwargs,
) -> tuple[Tensor, None]:
    if subtree_end is None:
        mask = attention_mask.make() if isinstance(attention_mask, DeferredMask) else attention_mask
        return _plain_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

    _check_layer(module, attention_mask, dropout, kwargs)
    out = tree_attention(
        query,
        key,
        value,
        subtree_end,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sliding_window=kwargs.get("sliding_window"),
        position_ids=kwargs.get("position_ids"),
        sinks=kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


def _plain_attention(module, query, key, value, mask: Tensor | None, **kwargs):
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    # PyTorch's attention has neither soft-cap nor sinks; the model's own eager function has, and adds float masks.
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kwargs)[0], None


def _check_layer(module, attention_mask, dropout: float, kwargs: dict) -> None:
    config = module.config
    check_config(config)
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
        raise ValueError(
            "got attention_mask and subtree_end; a tree batch needs no attention_mask, its padding sees itself"
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; tree attention has none, set config.attention_dropout = 0")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; a tree holds causal passes")
    layer_types = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    has_window = layer_types[layer] == "sliding_attention" if layer_types and layer is not None else None
    if has_window and kwargs.get("sliding_window") is None:
        raise ValueError(
            f"layer {layer} of {config.model_type} has a sliding window that its attention function is not told of; "
            "the tree would be trained without it"
        )


@functools.lru_cache(maxsize=64)
def _refusal(config_class: type, layer_types: tuple[str, ...], model_type: str) -> str | None:
    """Why a model of this configuration would be trained wrongly, or None."""
    strange = sorted(set(layer_types) - _ATTENTION_LAYERS)
    if strange:
        return f"it has layers of type {', '.join(strange)}, which mix tokens past the attention mask"
    if model_type in _REFUSED:
        return _REFUSED[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:
        return None
    if getattr(model_class, "_is_stateful", False):
        return "it is recurrent: its state would carry one branch into the next"
    if not model_class._can_set_attn_implementation():
        return "its attention does not go through the library's attention interface"
    if not model_class._supports_attention_backend:
        return "its attention layers do not receive the keywords given to the model, subtree_end among them"
    return None


def check_config(config: PreTrainedConfig) -> None:
    """Refuse an architecture that one-pass training would train wrongly.

    Raises:
        NotImplementedError: naming the architecture and the reason.
    """
    config = config.get_text_config()
    reason = _refusal(type(config), tuple(getattr(config, "layer_types", None) or ()), config.model_type)
    if reason:
        raise NotImplementedError(
            f'{config.model_type} cannot be used with attn_implementation="flexmask": {reason}. Use "sdpa" and N passes'
        )


def register() -> None:
    """Make `attn_implementation="flexmask"` known to transformers."""
    AttentionInterface.register(NAME, _attention_function)
    AttentionMaskInterface.register(NAME, _mask_function)
