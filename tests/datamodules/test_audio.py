import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numbered_video import numbered_frame, read_numbers
from sound_video import BAND_HERTZ, heard_bands, sine, tone_band, write_sound_video

from datamodules.audio import (
    SAMPLING_RATE,
    AudioFramesDataModule,
    SoundClips,
    spectrogram,
)
from datamodules.sampler import ClipRequest
from datamodules.sound import frame_times, has_sound, read_sound
from datamodules.video import Video, VideoClips

# 5 frames of 40 ms, away from the waveform's ends
EDGES = 0.1 + torch.arange(6, dtype=torch.float64) / 25


class TestSpectrogram:
    def test_silence_is_the_lowest_value(self) -> None:
        audio = spectrogram(torch.zeros(8000), EDGES)
        assert audio.shape == (1, 5, 64, 16)
        assert audio.dtype == torch.float32
        assert torch.all(audio == -1)

    @pytest.mark.parametrize("band", [1, 20, 62])
    def test_a_full_scale_sine_fills_its_band_and_no_other(self, band: int) -> None:
        audio = spectrogram(sine((band + 0.5) * BAND_HERTZ), EDGES)
        assert torch.all(audio[:, :, band] > 0.98)
        far = [other for other in range(64) if abs(other - band) > 1]
        assert torch.all(audio[:, :, far] < 0)  # below -40 dB

    @pytest.mark.parametrize("decibels", [-6.0, -40.0])
    def test_values_are_decibels(self, decibels: float) -> None:
        loud, quiet = (spectrogram(sine(2062.5, amplitude=a), EDGES) for a in (0.9, 0.9 * 10 ** (decibels / 20)))
        assert torch.allclose((quiet - loud)[:, :, 16], torch.tensor(2 * decibels / 80), atol=1e-4)

    def test_louder_than_full_scale_stays_in_range(self) -> None:
        assert spectrogram(sine(2062.5, amplitude=50.0), EDGES).max() == 1

    @pytest.mark.parametrize("frame_seconds", [0.04, 0.1])
    def test_an_impulse_is_heard_at_its_time_within_half_a_window(self, frame_seconds: float) -> None:
        waveform = torch.zeros(16000)
        waveform[8000] = 1.0
        edges = torch.arange(11, dtype=torch.float64) * frame_seconds + 0.3
        loud = (spectrogram(waveform, edges)[0].amax(1) > -0.9).flatten()  # [T x 16]
        columns = loud.nonzero().flatten()
        middles = 0.3 + (columns + 0.5) * frame_seconds / 16
        assert torch.all((middles - 0.5).abs() <= 0.016)
        assert middles.min() < 0.492
        assert middles.max() > 0.508

    def test_there_is_silence_before_and_after_the_sound(self) -> None:
        edges = torch.tensor([-1.0, -0.5, 0.5, 0.9, 2.0], dtype=torch.float64)
        before, around, inside, after = spectrogram(sine(2062.5, seconds=1.0), edges)[0]
        assert torch.all(before == -1)
        assert around.max() > 0.9
        assert inside.max() > 0.9
        assert torch.all(after[:, 4:] == -1)
        assert torch.all(spectrogram(torch.zeros(0), edges) == -1)

    def test_a_part_of_the_sound_is_enough_for_a_part_of_the_frames(self) -> None:
        waveform = torch.randn(8000, generator=torch.Generator().manual_seed(0))
        whole = spectrogram(waveform, EDGES)
        part = spectrogram(waveform[2000:6000], EDGES[2:5], first_sample=2000)
        assert torch.equal(part, whole[:, 2:4])


