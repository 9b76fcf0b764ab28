"""What two processes measure for the tests of metrics: rank 1 has other clips, a repeated one, and once none at all."""

import logging

import torch
from torch import Tensor

from models.metrics import (
    PSNR,
    DetectorCard,
    Features,
    FrechetDistance,
    InceptionCoherence,
    InceptionScore,
    KernelDistance,
    Preprocessing,
)
from models.metrics.samples import KEPT_ROWS
from models.random import keyed_generator

SIZE, CLASSES = KEPT_ROWS * 3 + 11, 6
CARD = DetectorCard("toy", "random", CLASSES, CLASSES, Preprocessing(8, "legacy"))


def features(key: int, count: int) -> Features:
    values = torch.randn(count, CLASSES, generator=keyed_generator(key)) * torch.arange(1, CLASSES + 1) + 2
    return Features(values, values, CARD)


def rows(whole: Features, index: Tensor) -> Features:
    return Features(whole.values[index], whole.logits[index], whole.card)


def measure(shares: list[Tensor], generated_shares: list[Tensor]) -> dict[str, Tensor]:
    """Measure what this process sees of 1,547 real and 40 generated samples, in batches."""
    logging.disable(logging.WARNING)
    real, generated = features(1, SIZE), features(2, 40)
    frechet, kernel = FrechetDistance(CARD), KernelDistance(CARD)
    score, coherence, psnr = InceptionScore(CARD, splits=3), InceptionCoherence(CARD, pieces=2), PSNR()
    for index in shares:
        frechet.update(rows(real, index), real=True, index=index)
        kernel.update(rows(real, index), real=True, index=index)
        score.update(rows(real, index), index)
    video, reference = (torch.rand(40, 3, 2, 4, 4, generator=keyed_generator(key)) for key in (3, 4))
    pieces = features(5, 80)
    for index in generated_shares:
        frechet.update(rows(generated, index), real=False, index=index)
        kernel.update(rows(generated, index), real=False, index=index)
        coherence.update(rows(pieces, torch.stack([2 * index, 2 * index + 1], dim=1).flatten()), index)
        psnr.update(video[index], reference[index], index)
    results = {
        "frechet": frechet.compute(),
        "kernel": kernel.compute(),
        "score": torch.stack(score.compute()),
        "coherence": coherence.compute(),
        "psnr": psnr.compute(),
    }
    frechet.update(rows(generated, torch.arange(3)), real=False)  # goes on from this rank's own samples
    return results | {"frechet_after": frechet.compute()}


def measure_rank(rank: int) -> dict[str, Tensor]:
    """Measure this rank's share: uneven, the last sample filled up with the first; all generated ones are rank 0's."""
    shares = torch.arange(SIZE + 1) % SIZE
    mine = shares[:900] if rank == 0 else shares[900:]
    return measure(list(mine.split(64)), list(torch.arange(40).split(9)) if rank == 0 else [])
