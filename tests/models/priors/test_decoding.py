import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from models.priors.decoding import (
    ConfidenceDecoding,
    DraftAndRevise,
    bootstrap_decode,
    confidence_decode,
    draft_and_revise,
    draft_decode,
    filtered_probabilities,
    mask_ratio,
    num_masked_tokens,
    pick,
    revise,
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


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "square", "cubic", "sqrt", "quadratic", "convex", "cosine_plus"]
)
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


def test_reveal_order_and_maps_equal_the_official_ones(golden_mebt: MeBT) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        seen.append((codes, context))
        return golden_mebt(codes, context, targets)

    positions = torch.arange(12).expand(2, -1)
    settings = ConfidenceDecoding(num_steps=4, choice_temperature=2.0)
    confidence_decode(predict, torch.zeros_like(positions), positions[:, :0], positions, settings, no_noise)
    assert [context.shape[1] for _, context in seen] == [0, 3, 7]  # the official first pass reveals nothing
    assert seen[-1][1][0].tolist() == [2, 7, 9, 4, 1, 11, 0]
    assert (seen[1][0] == 4).all()
    assert seen[-1][0].tolist() == [[7, 9, 4, 9, 9, 9, 9, 4, 7, 4, 7, 9]] * 2


def test_one_round_of_revision_equals_the_official_one(golden_mebt: MeBT) -> None:
    codes = torch.tensor([[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 0], [7, 10, 2, 5, 8, 0, 3, 6, 9, 1, 4, 7]])
    order = torch.tensor([[2, 7, 0, 5, 10, 3, 8, 1, 6, 11, 4, 9], [5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7, 0]])
    positions = torch.arange(12).expand(2, -1)
    for noise, expected in (
        (no_noise, [[10, 4, 10, 10, 7, 10, 7, 10, 10, 7, 10, 7], [9, 4, 9, 10, 4, 10, 4, 9, 10, 9, 10, 4]]),
        (pattern_noise, [[9, 10, 4, 10, 9, 10, 4, 10, 9, 10, 4, 10], [9, 7, 9, 10, 7, 4, 7, 7, 4, 9, 10, 7]]),
    ):

        def draw(shape: Sequence[int], noise: Callable = noise) -> Tensor:
            return order.argsort(1).float() if len(shape) == 2 else noise(shape)  # two dimensions: the order

        revised = revise(golden_mebt, codes, positions[:, :0], positions, draw, rounds=1, groups=3, temperature=0.7)
        assert revised.tolist() == expected


