"""Any folder of videos as small data sets in the official layouts: `python -m experiments.make_layouts CLIPS OUT`.

For trying a data module, an experiment or a machine before the real data set is there. Each video becomes a class, cut
into clips without overlap, of which every third is held out. What is written is what the data sets' archives and lists
look like when they are unpacked, down to codecs, sizes and file names.
"""

import argparse
import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from datamodules.bair import NUM_FRAMES as BAIR_FRAMES
from datamodules.decoding import UnreadableVideoError, iter_frames, probe
from datamodules.frames import find_videos
from datamodules.tfrecord import encode_example, write_records

LAYOUTS = (
    "ucf101", "bair", "k600", "ssv2", "frames", "sky_timelapse", "taichi_hd", "nuscenes_front", "objectron", "images",
    "captions",
)  # fmt: skip
_SOUND_RATE = 16_000


@dataclass(frozen=True)
class Clip:
    """A piece of a video.

    Args:
        source: the video's name, which is the clip's class.
        number: its place in the video, from 0.
    """

    source: str
    number: int

    def split(self, fold: int = 1) -> str:
        """Return `train`, or `val` for every third clip: the last of three in the first fold."""
        return "val" if self.number % 3 == 3 - fold else "train"

    @property
    def test(self) -> str:
        """The split, where it is called `train` and `test`."""
        return "train" if self.split() == "train" else "test"

    @property
    def name(self) -> str:
        """A name of its own."""
        return f"{self.source}_{self.number:02d}"

    @property
    def captioned(self) -> str:
        """Its path in the lists of captions."""
        return f"clips/{self.name}.mp4"

    @property
    def words(self) -> list[str]:
        """The words of the video's name."""
        return re.findall(r"[^\W_]+", self.source)

    @property
    def ucf101(self) -> str:
        """UCF-101's path for it: a group of its own in the class's folder."""
        name = "".join(word.capitalize() for word in self.words)
        return f"{name}/v_{name}_g{self.number + 1:02d}_c01.avi"

    @property
    def youtube_id(self) -> str:
        """An identifier of YouTube's form, from a hash."""
        return base64.urlsafe_b64encode(sha256(f"{self.source}/{self.number}".encode()).digest()[:8]).decode()[:11]


def cut(path: Path, num_frames: int) -> Iterator[np.ndarray]:
    """Yield consecutive clips `[T, H, W, 3]` of a video, as far as it can be read; a shorter rest is left out."""
    try:
        clip: list[np.ndarray] = []
        for frame in iter_frames(path, 0, probe(path).num_frames):
            clip.append(frame)
            if len(clip) == num_frames:
                yield np.stack(clip)
                clip = []
    except UnreadableVideoError as error:
        print(f"The rest is left out: {error}")


