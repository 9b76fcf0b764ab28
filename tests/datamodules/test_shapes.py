import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sound_video import BAND_HERTZ

from datamodules.sampler import ClipRequest
from datamodules.shapes import (
    CLASS_NAMES,
    CLICK_HERTZ,
    COLOURS,
    MOTIONS,
    SHAPES,
    MovingShapes,
    MovingShapesDataModule,
    caption,
)

PALETTE = torch.tensor(list(COLOURS.values()))


def clips(**options: Any) -> MovingShapes:
    return MovingShapes(**{"split": "train", "num_clips": 100, "num_frames": 12, "resolution": 32, **options})


def test_a_clip_depends_on_seed_split_and_index_alone() -> None:
    assert torch.equal(clips().render(3), clips(num_clips=7).render(3))
    others = [clips(seed=1).render(3), clips(split="val").render(3), clips().render(4)]
    assert not any(torch.equal(clips().render(3), other) for other in others)


def test_epochs_show_the_same_clip() -> None:
    first, later = (clips()[ClipRequest(3, epoch)]["video"] for epoch in (0, 5))
    assert torch.equal(first, later)


@pytest.mark.parametrize("resolution", [32, 33, 64])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 7), (11, 1), (3, 4)])
def test_a_range_equals_the_same_frames_of_the_whole_clip(resolution: int, start: int, count: int) -> None:
    dataset = clips(resolution=resolution, min_objects=3)
    for index in range(10):
        assert torch.equal(dataset.render(index, start, count), dataset.render(index)[:, start : start + count])


def test_a_request_reads_its_frames_and_tells_its_window() -> None:
    dataset = clips()
    item = dataset[ClipRequest(2, window_start=4, window_frames=3, read_start=2, read_frames=7)]
    assert torch.equal(item["video"], dataset.render(2)[:, 2:9])
    assert (item["window_start"], item["window_frames"], item["margin_before"]) == (4, 3, 2)


def test_stride_skips_frames() -> None:
    assert torch.equal(clips(frame_stride=3, num_frames=4).render(1), clips().render(1)[:, ::3])


@pytest.mark.parametrize("texture", [0.0, 1.0])
def test_values_fill_the_house_range_and_no_more(texture: float) -> None:
    video = torch.stack([clips(texture=texture).render(index) for index in range(20)])
    assert video.dtype == torch.float32
    assert video.shape == (20, 3, 12, 32, 32)
    assert (video.min(), video.max()) == (-1, 1)


def test_each_clip_has_a_shade_of_its_own_within_the_given_bounds() -> None:
    dataset = clips(texture=0.0, max_objects=1, shade=(-0.9, -0.1))
    shades = torch.stack([dataset.render(index).flatten(1).median(dim=1).values for index in range(20)])  # [clip, C]
    assert shades.min() >= -0.9
    assert shades.max() <= -0.1
    assert (shades == shades[:, :1]).all()  # grey
    assert len(shades[:, 0].unique()) == 20


