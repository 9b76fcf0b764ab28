import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.metrics import ClassCoherence, Features, InceptionCoherence, InceptionScore
from models.random import keyed_generator

ToyFeatures = Callable[[Tensor], Features]


def logits(key: int, n: int, classes: int = 6) -> Tensor:
    return 3 * torch.randn(n, classes, generator=keyed_generator(key))


def score(features: Features, splits: int = 1) -> tuple[float, float]:
    metric = InceptionScore(features.card, splits)
    metric.update(features, torch.arange(len(features)))
    mean, std = metric.compute()
    return float(mean), float(std)


def by_definition(x: Tensor) -> float:
    p = x.double().softmax(1)
    return math.exp((p * (p.log() - p.mean(0).log())).sum(1).mean())


def test_uniform_predictions_score_one(toy_features: ToyFeatures) -> None:
    assert score(toy_features(torch.zeros(12, 5)))[0] == pytest.approx(1, abs=1e-12)


def test_certain_and_balanced_predictions_score_the_number_of_classes(toy_features: ToyFeatures) -> None:
    assert score(toy_features(1000 * torch.eye(5).repeat(3, 1)))[0] == pytest.approx(5, rel=1e-12)


def test_one_class_alone_scores_one(toy_features: ToyFeatures) -> None:
    assert score(toy_features(1000 * torch.eye(5)[:1].repeat(9, 1)))[0] == pytest.approx(1, abs=1e-12)


def test_equals_the_definition_however_it_is_batched(toy_features: ToyFeatures) -> None:
    x = logits(1, 1400)  # more than are kept as they are
    metric = InceptionScore(toy_features(x).card)
    for rows in torch.arange(1400).split(90):
        metric.update(toy_features(x[rows]), rows)
    metric.update(toy_features(x[:5]), torch.arange(5))
    assert float(metric.compute()[0]) == pytest.approx(by_definition(x), rel=1e-9)
    assert metric.name == "inception_score_toy"


def test_splits_are_scored_apart(toy_features: ToyFeatures) -> None:
    x = logits(1, 40)
    scores = torch.tensor([by_definition(x[i::4]) for i in range(4)], dtype=torch.float64)
    assert score(toy_features(x), splits=4) == pytest.approx(
        (float(scores.mean()), float(scores.std(correction=0))), rel=1e-9
    )


def test_splits_need_indices_and_samples(toy_features: ToyFeatures) -> None:
    features = toy_features(logits(1, 3))
    with pytest.raises(ValueError, match="4 splits need the samples' indices"):
        InceptionScore(features.card, 4).update(features)
    with pytest.raises(ValueError, match="3 samples leave some of 4 splits empty"):
        score(features, splits=4)
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        InceptionScore(features.card, 0)


def test_class_coherence_is_the_share_that_keeps_the_first_class(toy_features: ToyFeatures) -> None:
    classes = torch.tensor([[0, 0, 1], [2, 2, 2], [1, 0, 1], [3, 3, 0]])
    pieces = torch.eye(4)[classes].flatten(0, 1)  # [4 * 3, 4]
    metric = ClassCoherence(toy_features(pieces).card, pieces=3)
    metric.update(toy_features(pieces[:6]), torch.arange(2))
    metric.update(toy_features(pieces[6:]), torch.arange(2, 4))
    metric.update(toy_features(pieces[:3]), torch.tensor([0]))
    assert metric.compute().tolist() == [1.0, 0.75, 0.5]
    assert metric.name == "class_coherence_toy"


def test_inception_coherence_is_the_divergence_from_the_first_piece(toy_features: ToyFeatures) -> None:
    x = logits(1, 5 * 3)
    metric = InceptionCoherence(toy_features(x).card, pieces=3)
    metric.update(toy_features(x))
    p = x.double().softmax(1).view(5, 3, -1)
    expected = [float((p[:, t] * (p[:, t] / p[:, 0]).log()).sum(1).mean()) for t in range(3)]
    assert metric.compute().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert expected[1] > 1  # the direction matters here
    assert metric.name == "inception_coherence_toy"


def test_pieces_must_make_whole_videos(toy_features: ToyFeatures) -> None:
    metric = ClassCoherence(toy_features(logits(1, 2)).card, pieces=3)
    with pytest.raises(ValueError, match="no whole number of videos of 3 pieces"):
        metric.update(toy_features(logits(1, 4)))
    metric.update(toy_features(logits(1, 0)))
    with pytest.raises(ValueError, match="There are no videos"):
        metric.compute()
