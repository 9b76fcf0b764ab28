import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.sample_writer import SampleWriter
from models.random import keyed_generator

ABOUT = {"checkpoint": "here.ckpt", "seeds": [3, 4, 12345678]}


def videos(seeds: list[int], num_frames: int = 5) -> dict[str, Any]:
    """Smooth videos in two pieces, each of its own brightness: what a codec keeps."""
    shades = torch.tensor([(seed % 7) / 3.5 - 1 for seed in seeds])
    video = shades.view(-1, 1, 1, 1, 1).expand(-1, 3, num_frames, 16, 24)
    return {"seeds": torch.tensor(seeds), "pieces": iter(video.split(3, dim=2))}


def write(writer: SampleWriter, *batches: dict[str, Any], is_global_zero: bool = True) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=is_global_zero)
    writer.on_predict_start(trainer, None)
    for index, batch in enumerate(batches):
        writer.write_on_batch_end(trainer, None, batch, None, {"num_frames": 5}, index, 0)
    writer.on_predict_end(trainer, None)


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_each_video_is_named_by_its_seed_and_holds_nothing_else(tmp_path: Path) -> None:
    write(SampleWriter(tmp_path, 8, ABOUT), videos([3, 4]), videos([12345678]))
    assert sorted(path.name for path in tmp_path.glob("seed=*")) == [
        "seed=000003.mp4",
        "seed=000004.mp4",
        "seed=12345678.mp4",
    ]
    for seed in (3, 4, 12345678):
        frames = read(tmp_path / f"seed={seed:06d}.mp4")
        assert frames.shape == (5, 16, 24, 3)  # no border
        assert np.abs(frames - 255 * (seed % 7) / 7).max() < 4  # of 255: the codec's rounding


def test_frames_are_shown_at_the_speed_asked_for(tmp_path: Path) -> None:
    write(SampleWriter(tmp_path, 5, ABOUT), videos([3]))
    with av.open(str(tmp_path / "seed=000003.mp4")) as container:
        assert container.streams.video[0].average_rate == 5


def test_sheet_grid_and_numbers_are_written_once(tmp_path: Path) -> None:
    write(SampleWriter(tmp_path, 8, ABOUT), videos([3, 4]), videos([5]))
    about = json.loads((tmp_path / "samples.json").read_text())
    assert about.pop("seconds_per_video") > 0
    assert about == ABOUT
    assert read(tmp_path / "grid.mp4").shape[0] == 5
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height  # five frames in each of three rows


def test_seconds_are_those_of_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    write(SampleWriter(tmp_path, 8, {}), videos([3, 4]), videos([5]))
    assert json.loads((tmp_path / "samples.json").read_text()) == {"seconds_per_video": 2.0}


def test_the_sheet_shows_no_more_than_it_is_meant_to(tmp_path: Path) -> None:
    heights = []
    for most in (2, 4):
        folder = tmp_path / str(most)
        write(SampleWriter(folder, 8, {}, num_on_sheet=most), videos([1, 2, 3]), videos([4, 5, 6]))
        assert len(list(folder.glob("seed=*"))) == 6
        with Image.open(folder / "contact_sheet.png") as sheet:
            heights.append(sheet.height)
    assert heights[1] > 1.8 * heights[0]


def test_other_ranks_write_their_videos_and_leave_the_rest_to_rank_0(tmp_path: Path) -> None:
    write(SampleWriter(tmp_path, 8, ABOUT), videos([3]), is_global_zero=False)
    assert [path.name for path in tmp_path.iterdir()] == ["seed=000003.mp4"]


def test_videos_are_written_while_they_come(tmp_path: Path) -> None:
    """A run that is stopped has what it had made."""
    writer = SampleWriter(tmp_path, 8, ABOUT)
    noise = torch.rand(1, 3, 2, 16, 16, generator=keyed_generator(0)) * 2 - 1
    batch = {"seeds": torch.tensor([9]), "pieces": [noise]}
    writer.write_on_batch_end(None, None, batch, None, {"num_frames": 2}, 0, 0)
    assert (tmp_path / "seed=000009.mp4").is_file()


def test_what_was_given_and_what_was_made_stand_beside_the_result(tmp_path: Path) -> None:
    """In the file of the edit and on the sheet: what was given, the mask (white is what was made), the result."""
    batch = videos([6])
    batch["condition"] = torch.full((1, 3, 5, 16, 24), -1.0)
    batch["known"] = (torch.arange(5) < 4).view(1, 5, 1, 1).expand(1, 5, 16, 24)
    writer = SampleWriter(tmp_path, 8, ABOUT)
    write(writer, batch)
    assert writer.shown is not None
    given, mask, result = writer.shown
    assert (given == 0).all()
    assert mask[:, :4].max() == 0
    assert mask[:, 4].min() == 255
    assert (result == 219).all()  # 6 / 7 of 255
    assert read(tmp_path / "seed=000006_edit.mp4").shape[0] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "contact_sheet.png",
        "grid.mp4",
        "samples.json",
        "seed=000006.mp4",
        "seed=000006_edit.mp4",
    ]


def test_a_failure_in_the_middle_leaves_no_half_written_video(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield torch.zeros(1, 3, 2, 16, 16)
        raise RuntimeError("out of memory")

    batch = {"seeds": torch.tensor([9]), "pieces": pieces()}
    with pytest.raises(RuntimeError, match="out of memory"):
        SampleWriter(tmp_path, 8, ABOUT).write_on_batch_end(None, None, batch, None, {"num_frames": 4}, 0, 0)
    assert list(tmp_path.iterdir()) == []
