"""Next-token sampling: the official code's numbers, windows that slide, gaps that are filled, and token filters."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.priors.autoregressive import (
    AutoregressiveSampling,
    TokenFilter,
    balanced_classes,
    continue_codes,
    fill_between,
    fill_gaps,
    slide,
)
from models.priors.decoding import seeded_noise
from models.priors.tats import TATS
from models.weights import official_tats_name

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]
GoldenNetwork = Callable[..., TATS]
TOKENS = (7 * torch.arange(2)[:, None] + 3 * torch.arange(15)) % 13  # [2, 15]
ROW = torch.tensor([1, 2.5, -0.5, 2.5, 0.25, 1.75, -1.25, 0.75, 3, -2])
GREEDY = TokenFilter(top_k=1)


def no_noise(shape: Sequence[int]) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


@pytest.fixture
def golden_tats(golden_tensor: GoldenTensor) -> GoldenNetwork:
    def make(grid: tuple[int, int, int], **changes) -> TATS:
        network = TATS(13, grid, dim=12, depth=2, num_heads=2, **changes).double()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(golden_tensor(official_tats_name(name), tuple(parameter.shape), 2.0))
        return network.eval()

    return make


def small_tats(grid: tuple[int, int, int] = (3, 2, 2), **changes) -> TATS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TATS(9, grid, dim=16, depth=2, num_heads=2, **changes).double()
        for parameter in network.parameters():
            if parameter.ndim > 1:  # biases stay 0: the tokens are to decide, not the norms
                nn.init.normal_(parameter, std=0.7)
    return network.eval()


# Numbers of the official code


def test_cached_continuation_equals_the_official_one(golden_tats: GoldenNetwork) -> None:
    network = golden_tats((15, 1, 1))
    codes = continue_codes(network, TOKENS[:, :1], TOKENS[:, 1:3], 12, GREEDY, no_noise, network.new_cache())
    assert codes.tolist() == [[5, 7, 8, 4, 8, 4, 7, 10, 12, 7, 4, 4], [8, 5, 5, 12, 10, 9, 12, 10, 12, 7, 4, 8]]


def test_sliding_window_equals_the_official_one(golden_tats: GoldenNetwork) -> None:
    network = golden_tats((3, 2, 2), block_size=15)
    settings = AutoregressiveSampling(top_k=1, context_frames=1, new_frames=1)
    frames = slide(network, torch.tensor([[5], [2]]), 5, settings, no_noise)
    assert frames.flatten(1).tolist() == [
        [12, 7, 8, 12, 10, 12, 10, 4, 5, 8, 8, 8, 8, 8, 7, 1, 8, 8, 8, 8],
        [11, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8],
    ]


def test_released_first_pass_of_the_interpolation_equals_the_official_one(golden_tats: GoldenNetwork) -> None:
    network = golden_tats((5, 1, 3), mask="closed_boundaries")
    tokens = torch.cat([TOKENS[:, :4], TOKENS[:, 12:]], dim=1)
    positions = torch.tensor([0, 1, 2, 3, 12, 13, 14])
    logits = network.head(network.extend(tokens, positions, network.new_cache(), network.attention_mask[:7, :7]))
    assert logits.sum().item() == pytest.approx(-9.1009179, abs=1e-6)
    assert logits.abs().sum().item() == pytest.approx(289.54071, abs=1e-5)
    assert [logits[0, 3, 0].item(), logits[1, 6, 2].item()] == pytest.approx([0.26619568, -1.3456163], abs=1e-7)


def test_released_fill_equals_the_official_one(golden_tats: GoldenNetwork) -> None:
    network = golden_tats((5, 1, 3), mask="closed_boundaries")
    start, left, right = TOKENS[:, :1], TOKENS[:, 1:4], TOKENS[:, 12:]
    codes = fill_between(network, start, left, right, GREEDY, no_noise, released=True).flatten(1)
    assert codes.tolist() == [[5, 5, 7, 8, 12, 8, 8, 12, 8], [7, 4, 4, 7, 10, 7, 10, 12, 7]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1, 2, 1, {1: 0.27406862, 3: 0.27406862, 8: 0.45186276}),
        (1, 6, 0.85, {1: 0.24265438, 3: 0.24265438, 5: 0.11462181, 8: 0.40006943}),
        (0.7, 5, 0.9, {1: 0.22803738, 3: 0.22803738, 5: 0.078107103, 8: 0.46581813}),
        (1.4, 10, 0.75, {1: 0.24909757, 3: 0.24909757, 5: 0.14578463, 8: 0.35602022}),
        (0.9, 4, 0.05, {8: 1.0}),
    ],
)
def test_token_filter_equals_the_official_one(temperature: float, top_k: int, top_p: float, kept: dict) -> None:
    probabilities = TokenFilter(temperature, top_k, top_p).probabilities(ROW)
    assert probabilities.nonzero().flatten().tolist() == sorted(kept)
    for index, value in kept.items():
        assert probabilities[index].item() == pytest.approx(value, rel=1e-6)


# Token filters


def test_the_nucleus_works_without_top_k_unless_released() -> None:
    with_all = TokenFilter(top_k=10, top_p=0.5).probabilities(ROW)
    assert torch.equal(TokenFilter(top_p=0.5).probabilities(ROW), with_all)
    assert with_all.count_nonzero() == 2
    assert torch.equal(TokenFilter(top_p=0.5, needs_top_k=True).probabilities(ROW), ROW.softmax(0))
    assert torch.equal(TokenFilter(top_k=10, top_p=0.5, needs_top_k=True).probabilities(ROW), with_all)


def test_filters_that_keep_all_change_nothing_and_the_narrowest_keeps_the_best() -> None:
    everything = ROW.softmax(0)
    expected = [0.047395795, 0.21241322, 0.010575431, 0.21241322, 0.022388188,
                0.1003369, 0.0049954801, 0.036911882, 0.35021019, 0.0023596977]  # fmt: skip
    assert everything.tolist() == pytest.approx(expected, rel=1e-5)
    for same in (TokenFilter(), TokenFilter(top_k=10), TokenFilter(top_p=1.0), TokenFilter(top_k=10, top_p=1.0)):
        assert torch.allclose(same.probabilities(ROW), everything)
    for best in (TokenFilter(top_k=10, top_p=1e-9), TokenFilter(top_k=1)):
        assert best.probabilities(ROW).nonzero().flatten().tolist() == [8]
    assert TokenFilter(top_k=2).probabilities(ROW).count_nonzero() == 3  # a tie at the threshold
    assert torch.allclose(TokenFilter(top_p=0.5, needs_top_k=True).probabilities(ROW), everything)


def test_a_token_stays_when_those_before_it_just_reach_top_p() -> None:
    assert TokenFilter(top_p=0.5).probabilities(torch.zeros(4)).count_nonzero() == 3


# One window


def full_forward_continuation(network: TATS, condition: Tensor, codes: Tensor, count: int) -> Tensor:
    """Greedy codes without a cache."""
    tokens = torch.cat([condition, codes + network.condition_size], dim=1)
    for _ in range(count):
        tokens = torch.cat([tokens, network(tokens)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return (tokens[:, -count:] - network.condition_size).clamp(min=0)


def test_a_window_is_the_greedy_path_of_full_forwards() -> None:
    network = small_tats(condition_size=4)
    condition = torch.tensor([[3], [1]])
    settings = AutoregressiveSampling(top_k=1)
    codes = slide(network, condition, 3, settings, no_noise).flatten(1)
    assert torch.equal(codes, full_forward_continuation(network, condition, codes[:, :0], 12))
    assert len(codes.unique()) > 3


def test_a_drawn_condition_id_becomes_code_0() -> None:
    network = small_tats(condition_size=4)
    with torch.no_grad():
        network.head.weight.zero_()  # uniform: an id of the condition is drawn in 4 of 13 cases
    codes = slide(network, torch.tensor([[3]] * 8), 3, AutoregressiveSampling(top_k=None, top_p=None),
                  seeded_noise(torch.arange(8), "cpu"))  # fmt: skip
    assert codes.min() == 0
    assert codes.max() == 8
    assert (codes == 0).float().mean().item() == pytest.approx(5 / 13, abs=0.15)  # three deviations of 96 draws


@pytest.mark.parametrize("context", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(context: int) -> None:
    network = small_tats()
    settings = AutoregressiveSampling(top_k=7, top_p=0.95, context_frames=context)

    def sample(seeds: list[int]) -> Tensor:
        return slide(network, torch.zeros(len(seeds), 1, dtype=torch.int64), 5, settings,
                     seeded_noise(torch.tensor(seeds), "cpu"))  # fmt: skip

    together = sample([5, 6, 7])
    assert torch.equal(sample([7, 5]), together[[2, 0]])
    assert not torch.equal(together[0], together[1])


# The sliding window


def reference_slide(network: TATS, condition: Tensor, num_frames: int, context: int, new: int) -> Tensor:
    """Greedy, without a cache: the last `context` frames, then `new` frames, from position 0 each time."""
    size = network.frame_tokens
    codes = full_forward_continuation(network, condition, condition[:, :0], context * size)
    while codes.shape[1] < num_frames * size:
        codes = torch.cat(
            [codes, full_forward_continuation(network, condition, codes[:, -context * size :], new * size)], dim=1
        )
    return codes[:, : num_frames * size].unflatten(1, (num_frames, size))


@pytest.mark.parametrize(("context", "new"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_every_new_frame_sees_the_frames_that_it_should(context: int, new: int) -> None:
    network = small_tats((4, 2, 2))
    condition = torch.zeros(2, 1, dtype=torch.int64)
    settings = AutoregressiveSampling(top_k=1, context_frames=context, new_frames=new)
    expected = reference_slide(network, condition, 9, context, new)
    assert torch.equal(slide(network, condition, 9, settings, no_noise), expected)


def test_without_a_number_of_new_frames_the_window_is_filled() -> None:
    network = small_tats((4, 2, 2))
    condition = torch.zeros(1, 1, dtype=torch.int64)
    settings = AutoregressiveSampling(top_k=1, context_frames=1, new_frames=None)
    assert torch.equal(
        slide(network, condition, 9, settings, no_noise),
        slide(network, condition, 9, replace(settings, new_frames=3), no_noise),
    )


def test_with_one_frame_of_context_equal_predecessors_have_equal_successors() -> None:
    network = small_tats()
    settings = AutoregressiveSampling(top_k=1)
    frames = slide(network, torch.zeros(1, 1, dtype=torch.int64), 30, settings, no_noise)[0].tolist()
    successors: dict[tuple, list] = {}
    repeated = 0
    for frame, successor in itertools.pairwise(frames):
        repeated += tuple(frame) in successors
        assert successors.setdefault(tuple(frame), successor) == successor
    assert repeated > 3


def test_the_cache_of_the_first_window_is_used_on(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_tats((4, 2, 2))
    sizes: list[int] = []
    extend = TATS.extend

    def counted(self: TATS, tokens: Tensor, *rest, **named) -> Tensor:
        sizes.append(tokens.shape[1])
        return extend(self, tokens, *rest, **named)

    monkeypatch.setattr(TATS, "extend", counted)
    settings = AutoregressiveSampling(top_k=1, context_frames=1, new_frames=3)
    slide(network, torch.zeros(1, 1, dtype=torch.int64), 7, settings, no_noise)
    # frames 0-3 one token at a time from the start token, which stays; then frame 3 at once, and three frames more
    assert sizes == [1] * 16 + [4] + [1] * 11


class CodesAlone(nn.Module):
    """The head of a network that has learned not to draw one of its six condition ids."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits = self.head(features)
        return torch.cat([torch.full_like(logits[..., :6], -1e9), logits[..., 6:]], dim=-1)


