"""MAGVIT's tasks against the numbers of its appendix: fractions, boxes, padding, condition tokens."""

import pytest
import torch
from torch import Tensor

from models.priors.tasks import (
    BLACK_TASKS,
    EMPTY_TASKS,
    SHARED_PROMPTS,
    SHORT_NAMES,
    TASKS,
    blackened,
    closest_task,
    condition_tokens,
    known_region,
    moving_left_edges,
    padded_video,
    supervoxel_condition,
)
from models.random import keyed_generator

GRID, DOWNSAMPLE = (4, 16, 16), (4, 8, 8)


def random_video(batch_size: int = 2, frames: int = 16, size: int = 16) -> Tensor:
    return torch.rand(batch_size, 3, frames, size, size, generator=keyed_generator(1)) * 2 - 1


def test_the_papers_ten_tasks_and_generation_from_nothing() -> None:
    assert len(TASKS) == len(set(TASKS)) == 11
    assert TASKS[-1] == "unconditional"


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("task", "share"),
    [
        ("frame_prediction", 1 / 16),
        ("class_frame_prediction", 1 / 16),
        ("frame_interpolation", 2 / 16),
        ("central_outpainting", 1 / 4),
        ("vertical_outpainting", 1 / 2),
        ("horizontal_outpainting", 1 / 2),
        ("dynamic_outpainting", 1 / 2),
        ("central_inpainting", 3 / 4),
        ("dynamic_inpainting", 3 / 4),
        ("class_conditional", 0),
        ("unconditional", 0),
    ],
)
def test_share_of_known_pixels_is_the_papers(task: str, share: float, size: int) -> None:
    assert known_region(task, (16, size, size)).float().mean() == share


# Table 12 of the paper gives these percentages; by its text, moving boxes cut more supervoxels.
RELEASED = {
    "frame_prediction": 256,
    "class_frame_prediction": 256,
    "frame_interpolation": 512,
    "central_outpainting": 256,
    "vertical_outpainting": 512,
    "horizontal_outpainting": 512,
    "dynamic_outpainting": 512,
    "central_inpainting": 768,
    "dynamic_inpainting": 768,
    "class_conditional": 0,
    "unconditional": 0,
}


@pytest.mark.parametrize("task", TASKS)
def test_number_of_condition_tokens(task: str) -> None:
    released = condition_tokens(task, GRID, DOWNSAMPLE, "released")
    supervoxel = condition_tokens(task, GRID, DOWNSAMPLE, "supervoxel")
    assert released.shape == supervoxel.shape == GRID
    assert released.sum() == RELEASED[task]
    differing = {"dynamic_outpainting": 640, "dynamic_inpainting": 832}
    assert supervoxel.sum() == differing.get(task, RELEASED[task])
    assert (supervoxel | ~released).all()  # a token of the released rule always sees a known pixel
    if task not in differing:
        assert torch.equal(released, supervoxel)


def test_five_past_frames_are_two_latent_frames_by_the_papers_rule() -> None:
    assert condition_tokens("frame_prediction", GRID, DOWNSAMPLE, "supervoxel", past_frames=5).sum() == 512
    assert condition_tokens("frame_prediction", GRID, DOWNSAMPLE, "supervoxel", past_frames=4).sum() == 256
    assert condition_tokens("frame_prediction", GRID, DOWNSAMPLE, "released", past_frames=5).sum() == 256


