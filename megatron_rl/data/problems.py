"""What a source of problems hands on before a tokenizer is involved, and the train/held-out split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["HELDOUT_BUCKETS", "MAX_DRAWS", "Message", "Problem", "Problems", "in_split"]

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


def in_split(text: str | tuple[Message, ...], split: str) -> bool:
    """Whether a problem text belongs to `split` (train | heldout | all).

    The text's own hash decides, so no seed, file or index can put one text into both train and heldout.
    """
    if split == "all":
        return True
    key = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    heldout = int.from_bytes(digest, "big") % HELDOUT_BUCKETS == 0
    return heldout == (split == "heldout")
