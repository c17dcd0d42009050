"""A padded batch of sequences -> one run over their prefix tree, inside the model, for trainers that know no trees."""

from __future__ import annotations

import logging
import types

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .collator import to_inputs
from .integrations.mixers import begin
from .integrations.transformers import NAME, check_config, check_noise, inner_model
from .passes import Pass
from .tree import TokenTree

logger = logging.getLogger(__name__)


def share_prefixes(model):
    """Make a model run what the sequences of a padded batch have in common once, and not once for each.

    For trainers whose batches are several sequences with equal beginnings, such as TRL's: the completions of a group
    (GRPO, RLOO), chosen and rejected answers (DPO), the N passes of a conversation. The batch is merged into its prefix
    tree before the first layer, and the last hidden states are put back into the padded layout after the last layer. So
    outputs, losses and gradients at all tokens are those of the padded batch, and the trainer stays as it is:

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flexmask")
        trainer = GRPOTrainer(flexmask.share_prefixes(model), …)

    Only what is in the same batch is shared; the first one that is trained tells how much. TRL's GRPO with gradient accumulation
    spreads a group over batches, but for `steps_per_generation=1`.

    Left alone are calls with a key/value cache (`generate`), with one sequence, and with a tree batch. The hidden state
    at a padding position, which is of no use in the padded batch either, is that of some token. A reference model of
    its own (`trainer.ref_model`) shares prefixes if it is handed over, too. Building the tree needs the tokens on the
    CPU, once per call. Every sequence begins at position 0, wherever its padding is; the library itself begins there only
    if it is given position_ids, which makes a difference for models with absolute positions (GPT-2) alone.

    Args:
        model: a causal LM loaded with attn_implementation="flexmask", wrapped (PEFT, DDP) or not. It is changed in
            place; calling this twice changes nothing.

    Returns:
        The model.

    Raises:
        TypeError: not a Hugging Face model, nor one around it.
        ValueError: a model with another attention.
        NotImplementedError: an architecture that a tree would compute wrongly.
    A call of the model raises ValueError for position_ids that are not those of padded sequences, for padding between
    tokens without position_ids, and for masks of other than two dimensions; NotImplementedError where hidden states or
    router logits of every layer are asked for.
    """
    inner = inner_model(model)
    if inner.config._attn_implementation != NAME:
        raise ValueError(
            f'share_prefixes: the model has attn_implementation="{inner.config._attn_implementation}", expected "{NAME}"'
        )
    check_config(inner.config)
    base = inner.base_model
    if base is inner and inner.can_generate():
        raise NotImplementedError(
            f"share_prefixes: {type(inner).__name__} does not know the body inside it as its base_model, so nothing can be put "
            "before and behind that; leave share_prefixes out"
        )
    if "padded_forward" not in base.__dict__ or base.forward == base.padded_forward:  # equal after unpickling
        # Both are bound methods, so that a deep copy of the model runs its own weights.
        base.padded_forward = base.forward
        base.forward = types.MethodType(forward, base)
    return model


def forward(base: PreTrainedModel, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
    """The forward of a base model that shares prefixes. Named so that a pickle, which keeps a bound method by its name,
    finds the model's own: an unpickled model shares nothing until it is handed to `share_prefixes` again."""
    cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
    if cached or "subtree_end" in kwargs or input_ids is None or len(input_ids) == 1:
        return base.padded_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    merged = _merge(input_ids, attention_mask, kwargs.get("position_ids"))
    if merged is None:
        return base.padded_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    check_noise(base)
    inputs, places = merged
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(base.config, name, False)):
            raise NotImplementedError(
                f"{name} asks for values of every layer, which exist for the tree only and not for the padded batch; "
                f"set {name}=False, or do not use share_prefixes"
            )
    if base.training and torch.is_grad_enabled() and not base.__dict__.get("told_sharing"):
        base.told_sharing = True
        run, asked = (
            inputs["input_ids"].shape[1],
            input_ids.numel() if attention_mask is None else int(attention_mask.sum()),
        )
        logger.warning(
            "flexmask: the first batch runs %d tokens in place of %d (%.2f times fewer)", run, asked, asked / run
        )
    output = base.padded_forward(**begin(base, kwargs | inputs | {"return_dict": True}))
    return type(output)(last_hidden_state=output.last_hidden_state[0, places])


@torch.compiler.disable
def _merge(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> tuple[dict, Tensor] | None:
    """Tensors of the tree, and where each token of the padded batch is in it: int64 (batch, L), 0 for padding. None where there
    is more than one sequence of a single token: several trees of one token would pass for padding (`flexmask.chains`)."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(real.shape)}, expected that of input_ids, {tuple(input_ids.shape)}: which "
            "tokens are no padding"
        )
    real = real.bool()
    if position_ids is not None and not torch.equal(position_ids.expand_as(real)[real], (real.cumsum(1) - 1)[real]):
        raise ValueError(
            "position_ids do not count the tokens of each sequence from 0; packed sequences and other positions cannot "
            "be merged, leave position_ids out"
        )
    tokens, mask = input_ids.cpu().numpy(), real.cpu().numpy()
    begins = mask[:, 1:] & ~mask[:, :-1]
    if position_ids is None and (begins.sum(1) + mask[:, 0] > 1).any():
        raise ValueError(
            "attention_mask has padding between the tokens of a sequence, expected it before or after them; hand over "
            "position_ids that count the tokens only"
        )
    sequences = [ids[m] for ids, m in zip(tokens, mask) if m.any()]
    if not sequences:
        raise ValueError("the batch is nothing but padding")
    if sum(len(ids) == 1 for ids in sequences) > 1:
        return None
    tree = TokenTree.from_passes([Pass(ids, np.zeros(len(ids), bool)) for ids in sequences])
    places = np.zeros(mask.shape, np.int64)
    places[mask] = np.concatenate(tree.paths())
    inputs = {name: x.to(input_ids.device) for name, x in to_inputs(tree).items()}
    return inputs, torch.from_numpy(places).to(input_ids.device)