def recording(num_codes: int = 5) -> tuple[Callable, list]:
    """A network that knows nothing, and what it was asked."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        calls.append((codes, context, targets))
        return torch.zeros(len(codes), targets.shape[1], num_codes)

    return predict, calls


def test_without_noise_and_temperature_decoding_is_the_most_likely_and_context_stays(golden_mebt: MeBT) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        together = torch.cat([context, targets], dim=1).sort(1).values
        assert torch.equal(together, torch.arange(12).expand(2, -1))  # each position once
        calls.append((codes.gather(1, context), context))
        return golden_mebt(codes, context, targets)

    positions = torch.arange(12).expand(2, -1)
    settings = ConfidenceDecoding(num_steps=6, temperature=0.0, choice_temperature=3.0)
    start = torch.zeros_like(positions)
    codes = confidence_decode(predict, start, positions[:, :0], positions, settings, no_noise)
    assert torch.equal(codes, confidence_decode(predict, start, positions[:, :0], positions, settings, no_noise))
    for known, context in calls[: len(calls) // 2]:
        assert torch.equal(known, codes.gather(1, context))  # what was revealed is what came out
    first = golden_mebt(start, positions[:, :0], positions).argmax(-1)
    revealed = calls[1][1]
    assert torch.equal(codes.gather(1, revealed), first.gather(1, revealed))


def test_the_order_of_choice_is_that_of_log_scores_and_gumbel_noise() -> None:
    noise = seeded_noise(torch.tensor([1]), "cpu")((1, 200)).double()[0]
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for c in (0.5, 2.0, 6.0):
        ratio = (scores / noise**c).argsort(descending=True)
        assert torch.equal(ratio, (scores.log() + c * -noise.log()).argsort(descending=True))
    for schedule in ("linear", "cosine"):
        settings = ConfidenceDecoding(choice_temperature=4.0, choice_schedule=schedule)
        assert settings.choice_temperature_at(1.0) == 0.0
        assert 0 < settings.choice_temperature_at(0.5) < 4.0
    assert ConfidenceDecoding(choice_temperature=4.0, choice_schedule="constant").choice_temperature_at(1.0) == 4.0


def test_a_bootstrap_of_a_long_clip_saves_the_first_steps_of_the_draft() -> None:
    predict, calls = recording(2)
    positions = torch.arange(8192)[None]
    noise = seeded_noise(torch.tensor([0]), "cpu")
    codes, context, targets = bootstrap_decode(
        predict, torch.zeros_like(positions), positions[:, :0], positions, 64, noise
    )
    assert len(calls) == 64
    assert [call[1].shape[1] for call in calls] == list(range(64))
    assert context.shape == (1, 64)
    assert torch.equal(torch.cat([context, targets], 1).sort(1).values, positions)
    calls.clear()
    confidence_decode(predict, codes, context, targets, ConfidenceDecoding(num_steps=32), noise)
    revealed = [later[1].shape[1] - earlier[1].shape[1] for earlier, later in itertools.pairwise(calls)]
    assert len(calls) == 30
    assert revealed[:3] == [24, 69, 88]


def test_bootstrapped_places_are_random_and_their_codes_follow_the_logits() -> None:
    def predict(codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(targets % 5, 5) * 100.0  # the code is the position modulo five

    positions = torch.arange(40).expand(3, -1)
    noise = seeded_noise(torch.tensor([0, 1, 2]), "cpu")
    codes, context, _ = bootstrap_decode(predict, torch.zeros_like(positions), positions[:, :0], positions, 7, noise)
    assert torch.equal(codes.gather(1, context), context % 5)
    assert len({tuple(row) for row in context.tolist()}) == 3
    untouched = torch.ones_like(codes).scatter(1, context, 0)
    assert (codes * untouched).sum() == 0
    small = positions[:, :4]
    _, context, targets = bootstrap_decode(predict, small * 0, small[:, :0], small, 9, noise)
    assert (context.shape[1], targets.shape[1]) == (4, 0)  # no more than there are


def test_a_draft_fills_random_groups_and_predicts_all_that_is_left() -> None:
    predict, calls = recording()
    positions = torch.arange(10).expand(2, -1)
    noise = seeded_noise(torch.tensor([4, 5]), "cpu")
    codes = draft_decode(predict, positions * 0 - 1, positions[:, :0], positions, noise, groups=4)
    assert [(context.shape[1], targets.shape[1]) for _, context, targets in calls] == [(0, 10), (3, 7), (6, 4), (8, 2)]
    assert (codes >= 0).all()
    assert calls[1][1][0].tolist() != calls[1][1][1].tolist()
    for known, context, _ in calls:
        assert torch.equal(known.gather(1, context), codes.gather(1, context))


def test_each_round_of_revision_rewrites_every_token_once_given_all_others() -> None:
    predict, calls = recording()
    positions = torch.arange(12).expand(2, -1)
    noise = seeded_noise(torch.tensor([4, 5]), "cpu")
    codes = torch.full((2, 12), 9)
    revised = revise(predict, codes, positions[:, :0], positions, noise, rounds=2, groups=3)
    assert (revised < 5).all()
    assert len(calls) == 6
    for row in range(2):
        rounds = [torch.cat([call[2][row] for call in calls[first : first + 3]]).tolist() for first in (0, 3)]
        assert [sorted(places) for places in rounds] == [list(range(12))] * 2
        assert rounds[0] != rounds[1]
    for _, context, targets in calls:
        assert torch.equal(torch.cat([context, targets], 1).sort(1).values, positions)
    # the second group sees what the first one was given
    first, second = calls[0][2], calls[1][0]
    assert (second.gather(1, first) < 5).all()
    assert (second == 9).sum() == 2 * 8


def test_revision_takes_the_most_likely_code_as_its_temperature_falls(golden_mebt: MeBT) -> None:
    positions = torch.arange(12).expand(2, -1)
    seeds = [seeded_noise(torch.tensor([seed, seed + 1]), "cpu") for seed in (0, 2)]
    maps = [
        revise(golden_mebt, positions % 11, positions[:, :0], positions, noise, rounds=1, groups=1, temperature=1e-6)
        for noise in seeds
    ]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], golden_mebt(positions, positions[:, :0], positions).argmax(-1))


def test_groups_divide_the_tokens_of_a_whole_map() -> None:
    predict, calls = recording()
    positions = torch.arange(10)[None]
    noise = seeded_noise(torch.tensor([0]), "cpu")
    with pytest.raises(ValueError, match=r"4 groups do not divide the 10 tokens .* such as 2 .*revise_groups"):
        revise(predict, positions, positions[:, :0], positions, noise, rounds=1, groups=4)
    # what is left of an edited map may be any number
    edited = revise(predict, positions, positions[:, :3], positions[:, 3:], noise, rounds=1, groups=3)
    assert [call[2].shape[1] for call in calls] == [3, 2, 2]
    assert edited[0, :3].tolist() == [0, 1, 2]


def test_what_is_given_does_not_shorten_the_draft() -> None:
    positions = torch.arange(64)[None]
    passes = {}
    for num_given in (0, 32):
        predict, calls = recording()
        noise = seeded_noise(torch.tensor([0]), "cpu")
        settings = DraftAndRevise(num_steps=8)
        given, rest = positions[:, :num_given], positions[:, num_given:]
        draft_and_revise(predict, positions % 5, given, rest, settings, noise)
        passes[num_given] = len(calls)
        predict, calls = recording()
        confidence_decode(predict, positions % 5, given, rest, settings, noise)  # counted as in the release
        passes[num_given, "released"] = len(calls)
    assert passes == {0: 8, (0, "released"): 8, 32: 7, (32, "released"): 3}  # the first of 32 reveals nothing


def test_bootstrap_draft_and_revision_follow_each_other() -> None:
    predict, calls = recording()
    positions = torch.arange(64)[None]
    noise = seeded_noise(torch.tensor([0]), "cpu")
    settings = DraftAndRevise(num_steps=4, draft="groups", bootstrap_passes=5, revise_rounds=2, revise_groups=4)
    codes = draft_and_revise(predict, positions * 0 - 1, positions[:, :0], positions, settings, noise)
    assert [context.shape[1] for _, context, _ in calls] == [0, 1, 2, 3, 4, 5, 20, 35, 50] + [48] * 8
    assert (codes >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, r"num_steps=0 must be at least 1 \(--model\.sampling\.num_steps\)"),
        ({"top_k": 0}, "top_k=0 must be"),
        ({"bootstrap_passes": -1}, "bootstrap_passes=-1 must be at least 0"),
        ({"revise_groups": 0}, "revise_groups=0 must be"),
        ({"context_frames": 0}, "context_frames=0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftAndRevise(**settings)
