"""Minutes on a card: the parts of a run on one GPU, in an order in which the first failure names its cause.

`make test-gpu` runs the files on this machine's GPU, in the order of their numbers. `make test` runs the same bodies
without one, tiny on the CPU or on a pretended GPU, so that a card need not find what a CPU can. What computes on a card
is a process of its own: one that faults leaves no broken CUDA context and no memory behind.
"""

from __future__ import annotations

import pytest
import torch

from tests.card.place import NO_CARD, Place


@pytest.fixture(scope="module")
def place(request) -> Place:
    if request.param == "card" and not torch.cuda.is_available():
        pytest.skip(NO_CARD)
    return Place(request.param)