@pytest.mark.parametrize(
    ("frames", "width", "edges"),
    [
        (16, 128, [0, 4, 9, 13, 17, 21, 26, 30, 34, 38, 43, 47, 51, 55, 60, 64]),
        (16, 64, [0, 2, 4, 6, 9, 11, 13, 15, 17, 19, 21, 23, 26, 28, 30, 32]),
        (4, 16, [0, 3, 5, 8]),
    ],
)
def test_moving_boxes_start_where_the_release_starts_them(frames: int, width: int, edges: list[int]) -> None:
    assert moving_left_edges(frames, width).tolist() == edges
    strip = known_region("dynamic_outpainting", (frames, 4, width))
    hole = ~known_region("dynamic_inpainting", (frames, 4, width))
    for frame, left in enumerate(edges):
        expected = torch.zeros(width, dtype=torch.bool)
        expected[left : left + width // 2] = True
        assert (strip[frame] == expected).all()
        assert (hole[frame, 1:3] == expected).all()
        assert not hole[frame, [0, 3]].any()


@pytest.mark.parametrize("task", TASKS)
def test_padding_keeps_what_is_known_and_never_reads_the_rest(task: str) -> None:
    video = random_video()
    known = known_region(task, (16, 16, 16), past_frames=3)
    padded = padded_video(video, task, past_frames=3)
    assert torch.equal(padded[..., known], video[..., known])
    other = torch.where(known, video, random_video(2).flip(0))
    assert torch.equal(padded_video(other, task, past_frames=3), padded)
    assert padded.abs().max() <= 1


def test_frame_prediction_repeats_the_last_known_frame() -> None:
    video = random_video()
    padded = padded_video(video, "frame_prediction", past_frames=5)
    assert torch.equal(padded[:, :, 4:], video[:, :, 4:5].expand(-1, -1, 12, -1, -1))


def test_frame_interpolation_blends_the_two_known_frames() -> None:
    video = random_video()
    padded = padded_video(video, "frame_interpolation")
    for k in range(16):
        expected = video[:, :, 0] + (video[:, :, 15] - video[:, :, 0]) * k / 15
        torch.testing.assert_close(padded[:, :, k], expected)


@pytest.mark.parametrize("task", ["central_outpainting", "vertical_outpainting", "horizontal_outpainting"])
def test_outpainting_repeats_the_nearest_known_pixel(task: str) -> None:
    video = random_video(1, 1, 8)
    known = known_region(task, (1, 8, 8))[0].nonzero()
    padded = padded_video(video, task)
    for row in range(8):
        for column in range(8):
            nearest = known[(known - torch.tensor([row, column])).square().sum(dim=1).argmin()]
            assert torch.equal(padded[..., row, column], video[..., nearest[0], nearest[1]])


@pytest.mark.parametrize(
    "task", ["dynamic_outpainting", "central_inpainting", "dynamic_inpainting", "class_conditional", "unconditional"]
)
def test_the_rest_is_black(task: str) -> None:
    unknown = ~known_region(task, (16, 16, 16))
    assert (padded_video(random_video(), task)[..., unknown] == -1).all()


def test_one_known_pixel_makes_its_supervoxel_a_condition() -> None:
    known = torch.zeros(8, 16, 16, dtype=torch.bool)
    assert not supervoxel_condition(known, (4, 8, 8)).any()
    assert supervoxel_condition(~known, (4, 8, 8)).all()
    known[5, 15, 7] = True
    assert supervoxel_condition(known, (4, 8, 8)).nonzero().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("task", EMPTY_TASKS)
def test_generation_has_no_condition(task: str) -> None:
    for rule in ("supervoxel", "released"):
        assert not condition_tokens(task, GRID, DOWNSAMPLE, rule).any()


def test_the_release_has_four_prompts() -> None:
    assert SHARED_PROMPTS.keys() == set(TASKS)
    assert set(SHARED_PROMPTS.values()) == {"generation", "frame_prediction", "frame_interpolation", "outpainting"}
    assert SHARED_PROMPTS["dynamic_inpainting"] == SHARED_PROMPTS["central_outpainting"]


@pytest.mark.parametrize("past_frames", [0, 16, -1])
def test_a_number_of_past_frames_that_leaves_nothing_to_do_is_refused(past_frames: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1 to 15 of 16 frames \(--model.past_frames\)"):
        known_region("frame_prediction", (16, 8, 8), past_frames)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no task 'juggling'. Tasks: frame_prediction, .*unconditional"):
        known_region("juggling", (16, 8, 8))


def test_a_causal_tokenizer_gives_the_first_frame_a_token_of_its_own() -> None:
    grid = (5, 16, 16)
    one = condition_tokens("frame_prediction", grid, DOWNSAMPLE, causal=True)
    assert one.sum(dim=(1, 2)).tolist() == [256, 0, 0, 0, 0]
    assert condition_tokens("frame_prediction", grid, DOWNSAMPLE, past_frames=5, causal=True).sum() == 512
    assert condition_tokens("frame_interpolation", grid, DOWNSAMPLE, causal=True).sum(dim=(1, 2)).tolist() == [
        256, 0, 0, 0, 256,
    ]  # fmt: skip
    known = torch.zeros(9, 8, 8, dtype=torch.bool)
    known[4, 0, 0] = True  # frames 0 | 1-4 | 5-8
    assert supervoxel_condition(known, DOWNSAMPLE, causal=True).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("task", [task for task in TASKS if task not in (*EMPTY_TASKS, "class_frame_prediction")])
def test_a_mask_is_most_like_the_task_that_has_it(task: str) -> None:
    region = known_region(task, (16, 32, 32), 3)
    assert closest_task(region, TASKS, 3) == task
    assert closest_task(torch.stack([region, region]), TASKS, 3) == task


def test_a_mask_of_its_own_is_padded_with_black_even_where_pixels_are_no_numbers() -> None:
    video, known = random_video(), torch.rand(2, 16, 16, 16, generator=keyed_generator(4)) < 0.5
    broken = torch.where(known[:, None], video, torch.nan)
    padded = blackened(broken, known)
    assert torch.equal(padded, torch.where(known[:, None], video, -1.0))
    for task in BLACK_TASKS:
        region = known_region(task, (16, 16, 16))
        assert torch.equal(blackened(video, region), padded_video(video, task))


def test_short_names_are_those_of_tasks() -> None:
    assert set(SHORT_NAMES.values()) == set(TASKS) - {"unconditional"}
    assert SHORT_NAMES["inpaint_central"] == "central_inpainting"
    assert not set(SHORT_NAMES) & set(TASKS)
