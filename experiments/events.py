"""A run's TensorBoard event files, read without TensorBoard: every scalar, and the last picture of each name."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

# Larger records are pictures: their checksum takes a tenth of a second a megabyte, and a damaged one is seen to be so.
MAX_CHECKED_BYTES = 1 << 16


@dataclass
class Events:
    """What event files hold.

    Args:
        scalars: Values by name and step, in the order of steps. Of a step that was done more than once, the last time.
        pictures: Step and encoded image by name.
        seconds: From the first to the last event of each file, all files together.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    seconds: float = 0.0


def read_events(folder: Path) -> Events:
    """Read all event files of a run, the oldest first.

    A resumed run has a file for each start. What a start did after the checkpoint that the next one went on from is
    left out, as TensorBoard does.

    Raises:
        ValueError: If a file is damaged. One that ends within a record is not: its run was killed, or still writes.
    """
    found = Events()
    for file in sorted(folder.glob("events.out.tfevents.*")):  # names begin with the time
        times = []
        for event in _events(file):
            times.append(event.wall_time)
            if event.session_log.status == SessionLog.START:
                for values in found.scalars.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.HasField("image"):
                    found.pictures[value.tag] = (event.step, value.image.encoded_image_string)
        found.seconds += max(times) - min(times) if times else 0.0
    found.scalars = {name: dict(sorted(values.items())) for name, values in found.scalars.items() if values}
    return found


def _events(file: Path) -> Iterator[Event]:
    with file.open("rb") as opened:
        while len(header := opened.read(12)) == 12:  # length and its checksum
            place = opened.tell() - 12
            if masked_crc32c(header[:8]) != struct.unpack("<I", header[8:])[0]:
                raise _damaged(file, place)
            data = opened.read(struct.unpack("<Q", header[:8])[0])
            footer = opened.read(4)
            if len(footer) < 4:
                return
            if len(data) <= MAX_CHECKED_BYTES and masked_crc32c(data) != struct.unpack("<I", footer)[0]:
                raise _damaged(file, place)
            try:
                yield Event.FromString(data)
            except DecodeError:
                raise _damaged(file, place) from None


def _damaged(file: Path, place: int) -> ValueError:
    return ValueError(
        f"{file} is damaged at byte {place:,} of {file.stat().st_size:,}: restore it from a copy, or move it out of "
        "the run's folder, and the curves that it holds will be missing."
    )
