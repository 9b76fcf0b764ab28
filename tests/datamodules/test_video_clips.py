import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numbered_video import read_number
from PIL import Image
from torch import Tensor

from datamodules.clip_file import read_clip
from datamodules.decoding import UnreadableVideoError, VideoInfo, probe, read_frames
from datamodules.listing import Video, indexed_videos
from datamodules.sampler import ClipRequest
from datamodules.video import VideoClips, VideoDataModule


def clips(videos: list[Video], **options: Any) -> VideoClips:
    return VideoClips(videos, **{"num_frames": 4, "frame_stride": 1, "resolution": 64, "seed": 0, **options})


def numbers(video: Tensor) -> list[int]:
    return [read_number(((frame + 1) * 127.5).permute(1, 2, 0).numpy()) for frame in video.unbind(1)]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Video:
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    write_video(path, 64, codec="libx264", width=64, max_b_frames=2, gop_size=12)
    return Video(path, label=3, num_frames=64, key_frames=probe(path).key_frames)


@pytest.fixture(scope="module")
def short_video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Video:
    return Video(write_video(tmp_path_factory.mktemp("clips") / "short.avi", 6, bit_rate=200_000), 1, num_frames=6)


class TestWhatIsRead:
    @pytest.mark.parametrize("stride", [1, 3])
    def test_a_clip_holds_the_frames_from_its_start(self, long_video: Video, stride: int) -> None:
        dataset = clips([long_video], frame_stride=stride)
        for epoch in range(4):
            item = dataset[ClipRequest(0, epoch)]
            start = dataset.start(0, epoch)
            assert numbers(item["video"]) == list(range(start, start + 4 * stride, stride))
            assert (item["label"], item["index"]) == (3, 0)

    def test_a_window_is_part_of_the_same_clip(self, tmp_path: Path, write_video: Callable[..., Path]) -> None:
        video = Video(write_video(tmp_path / "wide.avi", 30, bit_rate=200_000), 0, 30)
        dataset = clips([video], num_frames=8, frame_stride=2, random_crop=True, horizontal_flip=True)
        whole = dataset[ClipRequest(0, epoch=5)]["video"]
        part = dataset[ClipRequest(0, 5, window_start=3, window_frames=2, read_start=2, read_frames=4)]
        assert torch.equal(part["video"], whole[:, 2:6])
        assert (part["window_start"], part["window_frames"], part["margin_before"]) == (3, 2, 1)

    def test_starts_are_uniform_over_all_that_fit_the_last_one_included(self, short_video: Video) -> None:
        dataset = clips([short_video], num_frames=2, frame_stride=3)  # spans 4 of 6 frames
        starts = [dataset.start(0, epoch) for epoch in range(300)]
        assert set(starts) == {0, 1, 2}
        assert all(75 < starts.count(start) < 125 for start in range(3))

    def test_starts_differ_between_videos_and_seeds_and_repeat_with_the_key(self, long_video: Video) -> None:
        dataset = clips([long_video, long_video])
        by_key = [[dataset.start(index, epoch) for epoch in range(20)] for index in range(2)]
        other_seed = [clips([long_video], seed=1).start(0, epoch) for epoch in range(20)]
        assert by_key[0] != by_key[1] != other_seed != by_key[0]
        assert by_key == [[clips([long_video] * 2).start(i, epoch) for epoch in range(20)] for i in range(2)]

    def test_videos_too_short_for_a_clip_are_left_out_and_the_log_counts_the_rest(
        self, long_video: Video, short_video: Video
    ) -> None:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        log.addHandler(handler)
        assert len(clips([long_video, short_video], num_frames=6)) == 2
        assert len(clips([long_video, short_video], num_frames=4, frame_stride=2, name="toys")) == 1
        log.removeHandler(handler)
        assert messages[-1] == "toys: 1 of 2 videos hold a clip of 4 frames at stride 2."

    def test_no_video_that_is_long_enough_is_an_error(self, short_video: Video) -> None:
        with pytest.raises(ValueError, match=r"none of 1 videos holds 7 frames at stride 1; the longest has 6 frames"):
            clips([short_video], num_frames=7)


