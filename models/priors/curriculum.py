"""How long the clip of a training step is: short at first, the full length later.

MeBT (Yoo et al., CVPR 2023) trains its 128-frame models on windows of `L` latent frames, `L` drawn once a step from
a distribution that moves from 1 to the clip's `t` latent frames. The paper describes the idea; its release uses

    p_s(L)  proportional to  exp( -(s - (L-1) b)^2 / (2 (b c)^2) ),    s = optimizer step, L = 1..t

a discretised Gaussian with centre `1 + s/b` and standard deviation `c`, both in latent frames. That is `gaussian`
here, with any b and c; the release's `gaussian2` (b = 30,000, c = 2) and `gaussian100000_2` (b = 100,000, c = 2) exist
under these names too, as do its `longest` and `uniform`. At the 2,000,000 steps of its launch script
`gaussian100000_2` ends at about 21 of 32 latent frames, so `fraction`, the house's schedule, states instead at which
fraction of the run the full length is reached and then holds it. All are one family: a distribution of lengths that is
a function of the step, whose mean never falls.

Everything is a pure function of the step: a resumed run goes on where it was, and all ranks draw the same length.
"""

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from models.random import keyed_generator

Schedule: TypeAlias = Literal["longest", "uniform", "gaussian", "gaussian2", "gaussian100000_2", "linear", "fraction"]
# b and c of the release
RELEASED = {"gaussian2": (30_000.0, 2.0), "gaussian100000_2": (100_000.0, 2.0)}

# Sets the draw of the length apart from other draws with the key (seed, step), such as that of the window's start.
LENGTH_STREAM = int.from_bytes(b"clip", "big")


def length_probabilities(
    schedule: Schedule,
    step: int,
    max_length: int,
    *,
    total_steps: int,
    full_length_from: float,
    steps_per_frame: float,
    width: float,
) -> np.ndarray:
    """Probabilities of the clip lengths 1..`max_length` at an optimizer step.

    - `longest`: always `max_length`.
    - `uniform`: every length alike, at every step.
    - `gaussian`: MeBT's release, see the module's text; uses `steps_per_frame` (b) and `width` (c).
    - `gaussian2`, `gaussian100000_2`: the same with the b and c of the release.
    - `linear`: one length, growing linearly from 1 at step 0 to `max_length` at `full_length_from * total_steps`.
    - `fraction`: a Gaussian of standard deviation `width` whose centre grows as `linear` does; from
      `full_length_from * total_steps` on, always `max_length`.

    Args:
        schedule: name of the schedule.
        step: optimizer step, from 0.
        max_length: latent frames `t` of the full clip.
        total_steps: optimizer steps of the whole run; only `linear` and `fraction` read it.
        full_length_from: fraction of `total_steps`, in (0, 1], at which the full length is reached.
        steps_per_frame: steps (b) that `gaussian` takes to move by one latent frame.
        width: standard deviation (c) of `gaussian` and `fraction`, in latent frames.

    Returns:
        `[max_length]` float64; entry `i` belongs to length `i + 1`; sums to one.

    Raises:
        ValueError: if the schedule is unknown, or needs `total_steps` and there are none.
    """
    if schedule == "longest":
        return _certain(max_length, max_length)
    if schedule == "uniform":
        return np.full(max_length, 1 / max_length)
    if schedule in RELEASED:
        steps_per_frame, width = RELEASED[schedule]
    if schedule == "gaussian" or schedule in RELEASED:
        return _discretised_gaussian(1 + step / steps_per_frame, width, max_length)
    if schedule not in ("linear", "fraction"):
        raise ValueError(f"schedule {schedule!r} is unknown: use {', '.join(get_args(Schedule))}.")

    if total_steps < 1:
        raise ValueError(
            f"the curriculum schedule {schedule!r} grows over the whole run and needs its number of steps, "
            f"but max_steps={total_steps}: set --trainer.max_steps."
        )
    # rounded first, so that 0.55 * 100 = 55.00000000000001 is step 55
    full_from_step = math.ceil(round(full_length_from * total_steps, 6))
    if step >= full_from_step:
        return _certain(max_length, max_length)
    centre = 1 + (max_length - 1) * step / full_from_step
    if schedule == "linear":
        return _certain(math.floor(centre), max_length)
    return _discretised_gaussian(centre, width, max_length)


def expected_length(probabilities: np.ndarray) -> float:
    """Mean length in latent frames under `[t]` probabilities of the lengths 1..t."""
    return float(probabilities @ np.arange(1, len(probabilities) + 1))


def draw_length(probabilities: np.ndarray, seed: int, step: int) -> int:
    """Draw a length with the key (seed, step): the same on every rank and after every resume.

    Args:
        probabilities: `[t]`, of the lengths 1..t, as `length_probabilities` returns them.
        seed: the run's seed, non-negative.
        step: optimizer step.

    Returns:
        A length in 1..t; never one of probability zero.
    """
    generator = keyed_generator(seed, step, LENGTH_STREAM)
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()  # [0, 1)
    cumulative = np.cumsum(probabilities)
    # compared with the sum as it was rounded, which may lie a little below one
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")) + 1


def _certain(length: int, max_length: int) -> np.ndarray:
    probabilities = np.zeros(max_length)
    probabilities[length - 1] = 1
    return probabilities


def _discretised_gaussian(centre: float, width: float, max_length: int) -> np.ndarray:
    log_weights = -((np.arange(1, max_length + 1) - centre) ** 2) / (2 * width**2)
    # the weights themselves underflow to 0/0 about 38 widths away from the last length
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