def test_a_long_condition_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_tats((4, 2, 2), condition_size=6, condition_length=5)
    network.head = CodesAlone(network.head)
    condition = torch.tensor([[5, 1, 0, 3, 2], [4, 4, 1, 0, 0]])
    settings = AutoregressiveSampling(top_k=1, context_frames=2, new_frames=1)
    expected = reference_slide(network, condition, 7, 2, 1)
    sizes: list[int] = []
    extend = TATS.extend

    def counted(self: TATS, tokens: Tensor, *rest, **named) -> Tensor:
        sizes.append(tokens.shape[1])
        return extend(self, tokens, *rest, **named)

    monkeypatch.setattr(TATS, "extend", counted)
    assert torch.equal(slide(network, condition, 7, settings, no_noise), expected)
    assert max(sizes[1:]) == 8  # two frames of context, never the condition again


# Guidance


def test_a_guided_token_is_drawn_from_the_combined_logits() -> None:
    network = small_tats(condition_size=6)
    network.head = CodesAlone(network.head)
    known, null = torch.tensor([[1], [2]]), torch.tensor([[3], [3]])
    settings = AutoregressiveSampling(top_k=1, guidance_scale=2.5)
    codes = slide(network, torch.cat([known, null]), 3, settings, no_noise).flatten(1)
    tokens = [torch.cat([start, codes + 6], dim=1)[:, :-1] for start in (known, null)]
    with_it, without = (network(row) for row in tokens)
    guided = without + 2.5 * (with_it - without)
    assert torch.equal(guided.argmax(dim=-1) - 6, codes)
    plain = slide(network, known, 3, replace(settings, guidance_scale=1.0), no_noise).flatten(1)
    assert not torch.equal(plain, codes)


