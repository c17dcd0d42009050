"""flexmask: fine-tune language models on multi-turn reasoning in one pass, with exactly the losses of N passes."""

import importlib

from .attention import set_backend, tree_attention
from .branches import backward_by_branches
from .collator import OnePassCollator
from .cost import cost
from .integrations.transformers import register as _register
from .loss import tree_logprobs, tree_loss
from .mask import tree_block_mask
from .messages import ConversationError
from .packing import pack, pack_stream, split
from .passes import Pass, render_passes
from .prefixes import share_prefixes
from .tree import TokenTree
from .verify import verify

__version__ = "0.1.0"
__all__ = [
    "ConversationError",
    "OnePassCollator",
    "OnePassTrainer",
    "OnePassTrainingArguments",
    "Pass",
    "TokenTree",
    "backward_by_branches",
    "cost",
    "pack",
    "pack_stream",
    "render_passes",
    "set_backend",
    "share_prefixes",
    "split",
    "tree_attention",
    "tree_block_mask",
    "tree_logprobs",
    "tree_loss",
    "verify",
]

_register()


def __getattr__(name: str):
    """Modules that are not imported above, and the Trainer, which takes seconds to import."""
    if name in ("arguments", "data", "demo", "inspect", "page", "sources"):
        return importlib.import_module(f".{name}", __name__)
    module = {"OnePassTrainer": "trainer", "OnePassTrainingArguments": "arguments"}.get(name)
    if module is not None:
        return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
