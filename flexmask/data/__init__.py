"""Records -> conversations -> trees, prepared once and kept, or as a stream. Nothing is left out without being counted."""

from .columns import Trees
from .counts import Counts
from .making import OVERLONG, TreeMaker, tokenizer_fingerprint, tree_maker
from .preparation import Preparation, build_trees, check_columns, load_conversations, prepare

__all__ = [
    "OVERLONG",
    "Counts",
    "Preparation",
    "TreeMaker",
    "Trees",
    "build_trees",
    "check_columns",
    "load_conversations",
    "prepare",
    "tokenizer_fingerprint",
    "tree_maker",
]
