"""Frames of video files by their number, exactly, and an index of how many frames each file has.

Frame k of a video is the k-th frame that decoding from the beginning gives. Time stamps are not to be trusted with
that: AVI has none (a file with B-frames shows them out of order), variable rates make `time x rate` land beside the
frame, and containers declare wrong counts or none. So frames are counted while decoding. Only where a file has several
key frames and a complete set of distinct time stamps does reading begin at a key frame, and then each frame must carry
exactly the stamp that belongs to its number; otherwise reading begins at the start again.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

# Where one packet is one frame and time stamps are kept. Others (AVI with placeholder packets, VP8 with hidden frames,
# MPEG program streams) are counted by decoding them.
_COUNTED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_COUNTED_CODECS = {"h264", "hevc", "vp9", "av1"}
_INDEX_VERSION = 1
_SAVE_EVERY = 5000

_log = logging.getLogger(__name__)


class UnreadableVideoError(Exception):
    """A file or folder that does not give the frames it should; the message names it and says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What reading needs to know about a video file.

    Args:
        num_frames: how many frames it has.
        width: stored width, before rotation.
        height: stored height, before rotation.
        rotation: degrees, counterclockwise, by which stored frames must be turned to be shown.
        key_frames: numbers of the frames at which reading may begin.
    """

    num_frames: int
    width: int
    height: int
    rotation: int
    key_frames: tuple[int, ...] = (0,)


def probe(path: str | Path) -> VideoInfo:
    """Count the frames of a video file and find its key frames; the first frame is decoded, to see that it can be.

    Raises:
        UnreadableVideoError: if the file cannot be opened or decoded, or holds no video.
    """
    with _video_stream(path) as (container, stream):
        frames = container.decode(stream)
        first = next(frames, None)
        if first is None:
            raise UnreadableVideoError(f"{path}: no frame can be decoded.")
        if container.format.name not in _COUNTED_CONTAINERS or stream.codec_context.name not in _COUNTED_CODECS:
            return VideoInfo(1 + sum(1 for _ in frames), first.width, first.height, first.rotation)
    with _video_stream(path) as (container, stream):
        packets = _packets(container, stream)
    num_frames = sum(not packet.is_discard for packet in packets)
    return VideoInfo(num_frames, first.width, first.height, first.rotation, _key_frames(packets))


def read_frames(
    path: str | Path, start: int, count: int, stride: int = 1, key_frames: Sequence[int] = (0,)
) -> np.ndarray:
    """Read frames `start, start + stride, ...` of a video file.

    Args:
        path: the file.
        start: number of the first frame, from 0.
        count: how many frames, at least 1.
        stride: distance of neighbouring frames.
        key_frames: where reading may begin, as `probe` found it.

    Returns:
        uint8 `[T, H, W, 3]`, RGB, rotated as the file says.

    Raises:
        UnreadableVideoError: if the file cannot be decoded, or ends before the last frame.
    """
    return np.stack(list(iter_frames(path, start, count, stride, key_frames)))


def iter_frames(
    path: str | Path, start: int, count: int, stride: int = 1, key_frames: Sequence[int] = (0,)
) -> Iterator[np.ndarray]:
    """Yield what `read_frames` returns, frame by frame `[H, W, 3]`: one frame at a time is in memory."""
    wanted = iter(range(start, start + count * stride, stride))
    number_wanted = next(wanted)
    nearest_key = max(key for key in (0, *key_frames) if key <= start)
    reformatter = VideoReformatter()
    length = 0
    for first in (nearest_key, 0) if nearest_key else (0,):
        for number, frame in _decode_from(path, first):
            length = number + 1
            if number == number_wanted:
                # Converted before it becomes an array, since planes of odd sizes cannot be exported. Conversion starts
                # threads unless told not to: a worker that is forked while such a converter waits for garbage
                # collection waits for its threads for ever, since threads do not survive a fork.
                rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                yield rotate(rgb, frame.rotation)
                number_wanted = next(wanted, -1)
                if number_wanted < 0:
                    return
    raise UnreadableVideoError(f"{path}: ends after {length} frames, but frame {number_wanted} was expected.")


def _decode_from(path: str | Path, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield frames with their numbers, from a key frame on; stop at once if a frame's time stamp denies its number."""
    with _video_stream(path) as (container, stream):
        if first == 0:
            yield from enumerate(container.decode(stream))
            return
        stamps = sorted(packet.stamp for packet in _packets(container, stream) if packet.stamp is not None)
        if first >= len(stamps):
            return
        try:
            container.seek(stamps[first], stream=stream)
        except av.FFmpegError:  # a file without an index need not be able to
            return
        for number, frame in enumerate(container.decode(stream), start=first):
            if number >= len(stamps) or frame.pts != stamps[number]:
                return
            yield number, frame


