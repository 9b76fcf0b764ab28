"""Frames of video files by their number, exactly, and what must be known of a file to read it.

Frame k of a video is the k-th frame that decoding from the beginning gives. Time stamps are not to be trusted with
that: AVI has none (a file with B-frames shows them out of order), variable rates make `time x rate` land beside the
frame, and containers declare wrong counts or none. So frames are counted while decoding. Only where a file has several
key frames and a complete set of distinct time stamps does reading begin at a key frame, and then each frame must carry
exactly the stamp that belongs to its number; otherwise reading begins at the start again.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

# Where one packet is one frame and time stamps are kept. Others (AVI with placeholder packets, VP8 with hidden frames,
# MPEG program streams) are counted by decoding them.
_COUNTED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_COUNTED_CODECS = {"h264", "hevc", "vp9", "av1"}
# A file is called truncated if it holds less than this share of what it declares. Declared lengths are estimates in
# some containers, so the first one is wide; where the container says that bytes are missing, hardly any doubt is left.
_WHOLE, _WHOLE_IF_BYTES_ARE_MISSING = 0.9, 0.999


class UnreadableVideoError(OSError):
    """A file or folder that does not give the frames it should; the message names it and says why."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises the error of a worker again with the worker's whole traceback as its message: the user
        # gets what stands at its end.
        super().__init__(message.rpartition("VideoError: ")[2].rstrip())


class TruncatedVideoError(UnreadableVideoError):
    """A file that ends before the end it declares, though what is left of it can be decoded."""


@dataclass(frozen=True)
class Header:
    """What the header of a video file declares, some of it wrong.

    Args:
        container: FFmpeg's name of the file format, whatever the file is called.
        codec: FFmpeg's name of the video codec.
        width: stored width, before rotation.
        height: stored height, before rotation.
        fps: frames a second, on average; 0 if it is not declared.
        num_frames: number of frames; 0 if it is not declared.
        seconds: length; 0 if it is not declared.
    """

    container: str
    codec: str
    width: int
    height: int
    fps: float
    num_frames: int
    seconds: float


@dataclass(frozen=True)
class VideoInfo:
    """What reading needs to know about a video file.

    Args:
        num_frames: how many frames it has.
        width: stored width, before rotation.
        height: stored height, before rotation.
        rotation: degrees, counterclockwise, by which stored frames must be turned to be shown.
        key_frames: numbers of the frames at which reading may begin.
        has_stamps: whether the time stamps are complete and distinct, so that their ranks number the frames.
        container: FFmpeg's name of the file format; `images` is a folder of frames.
        codec: FFmpeg's name of the video codec.
    """

    num_frames: int
    width: int
    height: int
    rotation: int
    key_frames: tuple[int, ...] = (0,)
    has_stamps: bool = False
    container: str = ""
    codec: str = ""


def read_header(path: str | Path) -> Header:
    """Open a video file, and decode nothing.

    Raises:
        UnreadableVideoError: if the file cannot be opened, or holds no video.
    """
    with _video_stream(path) as (container, stream):
        return _header(container, stream)


def probe(path: str | Path) -> VideoInfo:
    """Count the frames of a video file, find its key frames, and decode its first and its last frame.

    Raises:
        TruncatedVideoError: if the file ends before the end that its header declares.
        UnreadableVideoError: if the file cannot be opened or decoded, or holds no video.
    """
    with _video_stream(path) as (container, stream):
        header = _header(container, stream)
        first = next(container.decode(stream), None)
    if first is None:
        raise UnreadableVideoError(f"{path}: no frame can be decoded.")
    with _video_stream(path) as (container, stream):
        packets, end = _packets(container, stream)
        to_seconds = float(stream.time_base or 0)

    numbers_by_packets = header.container in _COUNTED_CONTAINERS and header.codec in _COUNTED_CODECS
    num_frames = sum(not packet.is_discard for packet in packets)
    has_stamps = numbers_by_packets and _stamps_number_frames(packets)
    key_frames = _key_frames(packets) if has_stamps else (0,)
    if not (numbers_by_packets and num_frames and _decodes(path, num_frames - 1, key_frames)):
        with _video_stream(path) as (container, stream):
            num_frames = sum(1 for _ in container.decode(stream))
        key_frames, has_stamps = (0,), False

    least = _WHOLE_IF_BYTES_ARE_MISSING if bytes_are_missing(path) else _WHOLE
    if numbers_by_packets and num_frames < _WHOLE * sum(not packet.is_discard for packet in packets):
        raise TruncatedVideoError(f"{path}: truncated, only {num_frames} of {len(packets)} frames can be decoded.")
    if header.num_frames:
        # AVI numbers its packets, empty ones included: a frame that was dropped on purpose is not missing
        stamps = [packet.decoding_stamp for packet in packets if packet.decoding_stamp is not None]
        spanned = round((stamps[-1] - stamps[0]) * to_seconds * header.fps) + 1 if stamps else 0
        if max(len(packets), spanned) < least * header.num_frames:
            raise TruncatedVideoError(f"{path}: truncated, {num_frames} of {header.num_frames} frames are there.")
    elif end < least * header.seconds:
        raise TruncatedVideoError(f"{path}: truncated, {end:.2f} of {header.seconds:.2f} seconds are there.")
    return VideoInfo(
        num_frames, first.width, first.height, first.rotation, key_frames, has_stamps, header.container, header.codec
    )


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
                rgb = reformatter.reformat(frame, format="rgb24", threads=1)
                plane = rgb.planes[0]  # whose memory is used as it is; a row may end in bytes that are no pixels
                pixels = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload] # a plane is a buffer
                rows = pixels.reshape(-1, plane.line_size)[: rgb.height, : 3 * rgb.width]
                yield rotate(rows.reshape(rgb.height, rgb.width, 3), frame.rotation)
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
        packets, _ = _packets(container, stream)
        stamps = sorted(packet.stamp for packet in packets if packet.stamp is not None)
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
    decoding_stamp: int | None = None


