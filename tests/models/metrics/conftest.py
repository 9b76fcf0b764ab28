from collections.abc import Callable

import pytest
from torch import Tensor

from models.metrics import Detector, DetectorCard, Features, Preprocessing, random_i3d

ToyFeatures = Callable[[Tensor], Features]


@pytest.fixture(scope="session")
def toy_features() -> ToyFeatures:
    """Sign values `[n, d]` with the card of an imaginary detector; they are its logits as well."""

    def sign(values: Tensor) -> Features:
        size = values.shape[1]
        return Features(values, values, DetectorCard("toy", "random", size, size, Preprocessing(8, "legacy")))

    return sign


@pytest.fixture(scope="session")
def detector() -> Detector:
    return random_i3d()