@pytest.mark.parametrize("texture", [0.0, 0.4, 1.0])
def test_background_stands_still_and_is_as_strong_as_asked(texture: float) -> None:
    dataset = clips(texture=texture, max_objects=1)
    centres = (torch.arange(32) + 0.5) / 32
    strongest = 0.0
    for index in range(10):
        scene, video = dataset.ground_truth(index), dataset.render(index)
        x, y = (scene.positions[0, :, axis, None] - centres for axis in range(2))  # [T, 32]
        reach = float(scene.radii[0]) + 1 / 32
        free = ((x.abs() > reach)[:, None, :] | (y.abs() > reach)[:, :, None]).expand(3, -1, -1, -1)  # [3, T, H, W]
        highest, lowest = (torch.where(free, video, other) for other in (-9.0, 9.0))
        always_free = free.any(1)
        assert torch.equal(highest.amax(1)[always_free], lowest.amin(1)[always_free])
        strongest = max(strongest, float((video[free] + 0.5).abs().max()))
    assert 0.4 * texture <= strongest <= 0.5 * texture


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_ground_truth_tells_colour_and_place_of_what_is_drawn(shape: int) -> None:
    dataset = clips(max_objects=1, resolution=64, texture=0.0)
    found = [index for index in range(100) if int(dataset.ground_truth(index).shapes[0]) == shape][:5]
    for index in found:
        scene, video = dataset.ground_truth(index), dataset.render(index)
        colour = PALETTE[scene.colours[0]]
        share = (video + 0.5).abs().amax(0) / (colour + 0.5).abs().max()  # [T, H, W], of a pixel that is covered
        covered = share > 0.5
        for frame, position in enumerate(scene.positions[0]):
            rows, columns = covered[frame].nonzero().unbind(1)
            left, right = columns.min() / 64, (columns.max() + 1) / 64
            top, bottom = rows.min() / 64, (rows.max() + 1) / 64
            # all shapes fill their square; a side is right to one pixel, a triangle's tip to two
            assert (left + right) / 2 == pytest.approx(float(position[0]), abs=1.1 / 64)
            assert (top + bottom) / 2 == pytest.approx(float(position[1]), abs=1.1 / 64)
            assert right - left == pytest.approx(2 * float(scene.radii[0]), abs=2.1 / 64)
            x, y = (min(int(value * 64), 63) for value in position)
            assert torch.equal(video[:, frame, y, x], colour)


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", math.pi), ("square", 4.0), ("triangle", 2.0), ("cross", 4 / 3 * 2 - 4 / 9)]
)
def test_edges_are_smooth_so_that_coverage_is_the_area(shape: str, area: float) -> None:
    dataset = clips(max_objects=1, resolution=64, texture=0.0)
    scenes = {index: dataset.ground_truth(index) for index in range(100)}
    chosen = [index for index, scene in scenes.items() if SHAPES[int(scene.shapes[0])] == shape][:5]
    for index in chosen:
        channel = int((PALETTE[scenes[index].colours[0]] == 1).nonzero()[0])
        coverage = (dataset.render(index)[channel] + 0.5) / 1.5  # [T, H, W]
        radius = float(scenes[index].radii[0]) * 64
        measured = coverage.sum((1, 2)) / radius**2
        assert torch.all((measured - area).abs() < 0.15)  # corners are rounded off by a fraction of a pixel


def test_geometry_does_not_depend_on_resolution() -> None:
    small, large = clips(resolution=32), clips(resolution=128)
    for index in range(5):
        pooled = torch.nn.functional.avg_pool2d(large.render(index).transpose(0, 1), 4).transpose(0, 1)
        assert (pooled - small.render(index)).abs().mean() < 0.02


def test_motion_is_straight_and_even_between_the_walls_and_turns_at_them() -> None:
    dataset = clips(num_frames=400, speed=(0.03, 0.03), size=(0.1, 0.3))
    for index in range(20):
        scene = dataset.ground_truth(index)
        steps = scene.positions.diff(dim=1).abs()  # [O, T-1, xy]
        for object_, motion in enumerate(scene.motions.tolist()):
            speed = {
                "horizontal": (0.03, 0.0),
                "vertical": (0.0, 0.03),
                "diagonal": (0.03 / 2**0.5, 0.03 / 2**0.5),
            }[MOTIONS[motion]]
            radius = float(scene.radii[object_])
            for axis in range(2):
                path = scene.positions[object_, :, axis]
                assert path.min() >= radius - 1e-9
                assert path.max() <= 1 - radius + 1e-9
                assert steps[object_, :, axis].max() <= speed[axis] + 1e-9
                if speed[axis]:
                    assert path.min() < radius + speed[axis]  # it does come to both walls
                    assert path.max() > 1 - radius - speed[axis]
                    # per crossing of the box one step is shortened by the turn, the others are whole
                    whole = (steps[object_, :, axis] - speed[axis]).abs() < 1e-9
                    crossings = 399 * speed[axis] / (1 - 2 * radius)
                    assert 399 - int(whole.sum()) <= crossings + 1


def test_label_is_shape_and_motion_of_the_object_in_front() -> None:
    dataset = clips(num_clips=200)
    labels = set()
    for index in range(200):
        scene = dataset.ground_truth(index)
        name = f"{MOTIONS[int(scene.motions[0])]} {SHAPES[int(scene.shapes[0])]}"
        assert CLASS_NAMES[scene.label] == name
        assert dataset[ClipRequest(index, read_frames=1)]["label"] == scene.label
        labels.add(scene.label)
    assert labels == set(range(12))


def test_the_first_object_is_never_hidden() -> None:
    dataset = clips(min_objects=6, max_objects=6, size=(0.3, 0.4))
    for index in range(5):
        scene, video = dataset.ground_truth(index), dataset.render(index)
        for frame, position in enumerate(scene.positions[0]):
            x, y = (min(int(value * 32), 31) for value in position)
            assert torch.equal(video[:, frame, y, x], PALETTE[scene.colours[0]])


