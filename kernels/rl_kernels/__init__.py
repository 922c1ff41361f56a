"""Operations whose memory, not arithmetic, decides how long a sequence can be trained.

One folder per operation: reference.py (naive), op.py (what to call), README.md (what it costs).
Imports torch and the standard library only.
"""

from rl_kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
