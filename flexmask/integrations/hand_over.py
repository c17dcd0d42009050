"""Keys and values of one forward, handed to others that go on from its tokens, and their gradients handed back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HandOver:
    """What one forward is given by those that it continues, and what it keeps for those that continue it: a keyword of
    `model(…)`, which reaches every attention layer. (No dataclass: wrappers copy those.)

    The forwards that continue this one go backward before it does.

    Args:
        path: of the forwards that it continues, the first first.
        lead: places in front of their keys, of which nothing is seen.
        kept: how many of its own tokens to keep, the first ones. 0: nothing continues it.
    """

    def __init__(self, path: Sequence[HandOver], lead: int, kept: int):
        self.path, self.lead, self.kept = path, lead, kept
        self.is_backward = False  # set after the forward: what is computed again then is no new layer
        self._layers: set[torch.nn.Module] = set()
        self._keys: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}

    @torch.compiler.disable
    def extend(self, layer: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (1, heads, n, head_dim) and values of the forward's own tokens -> those that its queries read, with the m that
        are handed to it in front: (1, heads, m + n, head_dim).

        Raises:
            NotImplementedError: a layer that attends twice in a forward.
        """
        if layer in self._layers and not self.is_backward:
            raise NotImplementedError(
                f"{type(layer).__name__} attends several times in a forward, so its keys cannot be told apart; a row of this "
                "model cannot be run branch by branch, leave tokens_in_memory out"
            )
        self._layers.add(layer)
        return _Extended.apply(key, value, self, layer) if self.path or self.kept else (key, value)

    def _extended(self, layer: torch.nn.Module, own: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.kept:
            self._keys[layer] = tuple(x[:, :, : self.kept].detach() for x in own)
        found = []
        for which, x in enumerate(own):
            before = [earlier._keys[layer][which] for earlier in self.path]
            lead = x.new_zeros(*x.shape[:2], self.lead, x.shape[-1])
            found.append(torch.cat([lead, *before, x], 2) if before else x.view_as(x))
        return tuple(found)

    def _hand_back(self, layer: torch.nn.Module, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Gradients of what `extend` gave -> those of its own tokens, with what was handed back for them."""
        start = self.lead
        for earlier in self.path:
            found = tuple(x[:, :, start : start + earlier.kept] for x in gradients)
            earlier._add(layer, found)
            start += earlier.kept
        own = tuple(x[:, :, start:] for x in gradients)
        handed_back = self._gradients.pop(layer, None)
        if handed_back is None:
            return own
        rest = (0, 0, 0, own[0].shape[2] - self.kept)
        return tuple((x + torch.nn.functional.pad(y, rest)).to(x.dtype) for x, y in zip(own, handed_back, strict=True))

    def check_done(self) -> None:
        """After the backward: gradients that were handed back must have gone into it.

        Raises:
            RuntimeError: they have not, so that those of parameters are wrong.
        """
        if self._gradients:
            names = sorted({type(layer).__name__ for layer in self._gradients})
            raise RuntimeError(f"gradients of the keys of {', '.join(names)} were handed back, and nothing took them")

    def _add(self, layer: torch.nn.Module, gradients: tuple[Tensor, ...]) -> None:
        """In float32 at least: they come from many branches."""
        if layer not in self._gradients:
            wide = [torch.promote_types(x.dtype, torch.float32) for x in gradients]
            self._gradients[layer] = tuple(x.to(dtype, copy=True) for x, dtype in zip(gradients, wide, strict=True))
            return
        for total, x in zip(self._gradients[layer], gradients, strict=True):
            total += x


class _Extended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, value, hand_over, layer):
        ctx.hand_over, ctx.layer = hand_over, layer
        return hand_over._extended(layer, (key, value))

    @staticmethod
    def backward(ctx, grad_key, grad_value):
        return *ctx.hand_over._hand_back(ctx.layer, (grad_key, grad_value)), None, None
