"""What became of conversations. Nothing is left out without being counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

NOTE, IGNORED, ABSENT = "note: ", "ignored: ", "absent: "  # what names of counts begin with
NOTHING_LEFT = "conversations dropped, because nothing of them is left to train"


@dataclass(frozen=True)
class Counts:
    """What became of conversations, and what was lost on the way. Passes and targets are counted before any loss. `str()`
    tells it in a few lines.

    Attributes:
        conversations: how many were given.
        dropped: conversations left out.
        truncated: conversations kept without some of their passes or targets.
        passes: passes of all conversations.
        passes_lost: passes of which nothing is trained.
        targets: supervised tokens of all passes.
        targets_lost: supervised tokens that are not trained, those of lost passes included.
        tokens: of all trees.
        pass_tokens: of the same passes as separate sequences.
        longest_pass: tokens of the longest pass, before any loss.
        largest_token: the largest token id of all trees.
        notes: what rendering has to say, and of how much.
        ignored: keys of the records that nobody reads, and in how many.
        absent: names of `columns`, and how many records lack them.
    """

    conversations: int = 0
    dropped: int = 0
    truncated: int = 0
    passes: int = 0
    passes_lost: int = 0
    targets: int = 0
    targets_lost: int = 0
    tokens: int = 0
    pass_tokens: int = 0
    longest_pass: int = 0
    largest_token: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, int] = field(default_factory=dict)

    @property
    def never_found(self) -> list[str]:
        """Names of `columns` that no conversation has."""
        return [name for name, count in self.absent.items() if count == self.conversations]

    @classmethod
    def of(cls, counted: Mapping[str, int], **more):
        """From what a `TreeMaker` counts."""
        numbers = {f.name: counted[f.name] for f in fields(Counts) if f.name in counted}
        for name, prefix in (("notes", NOTE), ("ignored", IGNORED), ("absent", ABSENT)):
            numbers[name] = {k.removeprefix(prefix): n for k, n in sorted(counted.items()) if k.startswith(prefix)}
        return cls(**numbers, **more)

    def __str__(self) -> str:
        kept = self.conversations - self.dropped
        text = (
            f"{self.conversations:,} conversations, {self.passes:,} passes, {self.targets:,} targets -> "
            f"{kept:,} trees with {self.tokens:,} tokens"
        )
        if kept:
            text += f" ({self.pass_tokens:,} in separate passes, {self.pass_tokens / self.tokens:.2f}x)"
        dropped = self.dropped - self.notes.get(NOTHING_LEFT, 0)
        if dropped or self.truncated:
            text += (
                f"\nLOST to max_length or max_tokens: {dropped:,} conversations dropped, {self.truncated:,} "
                f"truncated; {self.passes_lost:,} passes and {self.targets_lost:,} targets "
                f"({self.targets_lost / self.targets:.2%}) are not trained"
            )
        else:
            text += "\nno conversation dropped or truncated for its length"
        for name, count in self.notes.items():
            text += f"\n{name}: {count:,}"
        if self.ignored:
            text += "\nnobody reads these keys of the records: "
            text += ", ".join(f"{key} ({count:,})" for key, count in self.ignored.items())
        for name, count in self.absent.items():
            text += f"\n{count:,} records lack the column {name}, which columns names"
        return text
