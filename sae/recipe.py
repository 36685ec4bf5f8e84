"""Batch size and learning rate by the length of a run, where nobody gives them. No torch here.

One idea: a longer run has both more and larger steps, and the more steps there are the smaller they may be; so may
those of a wider dictionary.
"""

import math

SAEBENCH_STEPS = 244_000  # of 2,048 tokens: 500 million (2503.09532)


def batch_for(tokens: int) -> int:
    """Tokens to a step: ``1024 · √(tokens / 4 million)`` as a power of two from 64 to 4,096, for ``tokens`` read.

    Measured on the bundled model: 1,024 beats 512 and 2,048 at 4 million, 256 beats 64 at 200,000.
    """
    exponent = round(10 + math.log2(tokens / 4_000_000) / 2)
    return int(2 ** min(max(exponent, 6), 12))


def rate_for(n_steps: int, d_sae: int) -> float:
    """Peak learning rate of Adam: ``min(6e-3, 4.3e-3 · (4000 / steps)^0.65) · (4096 / d_sae)^¼``.

    In the number of steps it passes through the best of what we measured on the bundled model (3,906 steps of 1,024
    tokens, 3e-3 to 6e-3) and through SAEBench's recipe (3e-4 for 244,000 steps of 2,048 tokens). In the width it
    follows three sweeps of 976 steps (TopK, k = 32; explained variance at 3e-3, 6e-3 and 12e-3): 0.846, 0.859, 0.860
    with 1,024 features, 0.875, 0.887, 0.865 with 4,096, and 0.8827, 0.8830 (12e-3 was not run) with 16,384, whose
    best points lie near 9e-3, 5.5e-3 and 4e-3. The usual 2e-4/√(d_sae / 2¹⁴) is made for hundreds of millions of
    tokens, and starves a short run.
    """
    return min(6e-3, 4.3e-3 * (4000 / max(n_steps, 1)) ** 0.65) * (4096 / d_sae) ** 0.25