def test_number_of_objects_sizes_speeds_and_colours_keep_to_the_options() -> None:
    dataset = clips(min_objects=2, max_objects=4, size=(0.05, 0.1), num_clips=200)
    scenes = [dataset.ground_truth(index) for index in range(200)]
    assert {len(scene.shapes) for scene in scenes} == {2, 3, 4}
    radii = torch.cat([scene.radii for scene in scenes])
    assert 0.05 <= radii.min() < 0.055 < 0.095 < radii.max() <= 0.1
    assert all(len(set(scene.colours.tolist())) == len(scene.colours) for scene in scenes)


def test_the_longest_clip_can_be_drawn_at_its_end_alone() -> None:
    assert clips(num_frames=512).render(0, 510, 2).shape == (3, 2, 32, 32)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_frames", 513),
        ("resolution", 31),
        ("min_objects", 4),
        ("max_objects", 7),
        ("speed", (0.2, 0.1)),
        ("size", (0.1, 0.5)),
        ("texture", 1.5),
        ("shade", (-0.5, 0.5)),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}=.*--data"):
        clips(**{option: value})


def test_a_clip_or_frame_beyond_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="Clip 100"):
        clips().render(100)
    with pytest.raises(IndexError, match=r"frames \[510, 513\)"):
        clips().render(0, 510, 3)


