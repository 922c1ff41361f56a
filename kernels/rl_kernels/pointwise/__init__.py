"""Between the matrix products of a layer: see op.py and README.md."""

from rl_kernels.pointwise.op import Implementation, rotate, weighted_swiglu

__all__ = ["Implementation", "rotate", "weighted_swiglu"]
