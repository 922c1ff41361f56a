"""What a source of problems returns, before a tokenizer is involved, and the split into train and held-out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["HELDOUT_BUCKETS", "MAX_DRAWS", "Message", "Problem", "Problems", "asked", "in_split"]

HELDOUT_BUCKETS = 8
MAX_DRAWS = 1000

Message = Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """One problem: its text (or chat messages), its answer and, for SFT, a worked response."""

    id: str
    text: str | tuple[Message, ...]
    answer: str
    domain: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    response: str | None = None


class Problems(Protocol):
    """A fixed, indexable collection; problem i is the same at every access."""

    @property
    def domains(self) -> frozenset[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


def asked(text: str | tuple[Message, ...]) -> str:
    """The text of a problem; for chat messages, what the user says."""
    if isinstance(text, str):
        return text
    return "\n".join(message["content"] for message in text if message["role"] == "user")


def in_split(text: str | tuple[Message, ...], split: str) -> bool:
    """Whether a problem text belongs to `split` (train | heldout | all).

    The text's own hash decides, so no seed, file or index can put one text into both train and heldout. The system
    message makes no difference, and neither does whether the text is a chat.
    """
    if split == "all":
        return True
    digest = hashlib.blake2b(asked(text).encode(), digest_size=8).digest()
    heldout = int.from_bytes(digest, "big") % HELDOUT_BUCKETS == 0
    return heldout == (split == "heldout")
