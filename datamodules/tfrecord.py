"""TFRecord files without TensorFlow: their framing and checksums, and as much protobuf as `tf.train.Example` needs.

A file is a run of records, all numbers little-endian: uint64 length, masked CRC32C of those 8 bytes, payload, masked
CRC32C of the payload. There is no table of contents, so the files are walked through once; after that a record is read
by its place.

CRC32C is linear over GF(2). If Z is what four zero bytes do to the register, the words w_1 ... w_n leave it at
Z^n(w_1) ^ ... ^ Z(w_n). Instead of word by word, the sum is taken half by half (the first half, advanced by the length
of the second, joins the second), with a table of Z^(2^k) for each k: a few large array operations for each record.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.decoding import TruncatedVideoError, UnreadableVideoError, require_regular_file

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_ROW_LEVEL = 14  # rows of 2^14 words are 64 KiB: a row and the tables stay in the cache


def _prefix() -> int:
    """The word that takes the register from 0 to 2^32 - 1, where CRC32C begins: found by running backwards."""
    register = 0xFFFFFFFF
    for _ in range(32):
        carried = register >> 31  # the bit that the polynomial left behind
        register = ((register ^ carried * _POLYNOMIAL) << 1 | carried) & 0xFFFFFFFF
    return register


_PREFIX = np.frombuffer(struct.pack("<I", _prefix()), np.uint8)


@cache
def _tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the low and of the high half of a register when 2^level zero words follow: two of `[65536]`."""
    images: np.ndarray = np.uint32(1) << np.arange(32, dtype=np.uint32)  # of each single bit
    if level == 0:
        for _ in range(32):
            images = images >> 1 ^ (images & 1) * np.uint32(_POLYNOMIAL)
    else:
        images = _advance(_advance(images, level - 1), level - 1)
    low, high = np.zeros(65536, np.uint32), np.zeros(65536, np.uint32)
    for table, halves in ((low, images[:16]), (high, images[16:])):
        for bit, image in enumerate(halves):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ image
    return low, high


def _advance(registers: np.ndarray, level: int) -> np.ndarray:
    low, high = _tables(level)
    halves = registers.view(np.uint16)
    return low.take(halves[::2]) ^ high.take(halves[1::2])