class TestPixels:
    @staticmethod
    def of_image(image: np.ndarray, monkeypatch: pytest.MonkeyPatch, **options: Any) -> VideoClips:
        """Clips of a video that shows one image."""
        monkeypatch.setattr(Video, "frames", lambda self, start, count, stride: iter([image] * count))
        return clips([Video(Path("still"), 0, 100)], num_frames=2, **options)

    @pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (64, 64), (97, 64)])
    def test_the_centre_of_an_image_of_the_right_size_is_taken_unchanged(
        self, monkeypatch: pytest.MonkeyPatch, height: int, width: int
    ) -> None:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        top, left = (height - 64) // 2, (width - 64) // 2
        expected = torch.from_numpy(image[top : top + 64, left : left + 64]).permute(2, 0, 1) / 127.5 - 1
        video = self.of_image(image, monkeypatch)[ClipRequest(0)]["video"]
        assert video.dtype == torch.float32
        assert torch.equal(video, torch.stack([expected, expected], dim=1))

    def test_black_and_white_are_the_ends_of_the_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, expected in ((0, -1.0), (255, 1.0)):
            image = np.full((100, 130, 3), value, np.uint8)
            video = self.of_image(image, monkeypatch)[ClipRequest(0)]["video"]
            assert torch.all((video - expected).abs() < 1e-5)  # rounding of the filter's weights
            assert video.abs().max() <= 1

    def test_the_shorter_side_is_resized_as_pil_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = np.random.default_rng(0).integers(0, 256, (96, 131, 3), dtype=np.uint8)
        resized = np.asarray(Image.fromarray(image).resize((44, 32), Image.Resampling.BILINEAR))  # 131 x 32 / 96 = 43.7
        video = self.of_image(image, monkeypatch, resolution=32)[ClipRequest(0)]["video"]
        shown = (video[:, 0].permute(1, 2, 0) + 1) * 127.5
        assert torch.allclose(shown, shown.round(), atol=1e-4)
        difference = (shown - torch.from_numpy(resized[:, 6:38].copy())).abs()
        assert difference.max() < 1.01  # the last bits of the weights differ

    def test_a_user_s_own_clip_has_the_pixels_of_a_training_clip(self, short_video: Video) -> None:
        trained = clips([short_video], num_frames=6, resolution=48)[ClipRequest(0)]["video"]
        assert torch.equal(read_clip(short_video.path, num_frames=6, resolution=48), trained)

    def test_without_antialiasing_it_is_resized_in_floating_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = np.random.default_rng(0).integers(0, 256, (96, 131, 3), dtype=np.uint8)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        expected = F.interpolate(pixels, (32, 44), mode="bilinear")[0, :, :, 6:38] / 127.5 - 1
        video = self.of_image(image, monkeypatch, resolution=32, antialias=False)[ClipRequest(0)]["video"]
        assert torch.allclose(video[:, 0], expected)

    def test_without_antialiasing_frames_that_need_no_resizing_do_not_round_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        dataset = clips([Video(Path("any"), 0, 2)], num_frames=2, antialias=False)
        monkeypatch.setattr(Video, "frames", lambda *args: iter([large[:64, :64], large]))
        shown = (dataset[ClipRequest(0)]["video"][:, 1] + 1) * 127.5
        pixels = torch.from_numpy(large).permute(2, 0, 1)[None].float()
        torch.testing.assert_close(shown, F.interpolate(pixels, (64, 64), mode="bilinear")[0], atol=1e-3, rtol=0)

    def test_random_crops_reach_both_ends_and_stay_for_all_frames(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = np.zeros((64, 67, 3), np.uint8)
        image[:, :, 0] = np.arange(67)
        dataset = self.of_image(image, monkeypatch, random_crop=True)
        crops = [dataset[ClipRequest(0, epoch)]["video"] for epoch in range(40)]
        assert all(torch.equal(crop[:, 0], crop[:, 1]) for crop in crops)
        lefts = {round(float((crop[0, 0, 0, 0] + 1) * 127.5)) for crop in crops}
        assert lefts == {0, 1, 2, 3}

    def test_about_half_of_the_clips_are_mirrored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = np.zeros((64, 64, 3), np.uint8)
        image[:, 0] = 255
        dataset = self.of_image(image, monkeypatch, horizontal_flip=True)
        videos = [dataset[ClipRequest(0, epoch)]["video"] for epoch in range(40)]
        assert all(bool((video[..., 0] == 1).all()) != bool((video[..., -1] == 1).all()) for video in videos)
        assert 10 < sum(bool((video[..., -1] == 1).all()) for video in videos) < 30

    def test_frames_that_change_their_size_in_mid_video_still_make_a_clip(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = [np.full((64, 96, 3), 7, np.uint8), np.full((128, 70, 3), 7, np.uint8)]
        monkeypatch.setattr(Video, "frames", lambda self, start, count, stride: iter(images))
        video = clips([Video(Path("still"), 0, 100)], num_frames=2)[ClipRequest(0)]["video"]
        assert video.shape == (3, 2, 64, 64)


class TestReadFailures:
    @pytest.fixture
    def half_broken(self, tmp_path: Path, short_video: Video) -> VideoClips:
        """Four videos that were there when they were indexed; those with odd numbers are gone."""
        return clips([short_video if i % 2 == 0 else Video(tmp_path / f"gone_{i}.avi", 0, 6) for i in range(4)])

    def test_another_video_takes_the_place_and_the_item_says_which(self, half_broken: VideoClips) -> None:
        item = half_broken[ClipRequest(1)]
        assert item["index"] in (0, 2)
        assert item["label"] == 1
        assert torch.equal(item["video"], half_broken[ClipRequest(item["index"])]["video"])

    def test_the_substitute_depends_on_epoch_and_index_and_not_on_history(self, half_broken: VideoClips) -> None:
        def substitutes() -> list[int]:
            return [half_broken[ClipRequest(index, epoch)]["index"] for epoch in range(8) for index in (1, 3)]

        first = substitutes()
        assert set(first) == {0, 2}
        assert substitutes() == first

    def test_a_window_is_kept(self, half_broken: VideoClips) -> None:
        item = half_broken[ClipRequest(1, 0, window_start=1, window_frames=2, read_start=1, read_frames=2)]
        assert item["video"].shape[1] == item["window_frames"] == 2

    def test_each_broken_video_is_warned_of_once(
        self, half_broken: VideoClips, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "datamodules.video"):
            for epoch in range(4):
                half_broken[ClipRequest(1, epoch)]
        assert sum("gone_1.avi" in message for message in caplog.messages) == 1

    def test_when_no_substitute_can_be_read_the_error_names_the_file(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        dataset = clips([Video(tmp_path / f"gone_{i}.avi", 0, 6) for i in range(3)])
        with pytest.raises(UnreadableVideoError, match=r"gone_2\.avi and 10 videos drawn in its place"):
            dataset[ClipRequest(2)]


def test_unreadable_videos_are_left_out_with_one_warning_that_counts_them() -> None:
    index: dict[Path, VideoInfo | str] = {Path(f"bad_{i}"): f"bad_{i}: broken" for i in range(5)}
    index[Path("good")] = VideoInfo(9, 8, 8, 0, (0, 5))
    with pytest.warns(
        UserWarning, match=r"5 of 6 videos cannot be read and are left out, such as: bad_0: .*bad_2"
    ) as w:
        videos = indexed_videos(dict.fromkeys(index, 2), index)
    assert len(w) == 1
    assert videos == [Video(Path("good"), 2, 9, (0, 5))]


def test_data_sets_travel_to_workers(long_video: Video) -> None:
    dataset = clips([long_video])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[ClipRequest(0)]["video"], dataset[ClipRequest(0)]["video"])


def test_frames_of_a_video_are_those_of_the_file(long_video: Video) -> None:
    frames = np.stack(list(long_video.frames(30, 5, 2)))
    assert np.array_equal(frames, read_frames(long_video.path, 30, 5, 2))


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_frames", 0), ("frame_stride", 0), ("resolution", 0), ("batch_size", 0), ("val_batch_size", 0), ("seed", -1)],
)
def test_impossible_settings_of_a_data_module_are_refused_by_name(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{option}={value} is too small.*--data.{option}"):
        VideoDataModule(**{option: value})  # type: ignore[arg-type]