def test_a_guided_window_slides_over_its_own_frames() -> None:
    network = small_tats(condition_size=4)
    settings = AutoregressiveSampling(top_k=5, top_p=None, guidance_scale=2.0)
    start = torch.tensor([[1], [2], [3], [3]])
    frames = slide(network, start, 5, settings, seeded_noise(torch.tensor([5, 6]), "cpu"))
    assert frames.shape == (2, 5, 4)
    alone = slide(network, start[1::2], 5, settings, seeded_noise(torch.tensor([6]), "cpu"))
    assert torch.equal(frames[1:], alone)


# Sets of samples


def test_a_set_of_2048_has_20_or_21_of_each_of_101_classes() -> None:
    classes = balanced_classes(2048, 101)
    counts = classes.bincount(minlength=101)
    assert len(classes) == 2048
    assert counts.max() == 21
    assert counts.min() >= 15  # 73 of 2,121 are left out at random
    assert counts.sum() == 2048
    assert torch.equal(balanced_classes(2048, 101), classes)
    assert not torch.equal(balanced_classes(2048, 101, seed=1), classes)
    assert balanced_classes(12, 4).bincount().tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("name", "value"), [("gaps_at_once", 0), ("guidance_scale", -1.0), ("class_set", 0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}: expected at least .*--model\.sampling\.{name}"):
        AutoregressiveSampling(**{name: value})


def test_the_first_window_has_a_filter_of_its_own() -> None:
    network = small_tats()
    condition = torch.zeros(4, 1, dtype=torch.int64)
    settings = AutoregressiveSampling(top_k=1, top_p=None, first_top_k=9)
    frames = slide(network, condition, 5, settings, seeded_noise(torch.arange(4), "cpu"))
    assert len(frames[:, 0].unique(dim=0)) == 4  # drawn
    rest = reference_from(network, condition, frames[:, :1], 5)
    assert torch.equal(frames, rest)  # greedy after that


def reference_from(network: TATS, condition: Tensor, frames: Tensor, num_frames: int) -> Tensor:
    while frames.shape[1] < num_frames:
        new = full_forward_continuation(network, condition, frames[:, -1], network.frame_tokens)
        frames = torch.cat([frames, new[:, None]], dim=1)
    return frames


@pytest.mark.parametrize(("context", "new"), [(0, 1), (3, 1), (1, 3), (1, 0)])
def test_what_does_not_fit_the_window_is_refused(context: int, new: int) -> None:
    settings = AutoregressiveSampling(context_frames=context, new_frames=new)
    with pytest.raises(ValueError, match=f"context_frames={context} and new_frames={new} do not fit a window of 3"):
        slide(small_tats(), torch.zeros(1, 1, dtype=torch.int64), 5, settings, no_noise)


# Frames between frames


def test_the_consistent_fill_is_the_greedy_path_of_training() -> None:
    """Each new token is the arg-max of the full forward under the mask, as in training."""
    network = small_tats((5, 2, 2), mask="closed_boundaries")
    left, right = torch.tensor([[1, 5, 2, 8], [0, 3, 3, 7]]), torch.tensor([[4, 4, 0, 6], [2, 2, 1, 8]])
    start = torch.zeros(2, 1, dtype=torch.int64)
    middle = fill_between(network, start, left, right, GREEDY, no_noise)
    assert middle.shape == (2, 3, 4)
    codes = torch.cat([left, middle.flatten(1), right], dim=1)
    logits = network.code_logits(codes)
    assert torch.equal(logits[:, 4:16].argmax(dim=-1), middle.flatten(1))
    released = fill_between(network, start, left, right, GREEDY, no_noise, released=True)
    assert not torch.equal(released, middle)


def test_the_last_token_of_the_right_frame_is_no_input_unless_released() -> None:
    network = small_tats((5, 2, 2), mask="closed_boundaries")
    left = torch.tensor([[1, 5, 2, 8]])
    rights = torch.tensor([[4, 4, 0, token] for token in range(9)])

    def filled(released: bool) -> Tensor:
        start = torch.zeros(9, 1, dtype=torch.int64)
        return fill_between(network, start, left.expand(9, -1), rights, GREEDY, no_noise, released).flatten(1)

    assert len(filled(False).unique(dim=0)) == 1
    assert len(filled(True).unique(dim=0)) > 1


def test_17_keys_become_65_frames_with_every_gap_filled_as_if_alone() -> None:
    network = small_tats((5, 2, 2), mask="closed_boundaries")
    keys = torch.randint(9, (2, 17, 4), generator=torch.Generator().manual_seed(1))
    start = torch.zeros(2, 1, dtype=torch.int64)
    seeds = torch.arange(32).view(2, 16)
    frames = fill_gaps(network, start, keys, GREEDY, seeds)
    assert frames.shape == (2, 65, 4)
    assert torch.equal(frames[:, ::4], keys)
    for gap in (0, 7, 15):
        alone = fill_between(network, start, keys[:, gap], keys[:, gap + 1], GREEDY, no_noise)
        assert torch.equal(frames[:, 4 * gap + 1 : 4 * gap + 4], alone)


@pytest.mark.parametrize("released", [False, True])
def test_codes_do_not_depend_on_how_many_gaps_are_filled_at_once(released: bool) -> None:
    network = small_tats((5, 2, 2), mask="closed_boundaries")
    keys = torch.randint(9, (2, 5, 4), generator=torch.Generator().manual_seed(1))
    start, seeds = torch.zeros(2, 1, dtype=torch.int64), torch.arange(8).view(2, 4)
    settings = TokenFilter(top_k=5)
    together = fill_gaps(network, start, keys, settings, seeds, released)
    for gaps_at_once in (1, 3):
        assert torch.equal(fill_gaps(network, start, keys, settings, seeds, released, gaps_at_once), together)


def sequential_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a network from now on."""
    rows: list[int] = []
    extend = TATS.extend

    def counted(self: TATS, tokens: Tensor, *rest, **named) -> Tensor:
        rows.append(len(tokens))
        return extend(self, tokens, *rest, **named)

    monkeypatch.setattr(TATS, "extend", counted)
    return rows


def test_a_hierarchy_of_65_frames_takes_20_frames_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """(S / 4 + 1) F for the key frames and 3 F for all gaps, instead of (S + 1) F."""
    keys_network, between = small_tats((4, 2, 2)), small_tats((5, 2, 2), mask="closed_boundaries")
    start = torch.zeros(1, 1, dtype=torch.int64)
    rows = sequential_steps(monkeypatch)
    keys = slide(keys_network, start, 17, AutoregressiveSampling(top_k=1), no_noise)
    frames = fill_gaps(between, start, keys, GREEDY, torch.arange(16)[None])
    assert frames.shape == (1, 65, 4)
    assert rows == [1] * (17 * 4) + [16] * (3 * 4)


def test_a_causal_network_goes_on_after_the_left_frame_whatever_comes_then() -> None:
    network = small_tats((5, 2, 2))
    start, left = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1, 5, 2, 8], [0, 3, 3, 7]])
    middle = fill_between(network, start, left, torch.zeros_like(left), GREEDY, no_noise)
    assert torch.equal(middle.flatten(1), full_forward_continuation(network, start, left, 12))
    assert torch.equal(fill_between(network, start, left, left, GREEDY, no_noise), middle)


def test_one_key_has_no_gaps() -> None:
    network = small_tats((5, 2, 2), mask="closed_boundaries")
    keys = torch.ones(2, 1, 4, dtype=torch.int64)
    seeds = torch.empty(2, 0, dtype=torch.int64)
    assert torch.equal(fill_gaps(network, torch.zeros(2, 1, dtype=torch.int64), keys, GREEDY, seeds), keys)


def test_static_shapes_make_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU, where no shape may change."""
    network, between = small_tats(), small_tats((5, 2, 2), mask="closed_boundaries")
    start = torch.zeros(2, 1, dtype=torch.int64)
    settings = AutoregressiveSampling(top_k=5, top_p=None)

    def sample(released: bool) -> Tensor:
        keys = slide(network, start, 5, settings, seeded_noise(torch.tensor([1, 2]), "cpu"))
        return fill_gaps(between, start, keys, settings.filter, torch.arange(8).view(2, 4), released)

    sliced = [sample(released) for released in (False, True)]
    new_cache = TATS.new_cache
    monkeypatch.setattr(TATS, "new_cache", lambda self: new_cache(self, is_static=True))
    assert all(torch.equal(sample(released), codes) for released, codes in zip((False, True), sliced, strict=True))
