"""Trees -> rows: several trees in one sequence of at most `max_tokens` tokens, a larger tree in several parts."""

from .rows import Rows, join, pack
from .splitting import split
from .stream import RowStream, pack_stream

__all__ = ["RowStream", "Rows", "join", "pack", "pack_stream", "split"]
