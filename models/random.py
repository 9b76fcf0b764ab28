"""Random numbers that are a function of keys, never of history.

Every random draw of training is keyed by (seed, step, ...), every sample by its own seed. So a resumed run draws the
numbers that an uninterrupted one would, and the number of processes changes nothing.
"""

import numpy as np
import torch


def keyed_seed(*keys: int) -> int:
    """Hash non-negative integers, such as (seed, step, stream), to one 63-bit seed."""
    # the length comes first, for SeedSequence pads with zeros: (a, b) and (a, b, 0) would be one key
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0] >> 1)


def keyed_generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device` whose stream depends on `keys` alone."""
    return torch.Generator(device).manual_seed(keyed_seed(*keys))
