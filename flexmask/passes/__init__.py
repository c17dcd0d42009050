"""A conversation -> its N passes, rendered by the model's own chat template."""

from .render import EMPTY_REASONING, TRAIN_ON, UNWRITTEN_TOOLS, Pass, render_conversation, render_passes

__all__ = ["EMPTY_REASONING", "TRAIN_ON", "UNWRITTEN_TOOLS", "Pass", "render_conversation", "render_passes"]
