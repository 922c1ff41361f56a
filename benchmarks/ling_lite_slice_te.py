"""ling_lite_slice with model.backend=transformer_engine, whose layers are built by themselves (a baseline of its own).
"""

from __future__ import annotations

from functools import partial

from benchmarks.common import main
from benchmarks.ling_lite_slice import measure

if __name__ == "__main__":
    main("ling_lite_slice_te", partial(measure, backend="transformer_engine", experts="auto", router="auto",
                                       logprob="auto"), recompute="full", sequences=8, steps=3, trace="")