class _Packet(NamedTuple):
    stamp: int | None
    is_key: bool
    is_discard: bool


def _packets(container: InputContainer, stream: av.VideoStream) -> list[_Packet]:
    """Read through the file without decoding it; an empty packet marks its end."""
    return [_Packet(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]


def _key_frames(packets: Sequence[_Packet]) -> tuple[int, ...]:
    """Return the numbers of the frames to begin at: the first, and each key frame that nothing after it precedes.

    The rank of a time stamp is its frame's number. Where that is in doubt, there is only the first.
    """
    stamps = [packet.stamp for packet in packets if packet.stamp is not None]
    if len(set(stamps)) < len(packets) or any(packet.is_discard for packet in packets):
        return (0,)
    number_of = {stamp: number for number, stamp in enumerate(sorted(stamps))}
    numbers = [number_of[stamp] for stamp in stamps]
    key_frames = {0}
    first_later = len(numbers)
    for number, packet in zip(reversed(numbers), reversed(packets), strict=True):
        if packet.is_key and number < first_later:
            key_frames.add(number)
        first_later = min(first_later, number)
    return tuple(sorted(key_frames))


def rotate(image: np.ndarray, degrees: int) -> np.ndarray:
    """Turn an image `[H, W, 3]` counterclockwise by the nearest multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90)))


@contextmanager
def _video_stream(path: str | Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open the largest video stream that is no cover picture, for decoding in this thread."""
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            stream = max(streams, key=lambda s: s.width * s.height, default=None)
            if stream is None or stream.codec_context is None:
                raise UnreadableVideoError(f"{path}: holds no video that can be decoded.")
            # frame threads delay short reads and cost CPU time; loaders have worker processes instead
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideoError(f"{path}: {error}") from error


def index_videos(paths: Sequence[Path], root: Path, cache_dir: Path | None = None) -> dict[Path, VideoInfo | str]:
    """Probe video files, each one once: what is found is kept in a JSON file, and used while a file does not change.

    The file is `videos.json` in `<root>/.longtake`, or one named after the root in `cache_dir`. If it cannot be
    written, `~/.cache/longtake` takes its place.

    Args:
        paths: the files, below `root`.
        root: folder of the data set.
        cache_dir: where to keep the index instead.

    Returns:
        What is known of each file: a `VideoInfo`, or the reason why it cannot be read.
    """
    own_name = f"videos-{sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    place = root / ".longtake" / "videos.json" if cache_dir is None else cache_dir / own_name
    fallback = Path.home() / ".cache" / "longtake" / own_name
    known = {**_load_index(fallback), **_load_index(place)}
    stats = {path: _size_and_time(path) for path in paths}
    names = {path: os.path.relpath(path, root) for path in paths}
    changed = [path for path in paths if known.get(names[path], {}).get("file") != stats[path]]
    if changed:
        _log.info("Indexing %d videos below %s, once.", len(changed), root)
    with ThreadPoolExecutor() as pool:
        for done, (path, found) in enumerate(zip(changed, pool.map(_probe_or_reason, changed), strict=True), start=1):
            known[names[path]] = {"file": stats[path], **found}
            if done % _SAVE_EVERY == 0 or done == len(changed):
                place = _save_index(known, place, fallback)
    return {path: _info_or_reason(known[names[path]]) for path in paths}


def _probe_or_reason(path: Path) -> dict[str, Any]:
    try:
        return {"info": asdict(probe(path))}
    except UnreadableVideoError as error:
        return {"error": str(error)}


def _info_or_reason(entry: dict[str, Any]) -> VideoInfo | str:
    if "error" in entry:
        return str(entry["error"])
    info = entry["info"]
    return VideoInfo(**{**info, "key_frames": tuple(info["key_frames"])})


def _size_and_time(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _load_index(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):  # not there, or not ours: it is made anew
        return {}
    return content["videos"] if content.get("version") == _INDEX_VERSION else {}


def _save_index(known: dict[str, Any], place: Path, fallback: Path) -> Path:
    """Write the index whole or not at all, and return where it went."""
    content = json.dumps({"version": _INDEX_VERSION, "videos": known})
    try:
        _write_at_once(place, content)
    except OSError as error:
        if place == fallback:
            raise
        _log.warning(
            "The index of videos cannot be written to %s (%s); it goes to %s. Choose a folder with --data.cache_dir.",
            place, error.strerror, fallback,
        )  # fmt: skip
        _write_at_once(fallback, content)
        return fallback
    return place


def _write_at_once(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(content)
    os.replace(scratch, file)
