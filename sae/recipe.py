"""Batch size and learning rate by the length of a run, where nobody gives them. No torch here.

One idea: a longer run has both more and larger steps, and the more steps there are the smaller they may be.
"""

import math

SAEBENCH_STEPS = 244_000  # of 2,048 tokens: 500 million (2503.09532)


def batch_for(tokens: int) -> int:
    """Tokens to a step: ``1024 · √(tokens / 4 million)`` as a power of two from 64 to 4,096, for ``tokens`` read.

    Measured on the bundled model: 1,024 beats 512 and 2,048 at 4 million, 256 beats 64 at 200,000.
    """
    exponent = round(10 + math.log2(tokens / 4_000_000) / 2)
    return int(2 ** min(max(exponent, 6), 12))


def rate_for(n_steps: int) -> float:
    """Peak learning rate of Adam: ``4.3e-3 · (4000 / steps)^0.65``, at most 6e-3.

    It passes through the best of what we measured on the bundled model (3,906 steps of 1,024 tokens, 3e-3 to 6e-3)
    and through SAEBench's recipe (3e-4 for 244,000 steps of 2,048 tokens). The usual 2e-4/√(d_sae / 2¹⁴) is made for
    such long runs, and starves a short one.
    """
    return min(6e-3, 4.3e-3 * (4000 / max(n_steps, 1)) ** 0.65)
