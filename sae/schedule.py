"""How the learning rate moves: linear warm-up, constant, linear decay to 0, in fractions of the run."""


def rate_factor(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """The factor on the peak learning rate at a step (0 is the first); above 0, at most 1.

    It rises from ``1 / (warmup · n_steps)`` at the first step and falls to ``1 / (decay · n_steps)`` at the last.
    """
    done = (step + 1) / n_steps
    rise = done / warmup if warmup else 1.0
    fall = (1 - done + 1 / n_steps) / decay if decay else 1.0
    return min(rise, fall, 1.0)
