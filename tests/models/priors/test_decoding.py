import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from models.priors.decoding import (
    ConfidenceDecoding,
    confidence_decode,
    filtered_probabilities,
    mask_ratio,
    num_masked_tokens,
    pick,
    seeded_noise,
)
from models.priors.mebt import MeBT
from models.weights import official_mebt_name

ROW = torch.tensor([1, 2.5, -0.5, 2.5, 0.25, 1.75, -1.25, 0.75, 3, -2])


def no_noise(shape: Sequence[int]) -> Tensor:
    return torch.ones(*shape)


def pattern_noise(shape: Sequence[int]) -> Tensor:
    q = torch.arange(torch.Size(shape).numel())
    return (0.2 + ((13 * q + 5) % 17) / 8).reshape(*shape)


@pytest.fixture
def golden_mebt(golden_tensor: Callable) -> MeBT:
    stack = ("latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec")
    network = MeBT(11, 12, dim=16, num_heads=2, num_latents=3, blocks=stack).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(golden_tensor(official_mebt_name(name), tuple(parameter.shape), 2.0))
    return network


@pytest.mark.parametrize(
    ("noise", "settings", "num_given", "expected"),
    [
        (
            no_noise,
            ConfidenceDecoding(num_steps=4, choice_temperature=2.0),
            0,
            [[7, 9, 4, 4, 9, 4, 4, 4, 4, 4, 4, 9]] * 2,
        ),
        (
            pattern_noise,
            ConfidenceDecoding(num_steps=4, choice_temperature=2.0),
            0,
            [[4, 4, 7, 10, 4, 10, 10, 9, 7, 4, 7, 7], [10, 10, 4, 4, 9, 4, 4, 10, 9, 4, 4, 9]],
        ),
        (
            pattern_noise,
            ConfidenceDecoding(num_steps=4, choice_temperature=3.0, temperature=0.8, top_k=5),
            0,
            [[7, 4, 9, 7, 7, 4, 4, 9, 9, 4, 7, 9], [9, 7, 4, 7, 9, 7, 4, 7, 4, 7, 4, 9]],
        ),
        (
            no_noise,
            ConfidenceDecoding(num_steps=4, choice_temperature=2.0),
            4,
            [[0, 3, 6, 9, 7, 7, 7, 7, 4, 10, 10, 7], [7, 10, 2, 5, 7, 7, 7, 7, 4, 7, 4, 4]],
        ),
    ],
)
def test_codes_equal_the_official_ones(
    golden_mebt: MeBT, noise: Callable, settings: ConfidenceDecoding, num_given: int, expected: list
) -> None:
    given = torch.tensor([[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 0], [7, 10, 2, 5, 8, 0, 3, 6, 9, 1, 4, 7]])
    positions = torch.arange(12).expand(2, -1)
    codes = given if num_given else torch.zeros_like(given)
    decoded = confidence_decode(golden_mebt, codes, positions[:, :num_given], positions[:, num_given:], settings, noise)
    assert decoded.tolist() == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, None, None, {0: 0.0473958, 1: 0.2124132, 3: 0.2124132, 8: 0.3502102, 9: 0.002359698}),
        (1.0, 2, None, {1: 0.2740686, 3: 0.2740686, 8: 0.4518628}),
        (0.7, 4, None, {1: 0.2280374, 3: 0.2280374, 5: 0.07810711, 8: 0.4658181}),
        (1.3, None, 0.6, {1: 0.2882634, 3: 0.2882634, 8: 0.4234731}),
        (0.9, 6, 0.8, {1: 0.2671719, 3: 0.2671719, 8: 0.4656563}),
    ],
)
def test_filters_equal_the_official_ones(
    temperature: float, top_k: int | None, top_p: float | None, kept: dict
) -> None:
    probabilities = filtered_probabilities(ROW, temperature, top_k, top_p)
    for index, value in kept.items():
        assert probabilities[index].item() == pytest.approx(value, rel=1e-6)
    if top_k or top_p:
        assert probabilities.count_nonzero() == len(kept)
    assert pick(probabilities, no_noise(ROW.shape))[0] == 8
    assert pick(probabilities, pattern_noise(ROW.shape))[0] == 1


def test_filters_that_keep_everything_change_nothing() -> None:
    expected = ROW.softmax(-1)
    assert torch.allclose(filtered_probabilities(ROW, top_k=10, top_p=1.0), expected)
    assert filtered_probabilities(ROW, top_p=1e-9).count_nonzero() == 1


def test_picking_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(20_000, -1)
    noise = seeded_noise(torch.tensor([3]), "cpu")((1, *probabilities.shape))[0]
    counts = pick(probabilities, noise)[0].bincount(minlength=4) / 20_000
    assert (counts - probabilities[0]).abs().max() < 0.015  # four standard deviations of 20,000 draws
    assert counts[3] == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square", "cubic", "sqrt"])
def test_schedules_fall_from_all_to_none(schedule: str) -> None:
    ratios = [mask_ratio(schedule, i / 50) for i in range(51)]
    assert ratios[0] == 1.0
    assert ratios[-1] == 0.0
    assert all(a >= b for a, b in itertools.pairwise(ratios))


def test_revealed_tokens_follow_the_closed_form_and_steps_that_reveal_nothing_cost_nothing() -> None:
    calls = []

    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        calls.append(context.shape[1])
        assert torch.equal(torch.cat([context, targets], 1).sort(1).values[0], torch.arange(1024))
        return torch.zeros(1, targets.shape[1], 5)

    positions = torch.arange(1024)[None]
    noise = seeded_noise(torch.tensor([0]), "cpu")
    confidence_decode(
        predict, torch.zeros_like(positions), positions[:, :0], positions, ConfidenceDecoding(num_steps=128), noise
    )
    masked = [num_masked_tokens("cosine", i / 128, 1024) for i in range(129)]
    assert calls == sorted({1024 - m for m in masked[:-1]})
    assert len(calls) == 128 - 4  # cosine steps 1, 2, 3 and 5 of 128 would reveal nothing


def test_given_tokens_never_change_and_every_other_token_is_written() -> None:
    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        logits = torch.full((2, targets.shape[1], 5), -torch.inf)
        logits[..., 4] = 0.0
        return logits

    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    positions = torch.arange(4).expand(2, -1)
    noise = seeded_noise(torch.tensor([0, 1]), "cpu")
    decoded = confidence_decode(
        predict, codes, positions[:, 1:3], positions[:, [0, 3]], ConfidenceDecoding(num_steps=3), noise
    )
    assert decoded.tolist() == [[4, 1, 2, 4], [4, 2, 1, 4]]


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    alone = seeded_noise(torch.tensor([7]), "cpu")
    together = seeded_noise(torch.tensor([3, 7, 7]), "cpu")
    first, second = alone((1, 4, 2)), alone((1, 3))
    batch, later = together((3, 4, 2)), together((3, 3))
    assert torch.equal(batch[1], first[0])
    assert torch.equal(batch[1], batch[2])
    assert torch.equal(later[1], second[0])
    assert not torch.equal(batch[0], batch[1])
