"""Schedules of the optimizer step that every system can use."""

import math


def learning_rate_factor(step: int, warmup_steps: int = 0, decay_steps: int | None = None) -> float:
    """Factor on the learning rate: linear warm-up, then constant, or a half cosine down to zero.

    Args:
        step: Optimizer step, from 0.
        warmup_steps: Steps until the full rate is reached; 0 starts with it.
        decay_steps: Step at which the half cosine arrives at zero; None keeps the rate constant.

    Returns:
        Factor in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