def crc32c(data: bytes | memoryview) -> int:
    """Return the CRC32C (Castagnoli) of some bytes; `123456789` gives 0xE3069283."""
    num_words = -(-len(data) // 4) + 1
    level = min(_ROW_LEVEL, (num_words - 1).bit_length())
    rows = np.zeros((-(-num_words // 2**level), 2**level), np.uint32)
    raw = rows.view(np.uint8).reshape(-1)
    raw[len(raw) - len(data) :] = np.frombuffer(data, np.uint8)  # zeros before the first word change nothing
    raw[len(raw) - len(data) - 4 : len(raw) - len(data)] = _PREFIX
    registers = rows[0]
    for row in rows[1:]:
        registers = _advance(registers, level) ^ row
    for half in reversed(range(level)):
        registers = _advance(registers[: 2**half], half) ^ registers[2**half :]
    return int(_advance(registers, 0)[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """Where a record lies.

    Args:
        path: its file.
        number: its place among the records of the file, from 0.
        offset: of its first byte (the length, not the payload) in the file.
        length: bytes of its payload.
    """

    path: Path
    number: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.path}, record {self.number} at byte {self.offset}"

    def read(self, verify: bool = False) -> bytes:
        """Return the payload.

        Args:
            verify: whether to compare it with its checksum.

        Raises:
            UnreadableVideoError: if the file ends before it does, or it differs from its checksum.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + 12)
                payload, checksum = file.read(self.length), file.read(4)
        except OSError as error:
            raise UnreadableVideoError(f"{self}: {error}") from error
        if len(checksum) < 4:
            raise UnreadableVideoError(f"{self}: the file ends inside of it.")
        if verify and struct.unpack("<I", checksum)[0] != masked_crc32c(payload):
            raise UnreadableVideoError(f"{self}: the payload does not match its checksum.")
        return payload


def find_records(path: Path, verify: bool) -> tuple[list[Record], list[UnreadableVideoError]]:
    """Walk through a file.

    Args:
        path: the file.
        verify: whether to compare the payloads with their checksums. Lengths are always compared.

    Returns:
        The sound records, and why the others are not. Nothing can be found behind a wrong length or a cut.

    Raises:
        UnreadableVideoError: if it is no file, such as a pipe.
        OSError: if it cannot be read.
    """
    records: list[Record] = []
    reasons: list[UnreadableVideoError] = []
    require_regular_file(path)
    size, offset, number = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(12)
            length, checksum = struct.unpack("<QI", header.ljust(12, b"\0"))
            record = Record(path, number, offset, length)
            if len(header) == 12 and checksum != masked_crc32c(header[:8]):
                reasons.append(
                    UnreadableVideoError(
                        f"{record}: the length does not match its checksum; the rest of the file is lost."
                    )
                )
                break
            if len(header) < 12 or offset + 12 + length + 4 > size:
                reasons.append(TruncatedVideoError(f"{record}: the file ends inside of it."))
                break
            try:
                if verify:
                    record.read(verify=True)
                records.append(record)
            except UnreadableVideoError as error:
                reasons.append(error)
            offset, number = offset + 12 + length + 4, number + 1
    return records, reasons


def parse_example(payload: bytes) -> dict[str, list[memoryview] | np.ndarray]:
    """Read a serialized `tf.train.Example`; the context of a `SequenceExample` has the same form.

    Returns:
        The features by name: a list of byte strings (views of the payload), or an array, float32 or int64.

    Raises:
        ValueError: if the bytes are no such message.
    """
    features: dict[str, list[memoryview] | np.ndarray] = {}
    try:
        for entry in _lengths_delimited(memoryview(payload), 1, 1):  # Example.features, Features.feature
            fields = dict(_fields(entry))  # of a map's entry: 1 is the key, 2 the value
            features[bytes(fields[1]).decode()] = _values(fields.get(2, memoryview(b"")))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"no tf.train.Example: {error}") from error
    return features


def _values(feature: memoryview) -> list[memoryview] | np.ndarray:
    for kind, values in _fields(feature):
        if kind == 1:  # BytesList
            return list(_lengths_delimited(values, 1))
        if kind == 2:  # FloatList: one packed field, or many of one float each
            return np.frombuffer(b"".join(value for _, value in _fields(values)), "<f4")
        if kind == 3:  # Int64List: likewise
            numbers: list[int] = []
            for _, value in _fields(values):
                numbers += [value] if isinstance(value, int) else _varints(value)
            return np.array(numbers, np.uint64).view(np.int64)
    return []


def _lengths_delimited(data: memoryview, *path: int) -> Iterator[memoryview]:
    """Yield the messages or strings that field numbers lead to."""
    for number, value in _fields(data):
        if number == path[0]:
            if len(path) == 1:
                yield value
            else:
                yield from _lengths_delimited(value, *path[1:])


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a message: their numbers, with an int for a varint and the bytes of all else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | memoryview
        if tag & 7 == 0:
            value, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 2:
                size, at = _varint(data, at)
            if size is None or at + size > len(data):
                raise ValueError(f"no tf.train.Example: field {tag >> 3} of wire type {tag & 7} does not fit.")
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _varints(data: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a place, and where it ends."""
    number = shift = 0
    while (byte := data[at]) > 127:
        if shift == 63:
            raise ValueError("no tf.train.Example: a number has more than 64 bits.")
        number |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
    return (number | byte << shift) & 2**64 - 1, at + 1


def encode_example(features: Mapping[str, bytes | Sequence[float]]) -> bytes:
    """Write features as a serialized `tf.train.Example`: byte strings, and lists of float32."""
    entries = []
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        else:
            feature = _field(2, _field(1, np.asarray(value, "<f4").tobytes()))
        entries.append(_field(1, _field(1, key.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def write_records(path: Path, payloads: Iterable[bytes]) -> None:
    """Write a TFRecord file."""
    with path.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(payload + struct.pack("<I", masked_crc32c(payload)))