class TestReading:
    # the picture's time stamps are complete in mp4, in doubt in AVI
    @pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.avi", "libmp3lame"), ("a.mkv", "pcm_s16le")])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_each_frame_comes_with_its_own_sound(self, tmp_path: Path, name: str, codec: str, stride: int) -> None:
        path = write_sound_video(tmp_path / name, 40, codec)
        clips = SoundClips(VideoClips([Video(path, 3, 40)], 8, stride, 64, seed=0))
        for epoch in range(3):
            item = clips[ClipRequest(0, epoch)]
            # a band a frame: with a stride, a frame is heard until the next one of the clip, so look at its first half
            numbers = read_numbers(item["video"].permute(1, 2, 3, 0).add(1).mul(127.5).numpy())
            audio = item["audio"]
            assert audio.shape == (1, 8, 64, 16)
            quarter = {1: slice(6, 10), 2: slice(3, 5)}[stride]
            bands = audio[0, :, :, quarter].mean(-1).argmax(-1).tolist()
            assert bands == [tone_band(number) for number in numbers]

    def test_a_window_reads_the_sound_of_its_frames(self, tmp_path: Path) -> None:
        path = write_sound_video(tmp_path / "a.mp4", 40)
        clips = SoundClips(VideoClips([Video(path, 3, 40)], 16, 1, 64, seed=0))
        whole = clips[ClipRequest(0, 5)]["audio"]
        window = clips[ClipRequest(0, 5, window_start=4, window_frames=6, read_start=3, read_frames=8)]
        assert torch.equal(window["audio"], whole[:, 3:11])
        assert window["margin_before"] == 1

    def test_sound_that_begins_late_is_heard_at_its_time(self, tmp_path: Path) -> None:
        path = write_sound_video(tmp_path / "a.mkv", 20, "pcm_s16le", delay_frames=8)
        audio = SoundClips(VideoClips([Video(path, 0, 20)], 20, 1, 64, seed=0))[ClipRequest(0)]["audio"]
        assert torch.all(audio[0, :7] == -1)
        assert heard_bands(audio[:, 9:]) == [tone_band(number) for number in range(9, 20)]

    @pytest.mark.parametrize("rate", [8000, 48000])
    def test_sound_is_resampled(self, tmp_path: Path, rate: int) -> None:
        path = write_sound_video(tmp_path / "a.mkv", 25, "pcm_s16le", rate=rate)
        waveform = read_sound(path, 10.0)
        assert len(waveform) == pytest.approx(SAMPLING_RATE, abs=64)
        assert waveform.dtype == np.float32
        assert 0.4 < np.abs(waveform).max() < 0.8

    def test_only_what_is_needed_is_returned(self, tmp_path: Path) -> None:
        path = write_sound_video(tmp_path / "a.mkv", 25, "pcm_s16le")
        assert np.array_equal(read_sound(path, 0.25), read_sound(path, 10.0)[: SAMPLING_RATE // 4 + 1])

    def test_sound_that_cannot_be_read_is_silence_and_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "a.mp4").write_bytes(b"no video")
        with caplog.at_level(logging.WARNING):
            assert len(read_sound(tmp_path / "a.mp4", 1.0)) == 0
        assert "a.mp4 ends in an error" in caplog.text


class TestFrameTimes:
    def test_time_stamps_count_where_frames_are_unevenly_spaced(self, tmp_path: Path) -> None:
        stamps = [0, 40, 80, 200, 240, 900]
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for number, stamp in enumerate(stamps):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
                frame.pts, frame.time_base = stamp, Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        times = frame_times(tmp_path / "a.mkv", 6, extra=2)
        assert times.tolist() == pytest.approx([0, 0.04, 0.08, 0.2, 0.24, 0.9, 1.08, 1.26])

    def test_the_declared_rate_counts_where_stamps_do_not_match(self, tmp_path: Path) -> None:
        path = write_sound_video(tmp_path / "a.mkv", 10, "pcm_s16le", fps=20)
        assert frame_times(path, 12).tolist() == pytest.approx([k / 20 for k in range(13)])

    @pytest.mark.parametrize("b_frames", [0, 2])
    def test_avi_begins_at_0_with_and_without_b_frames(
        self, tmp_path: Path, write_video: Callable[..., Path], b_frames: int
    ) -> None:
        path = write_video(tmp_path / "a.avi", 10, max_b_frames=b_frames)
        assert frame_times(path, 10).tolist() == pytest.approx([k / 25 for k in range(11)])


class TestWhoHasSound:
    def test_videos_without_sound_are_left_out(self, tmp_path: Path, write_video: Callable[..., Path]) -> None:
        for number in (0, 2):
            write_video(tmp_path / "train" / f"{number}.avi", 8)
        for name in ("train/1.avi", "val/0.avi"):
            write_sound_video(tmp_path / name, 8, "libmp3lame")
        data = AudioFramesDataModule(str(tmp_path), num_frames=4, resolution=64, batch_size=1)
        data.prepare_data()
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert (batch["video"].shape, batch["audio"].shape) == ((1, 3, 4, 64, 64), (1, 1, 4, 64, 16))
        dataset: Any = data.datasets["train"]
        assert len(dataset) == 1
        assert dataset.clips.videos[0].path.name == "1.avi"

    def test_no_sound_at_all_is_an_error(self, tmp_path: Path, write_video: Callable[..., Path]) -> None:
        path = write_video(tmp_path / "a.avi", 8)
        with pytest.raises(ValueError, match="none of 1 videos has a sound track"):
            SoundClips(VideoClips([Video(path, 0, 8)], 4, 1, 32, seed=0))

    def test_what_cannot_be_opened_has_no_sound(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(b"")
        assert not has_sound(tmp_path / "a.mp4")
        assert not has_sound(tmp_path / "b.mp4")


def test_sound_is_read_in_a_process_of_its_own_where_there_is_a_time_limit(tmp_path: Path) -> None:
    path = write_sound_video(tmp_path / "a.mkv", 12, "pcm_s16le")
    item, limited = (
        SoundClips(VideoClips([Video(path, 0, 12, read_timeout=limit)], 4, 2, 64, seed=0))[ClipRequest(0, 1)]
        for limit in (None, 60)
    )
    assert torch.equal(item["audio"], limited["audio"])


def test_a_video_that_vanishes_before_its_sound_is_read_is_replaced_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train/a.mkv", "train/b.mkv", "val/c.mkv"):
        write_sound_video(tmp_path / name, 8, "pcm_s16le")
    data = AudioFramesDataModule(str(tmp_path), num_frames=4, resolution=64, batch_size=1)
    data.prepare_data()
    data.setup()
    dataset: Any = data.datasets["train"]
    read = VideoClips.read

    def read_and_lose(clips: VideoClips, request: ClipRequest) -> torch.Tensor:
        video = read(clips, request)
        (tmp_path / "train/a.mkv").unlink(missing_ok=True)
        return video

    monkeypatch.setattr(VideoClips, "read", read_and_lose)
    assert dataset[ClipRequest(0)]["index"] == 1
    assert data.num_quarantined() == 1
    assert "a.mkv" in (tmp_path / ".longtake" / "quarantine.jsonl").read_text()


def test_a_replaced_video_comes_with_its_own_sound(tmp_path: Path) -> None:
    good = write_sound_video(tmp_path / "good.mkv", 12, "pcm_s16le")
    # declares more frames than it has: reading it fails
    short = write_sound_video(tmp_path / "short.mkv", 4, "pcm_s16le")
    clips = SoundClips(VideoClips([Video(short, 0, 30), Video(good, 1, 12)], 12, 1, 64, seed=0))
    item = clips[ClipRequest(0, 1)]
    assert (item["index"], item["label"]) == (1, 1)
    assert heard_bands(item["audio"]) == [tone_band(number) for number in range(12)]