def fitted(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale and crop frames `[T, H, W, 3]` at the centre."""
    images = [ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in images])


def write_video(
    path: Path, frames: np.ndarray, codec: str, fps: int, options: Mapping[str, str], hertz: float | None = None
) -> None:
    """Encode frames `[T, H, W, 3]`, if wanted with a tone; the suffix chooses the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=dict(options))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        sound = None if hertz is None else container.add_stream("aac", rate=_SOUND_RATE, layout="mono")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(picture, format="yuv420p", threads=1)))
        container.mux(stream.encode())
        if sound is not None and hertz is not None:
            phase = 2 * np.pi * hertz * np.arange(_SOUND_RATE * len(frames) // fps) / _SOUND_RATE
            wave = (16_000 * np.sin(phase)).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = _SOUND_RATE, 0, Fraction(1, _SOUND_RATE)
            for part in av.AudioResampler(sound.codec_context.format, "mono", _SOUND_RATE).resample(samples):
                container.mux(sound.encode(part))
            container.mux(sound.encode())


def write_clip(root: Path, layout: str, number: int, clip: Clip, frames: np.ndarray) -> None:
    """Write a clip's video file or frames; BAIR's, whose files hold many clips, are written by `write_lists`."""
    if layout == "ucf101":
        options = {"bf": "2", "b": "1000000"}  # B-frames, one key frame, as the originals
        write_video(root / "UCF-101" / clip.ucf101, fitted(frames, 320, 240), "mpeg4", 25, options | {"g": "600"})
    elif layout == "k600":
        file = root / clip.split() / _k600_name(clip)
        write_video(file, fitted(frames, 340, 256), "libx264", 30, {"crf": "18", "preset": "veryfast"})
    elif layout == "ssv2":
        file = root / "20bn-something-something-v2" / f"{number + 1}.webm"
        options = {"crf": "20", "b": "0", "g": "600", "deadline": "realtime", "cpu-used": "8"}
        write_video(file, fitted(frames, 427, 240), "libvpx-vp9", 12, options)
    elif layout == "frames":
        write_frames(root / clip.split() / clip.source / clip.name, fitted(frames, 256, 256), 1)
    elif layout == "sky_timelapse":
        folder = root / f"sky_{clip.test}" / clip.source / f"{clip.source}_{clip.number + 1}"
        write_frames(folder, fitted(frames, 640, 360), 1 + clip.number * len(frames))
    elif layout == "taichi_hd":
        name = f"{clip.source}#{clip.number * len(frames):06d}#{(clip.number + 1) * len(frames):06d}.mp4"
        write_video(
            root / clip.test / name, fitted(frames, 256, 256), "libx264", 30, {"crf": "18", "preset": "veryfast"}
        )
    elif layout == "nuscenes_front":  # names end in a time stamp in microseconds, twelve a second
        folder = root / clip.split() / f"scene-{number + 1:04d}"
        write_frames(folder, fitted(frames, 800, 450), 1_532_402_927_612_460, 83_333)
    elif layout == "objectron":
        file = root / clip.test / clip.source / "batch-1" / str(clip.number) / "video.MOV"
        write_video(file, fitted(frames, 480, 640), "libx264", 30, {"crf": "18", "preset": "veryfast"})
    elif layout == "images":
        file = root / clip.split() / clip.source / f"{clip.name}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(fitted(frames[:1], 500, 375)[0]).save(file, quality=95)
    elif layout == "captions":
        options = {"crf": "18", "preset": "veryfast"}
        write_video(root / clip.captioned, fitted(frames, 320, 240), "libx264", 25, options, 500.0 * (number % 12 + 1))


def write_frames(folder: Path, frames: np.ndarray, first: int, step: int = 1) -> None:
    """Write frames `[T, H, W, 3]` as JPEG files, numbered `first`, `first + step`, ..."""
    folder.mkdir(parents=True)
    for time, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{first + step * time:06d}.jpg", quality=95)


def bair_record(frames: np.ndarray) -> bytes:
    """Return a record of 30 frames: the second camera sees the mirror image, and nobody moved the arm."""
    small = fitted(frames[:BAIR_FRAMES], 64, 64)
    features: dict[str, bytes | Sequence[float]] = {}
    for time, image in enumerate(small):
        features[f"{time}/image_main/encoded"] = image.tobytes()
        features[f"{time}/image_aux1/encoded"] = image[:, ::-1].tobytes()
        features[f"{time}/action"] = [0.0] * 4
        features[f"{time}/endeffector_pos"] = [0.0] * 3
    return encode_example(features)


def write_lists(root: Path, layout: str, clips: Sequence[Clip], records: Sequence[bytes]) -> None:
    """Write what a layout has besides the clips: lists, classes, or BAIR's files of records."""
    splits = {split: [clip for clip in clips if clip.split() == split] for split in ("train", "val")}
    if layout == "ucf101":
        lists = root / "ucfTrainTestlist"
        lists.mkdir()
        classes = list(dict.fromkeys(clip.ucf101.split("/")[0] for clip in clips))
        _write_rows(lists / "classInd.txt", [f"{number} {name}" for number, name in enumerate(classes, start=1)])
        for fold in (1, 2, 3):
            train = [clip.ucf101 for clip in clips if clip.split(fold) == "train"]
            test = [clip.ucf101 for clip in clips if clip.split(fold) == "val"]
            rows = [f"{name} {classes.index(name.split('/')[0]) + 1}" for name in train]
            _write_rows(lists / f"trainlist0{fold}.txt", rows)
            _write_rows(lists / f"testlist0{fold}.txt", test)
    elif layout == "bair":
        first = 0
        for folder, split in (("test", "val"), ("train", "train")):
            chosen = [record for clip, record in zip(clips, records, strict=True) if clip.split() == split]
            file = root / "softmotion30_44k" / folder / f"traj_{first}_to_{first + len(chosen) - 1}.tfrecords"
            file.parent.mkdir(parents=True)
            write_records(file, chosen)
            first += len(chosen)
    elif layout == "k600":
        (root / "annotations").mkdir()
        for split, chosen_clips in splits.items():
            rows = [
                f'"{" ".join(clip.words)}",{clip.youtube_id},{10 * clip.number},{10 * clip.number + 10},{split}'
                for clip in chosen_clips
            ]
            _write_rows(root / "annotations" / f"{split}.csv", ["label,youtube_id,time_start,time_end,split", *rows])
    elif layout == "ssv2":
        lists = root / "labels"
        lists.mkdir()
        templates = {clip.source: f"Showing [something] of {' '.join(clip.words)}" for clip in clips}
        labels = {name.replace("[something]", "something"): str(i) for i, name in enumerate(templates.values())}
        (lists / "labels.json").write_text(json.dumps(labels, indent=1))
        for split, name in (("train", "train"), ("val", "validation")):
            content = [
                {
                    "id": str(clips.index(clip) + 1),
                    "label": templates[clip.source].replace("[something]", f"part {clip.number + 1}"),
                    "template": templates[clip.source],
                    "placeholders": [f"part {clip.number + 1}"],
                }
                for clip in splits[split]
            ]
            (lists / f"{name}.json").write_text(json.dumps(content, indent=1))
    elif layout == "captions":
        labels = {source: str(number) for number, source in enumerate(dict.fromkeys(clip.source for clip in clips))}
        for split, chosen_clips in splits.items():
            lines = [
                json.dumps(
                    {
                        "path": clip.captioned,
                        "text": f"part {clip.number + 1} of {' '.join(clip.words)}",
                        "label": int(labels[clip.source]),
                    }
                )
                for clip in chosen_clips
            ]
            _write_rows(root / f"{split}.jsonl", lines)


def _k600_name(clip: Clip) -> str:
    return f"{clip.youtube_id}_{10 * clip.number:06d}_{10 * clip.number + 10:06d}.mp4"


def _write_rows(file: Path, rows: Sequence[str]) -> None:
    file.write_text("".join(f"{row}\n" for row in rows))


def main(args: Sequence[str] | None = None) -> None:
    """Cut the videos of a folder, and write them in each layout."""
    parser = argparse.ArgumentParser(prog="python -m experiments.make_layouts", description=__doc__)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("out", type=Path, help="folder to write to: one below it for each layout")
    parser.add_argument("--frames", type=int, default=32, help=f"frames of a clip, at least {BAIR_FRAMES}")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="which; all by default")
    options = parser.parse_args(args)
    if options.frames < BAIR_FRAMES:
        raise ValueError(f"--frames={options.frames} is too small: BAIR's records have {BAIR_FRAMES}.")
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already. Remove it, or choose another place.")
    clips: list[Clip] = []
    records: list[bytes] = []
    for path in find_videos(options.clips):
        if path.is_dir():
            continue  # frames of a video, which FramesDataModule reads as they are
        source = "_".join(path.relative_to(options.clips).with_suffix("").parts)
        before = len(clips)
        for number, frames in enumerate(cut(path, options.frames)):
            clip = Clip(source, number)
            for layout in options.layouts:
                write_clip(options.out / layout, layout, len(clips), clip, frames)
            if "bair" in options.layouts:
                records.append(bair_record(frames))
            clips.append(clip)
        print(f"{path.name}: {len(clips) - before} clips of {options.frames} frames")
    held_out = sum(clip.split() == "val" for clip in clips)
    if not held_out:
        raise ValueError(
            f"{options.clips} has no video of {3 * options.frames} frames, so that no clip can be held out. "
            "Give a longer one, or lower --frames."
        )
    for layout in options.layouts:
        write_lists(options.out / layout, layout, clips, records)
    print(f"{len(clips) - held_out} clips to train on and {held_out} held out, in {', '.join(options.layouts)}")


if __name__ == "__main__":
    main()