def _packets(container: InputContainer, stream: av.VideoStream) -> tuple[list[_Packet], float]:
    """Read through the file without decoding it; return the stream's packets, and when the last of all streams ends."""
    packets, end = [], 0.0
    for p in container.demux():
        if not p.size:  # marks the end of a stream
            continue
        if p.pts is not None and p.time_base is not None:
            end = max(end, float((p.pts + (p.duration or 0)) * p.time_base))
        if p.stream.index == stream.index:
            packets.append(_Packet(p.pts, p.is_keyframe, p.is_discard, p.dts))
    return packets, end


def _stamps_number_frames(packets: Sequence[_Packet]) -> bool:
    """Whether the rank of a packet's time stamp is its frame's number."""
    stamps = {packet.stamp for packet in packets if packet.stamp is not None}
    return len(stamps) == len(packets) and not any(packet.is_discard for packet in packets)


def _key_frames(packets: Sequence[_Packet]) -> tuple[int, ...]:
    """Return the numbers of the frames to begin at: the first, and each key frame that nothing after it precedes."""
    stamps = [packet.stamp for packet in packets if packet.stamp is not None]
    number_of = {stamp: number for number, stamp in enumerate(sorted(stamps))}
    numbers = [number_of[stamp] for stamp in stamps]
    key_frames = {0}
    first_later = len(numbers)
    for number, packet in zip(reversed(numbers), reversed(packets), strict=True):
        if packet.is_key and number < first_later:
            key_frames.add(number)
        first_later = min(first_later, number)
    return tuple(sorted(key_frames))


def _decodes(path: str | Path, number: int, key_frames: Sequence[int]) -> bool:
    try:
        read_frames(path, number, 1, key_frames=key_frames)
    except UnreadableVideoError:
        return False
    return True


def _header(container: InputContainer, stream: av.VideoStream) -> Header:
    # PyAV 17 says None, 19 zero where nothing is declared
    fps, seconds = float(stream.average_rate or 0), (container.duration or 0) / av.time_base
    codec = stream.codec_context.name
    return Header(container.format.name, codec, stream.width, stream.height, fps, stream.frames, seconds)


def bytes_are_missing(path: str | Path) -> bool:
    """Whether an AVI, Matroska or MP4 file is shorter than its outermost parts say. Other formats do not say."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        if len(start) < 64:
            return False
        if start[:4] == b"RIFF":
            declared = int.from_bytes(start[4:8], "little")
            return declared not in (0, 2**32 - 1) and declared + 8 > size  # both: written to a stream
        if start[:4] == b"\x1a\x45\xdf\xa3":
            header_size, place = _ebml_size(start, 4)
            place += header_size
            if place + 12 > size:
                return True
            file.seek(place)
            segment_size, begin = _ebml_size(file.read(12), 4)
            return segment_size >= 0 and place + begin + segment_size > size
        place = 0
        while start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"uuid"):
            box = int.from_bytes(start[:4], "big")
            if box == 1:
                box = int.from_bytes(start[8:16], "big")
            place += box or size
            if box < 8 or place >= size:
                return place > size
            file.seek(place)
            start = file.read(16)
        return False


def _ebml_size(data: bytes, place: int) -> tuple[int, int]:
    """Return the number of variable length at a place, -1 if it means "unknown", and the place after it."""
    length = 9 - data[place].bit_length()
    value = int.from_bytes(data[place : place + length], "big") & (1 << 7 * length) - 1
    return (-1 if value == (1 << 7 * length) - 1 else value), place + length


def rotate(image: np.ndarray, degrees: int) -> np.ndarray:
    """Turn an image `[H, W, 3]` counterclockwise by the nearest multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90)))


@contextmanager
def _video_stream(path: str | Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open the largest video stream that is no cover picture, for decoding in this thread."""
    require_regular_file(path)
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            # without a known codec a stream has no size either
            known = [s for s in container.streams.video if s.codec_context is not None]
            streams = [s for s in known if not s.disposition & Disposition.attached_pic]
            stream = max(streams, key=lambda s: s.width * s.height, default=None)
            if stream is None:
                raise UnreadableVideoError(f"{path}: holds no video that can be decoded.")
            # frame threads delay short reads and cost CPU time; loaders have worker processes instead
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except UnreadableVideoError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideoError(f"{path}: {error}") from error


def require_regular_file(path: str | Path) -> None:
    """Refuse what would block or never end when it is opened: pipes, devices, sockets.

    Raises:
        UnreadableVideoError: if it is not there, or no regular file (nor a link to one).
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableVideoError(f"{path}: {error.strerror if isinstance(error, OSError) else error}.") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket"}
        raise UnreadableVideoError(f"{path}: is a {kinds.get(stat.S_IFMT(mode), 'device')}, no regular file.")