class TestExtras:
    """Captions, sound, low resolution and still images, each off by default."""

    def test_nothing_of_it_is_there_unless_asked_for(self) -> None:
        assert set(clips()[ClipRequest(0)]) == {"video", "label", "index"}

    def test_the_video_is_the_same_with_all_of_it(self) -> None:
        plain, full = clips(), clips(captions=True, audio=True, low_res_factor=2)
        for index in range(5):
            without, with_extras = plain[ClipRequest(index)], full[ClipRequest(index)]
            assert torch.equal(without["video"], with_extras["video"])
            assert without["label"] == with_extras["label"]

    def test_captions_say_what_is_seen(self) -> None:
        dataset = clips(captions=True, max_objects=4)
        adverbs = dict(zip(MOTIONS, ("horizontally", "vertically", "diagonally"), strict=True))
        numbers_seen = set()
        for index in range(40):
            scene, text = dataset.ground_truth(index), dataset[ClipRequest(index)]["text"]
            things = [
                f"a {list(COLOURS)[int(colour)]} {SHAPES[int(shape)]}"
                for colour, shape in zip(scene.colours, scene.shapes, strict=True)
            ]
            assert text.startswith(f"{things[0]} moves {adverbs[MOTIONS[int(scene.motions[0])]]}")
            assert [text.index(thing) for thing in things] == sorted(text.index(thing) for thing in things)
            assert ("in front of" in text) == (len(things) > 1)
            assert text.count(" a ") + 1 == len(things)
            numbers_seen.add(len(things))
        assert numbers_seen == {1, 2, 3, 4}

    def test_lists_of_things_read_well(self) -> None:
        scenes = [clips(min_objects=n, max_objects=n).ground_truth(0) for n in (1, 2, 4)]
        alone, two, four = (caption(scene).partition(" in front of ")[2] for scene in scenes)
        assert alone == ""
        assert " and " not in two
        assert (four.count(", "), four.count(" and ")) == (1, 1)

    def test_a_click_sounds_when_a_shape_turns_and_only_then(self) -> None:
        dataset = clips(num_clips=40, num_frames=40, max_objects=1, audio=True)
        bounces = 0
        for index in range(40):
            scene, audio = dataset.ground_truth(index), dataset[ClipRequest(index)]["audio"]
            assert audio.shape == (1, 40, 64, 16)
            velocity = scene.positions[0].diff(dim=0)  # [T - 1, xy], between frames
            # between frames k and k + 1 the shape turns if it is slower there than elsewhere
            slow = (velocity.abs() < velocity.abs().amax(0) - 1e-9).any(1).tolist()
            band = int(CLICK_HERTZ[int(scene.shapes[0])] / BAND_HERTZ)
            loud = audio[0, :, band - 1 : band + 2].amax((1, 2)) > 0.2  # [T]: above -32 dB
            for frame in range(2, 38):  # turns before the clip and after its last frame are heard, but not seen
                if slow[frame]:
                    assert loud[frame] or loud[frame + 1]  # a click just before the next frame lasts into it
                    bounces += 1
                elif not any(slow[frame - 2 : frame + 2]):  # a click and a window are a frame long each
                    assert not loud[frame]
        assert bounces > 20

    def test_the_pitch_tells_the_shape(self) -> None:
        dataset = clips(num_frames=40, max_objects=1, audio=True)
        for index in range(12):
            scene, audio = dataset.ground_truth(index), dataset[ClipRequest(index)]["audio"]
            if audio.max() > 0:
                loudest = int(audio[0].amax((0, 2)).argmax())
                assert abs(loudest * BAND_HERTZ - CLICK_HERTZ[int(scene.shapes[0])]) <= BAND_HERTZ

    @pytest.mark.parametrize("stride", [1, 3])
    def test_the_sound_of_a_range_is_that_of_the_whole_clip(self, stride: int) -> None:
        dataset = clips(num_frames=24, frame_stride=stride, audio=True, min_objects=3)
        for index in range(6):
            whole = dataset[ClipRequest(index)]["audio"]
            part = dataset[ClipRequest(index, read_start=7, read_frames=9)]["audio"]
            assert torch.allclose(part, whole[:, 7:16], atol=1e-5)  # transforms of other batches round differently
            assert whole.max() > -1

    def test_shapes_that_stand_still_make_no_sound(self) -> None:
        assert torch.all(clips(speed=(0.0, 0.0), audio=True)[ClipRequest(0)]["audio"] == -1)

    def test_low_resolution_is_the_mean_of_the_pixels(self) -> None:
        item = clips(resolution=64, low_res_factor=4)[ClipRequest(1)]
        assert item["low_res"].shape == (3, 12, 16, 16)
        expected = item["video"].unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
        assert torch.allclose(item["low_res"], expected, atol=1e-6)

    def test_stills_are_other_scenes_with_classes_of_their_own(self) -> None:
        stills, videos = clips(num_frames=1, stills=True, captions=True), clips(num_frames=1)
        for index in range(20):
            item, scene = stills[ClipRequest(index)], stills.ground_truth(index)
            assert item["is_image"] is True
            assert item["video"].shape == (3, 1, 32, 32)
            assert item["label"] == 12 + int(scene.shapes[0])
            assert "moves" not in item["text"]
            assert not torch.equal(item["video"], videos.render(index))

    @pytest.mark.parametrize(
        "options",
        [
            {"low_res_factor": 3},
            {"low_res_factor": 0},
            {"stills": True},
            {"stills": True, "num_frames": 1, "audio": True},
        ],
    )
    def test_impossible_switches_are_refused_by_name(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*--data"):
            clips(**options)

    def test_data_module_hands_all_of_it_on(self) -> None:
        data = MovingShapesDataModule(
            num_train=4, num_frames=2, resolution=32, batch_size=4, captions=True, audio=True, low_res_factor=2
        )
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert [batch["audio"].shape, batch["low_res"].shape] == [(4, 1, 2, 64, 16), (4, 3, 2, 16, 16)]
        assert all(isinstance(text, str) for text in batch["text"])
        stills = MovingShapesDataModule(num_train=4, num_frames=1, resolution=32, batch_size=4, stills=True)
        stills.setup()
        assert next(iter(stills.train_dataloader()))["is_image"].tolist() == [True] * 4


def test_data_module_gives_batches_of_both_splits() -> None:
    data = MovingShapesDataModule(num_train=8, num_val=3, num_frames=4, resolution=32, batch_size=4, seed=3)
    data.setup()
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert [batch["video"].shape for batch in train] == [(4, 3, 4, 32, 32)] * 2
    assert sorted(torch.cat([batch["index"] for batch in train]).tolist()) == list(range(8))
    assert [batch["index"].tolist() for batch in val] == [[0, 1, 2]]
    expected = MovingShapes("val", 3, 4, resolution=32, seed=3).render(1)
    assert torch.equal(val[0]["video"][1], expected)


def test_hyper_parameters_are_plain_and_complete(tmp_path: Path) -> None:
    data = MovingShapesDataModule(num_train=8, num_frames=4, texture=0.5)
    torch.save(dict(data.hparams), tmp_path / "hparams")
    saved = torch.load(tmp_path / "hparams", weights_only=True)
    assert set(saved) == set(inspect.signature(MovingShapesDataModule).parameters)
    assert dict(MovingShapesDataModule(**saved).hparams) == saved
    assert (saved["num_train"], saved["num_frames"], saved["texture"], saved["num_workers"]) == (8, 4, 0.5, 0)
