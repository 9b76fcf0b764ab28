"""Framing, checksums and messages of TFRecord files, against published values and Google's own packages."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as tensorboard_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from datamodules import index
from datamodules.decoding import UnreadableVideoError
from datamodules.index import Level, index_entries
from datamodules.tfrecord import (
    Record,
    crc32c,
    encode_example,
    find_records,
    masked_crc32c,
    parse_example,
    write_records,
)

PAYLOADS = [b"first", b"", bytes(range(256)) * 40, b"last"]


def example_class() -> Any:
    """`tf.train.Example`, declared here once more, for Google's implementation of protocol buffers."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, kind in (
        ("BytesList", kinds.TYPE_BYTES),
        ("FloatList", kinds.TYPE_FLOAT),
        ("Int64List", kinds.TYPE_INT64),
    ):
        file.message_type.add(name=name).field.add(name="value", number=1, label=kinds.LABEL_REPEATED, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), start=1):
        feature.field.add(
            name=name.lower(), number=number, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE,
            type_name=f".t.{name}", oneof_index=0,
        )  # fmt: skip
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
    entry.field.add(name="value", number=2, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE, type_name=".t.Feature")
    features.field.add(
        name="feature", number=1, label=kinds.LABEL_REPEATED, type=kinds.TYPE_MESSAGE,
        type_name=".t.Features.FeatureEntry",
    )  # fmt: skip
    file.message_type.add(name="Example").field.add(
        name="features", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE, type_name=".t.Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    write_records(tmp_path / "a.tfrecords", PAYLOADS)
    return tmp_path / "a.tfrecords"


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


class TestChecksum:
    def test_of_the_standard_text_is_the_published_one(self) -> None:
        assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
        assert crc32c(b"\xff" * 32) == 0x62A8AB43
        assert crc32c(b"") == 0

    def test_masked_of_the_length_three_is_the_published_one(self) -> None:
        assert masked_crc32c(struct.pack("<Q", 3)) == 0x0E4999B0

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 63, 64, 65, 4093, 65532, 65533, 131075])
    def test_equals_the_bytewise_one_at_every_length(self, length: int) -> None:
        data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
        assert crc32c(data) == tensorboard_crc32c(data)


class TestFraming:
    def test_files_are_those_of_tensorboard_byte_for_byte(self, records_file: Path, tmp_path: Path) -> None:
        with (tmp_path / "b").open("wb") as file:
            writer = RecordWriter(file)
            for payload in PAYLOADS:
                writer.write(payload)
            writer.flush()
            assert (tmp_path / "b").read_bytes() == records_file.read_bytes()

    @pytest.mark.parametrize("verify", [False, True])
    def test_every_record_is_found_at_its_place(self, records_file: Path, verify: bool) -> None:
        records, reasons = find_records(records_file, verify)
        assert [record.read(verify=True) for record in reversed(records)] == PAYLOADS[::-1]
        assert [record.number for record in records] == [0, 1, 2, 3]
        assert reasons == []

    def test_a_changed_payload_is_left_out_and_named_with_its_place(self, records_file: Path) -> None:
        flip_bit(records_file, 21 + 16 + 12 + 100)  # inside of record 2
        records, reasons = find_records(records_file, verify=True)
        assert [record.read() for record in records] == [PAYLOADS[0], PAYLOADS[1], PAYLOADS[3]]
        assert [record.number for record in records] == [0, 1, 3]
        assert list(map(str, reasons)) == [
            f"{records_file}, record 2 at byte 37: the payload does not match its checksum."
        ]

    def test_unverified_records_are_compared_when_they_are_read(self, records_file: Path) -> None:
        flip_bit(records_file, 13)
        record = find_records(records_file, verify=False)[0][0]
        assert record.read() != PAYLOADS[0]
        with pytest.raises(UnreadableVideoError, match=r"a\.tfrecords, record 0 at byte 0: the payload does not match"):
            record.read(verify=True)

    @pytest.mark.parametrize("verify", [False, True])
    def test_a_changed_length_ends_the_file(self, records_file: Path, verify: bool) -> None:
        flip_bit(records_file, 37)
        records, reasons = find_records(records_file, verify)
        assert len(records) == 2
        assert len(reasons) == 1
        assert str(reasons[0]).startswith(
            f"{records_file}, record 2 at byte 37: the length does not match its checksum;"
        )

    @pytest.mark.parametrize("cut", [1, 5, 10, 19])  # the last record takes 20 bytes
    def test_a_cut_end_is_named(self, records_file: Path, cut: int) -> None:
        records_file.write_bytes(records_file.read_bytes()[:-cut])
        records, reasons = find_records(records_file, verify=False)
        assert len(records) == 3
        assert len(reasons) == 1
        assert "record 3 at byte" in str(reasons[0])
        assert "the file ends inside of it" in str(reasons[0])

    def test_a_file_that_shrank_after_it_was_indexed_is_named(self, records_file: Path) -> None:
        last = find_records(records_file, verify=False)[0][-1]
        records_file.write_bytes(records_file.read_bytes()[:-5])
        with pytest.raises(UnreadableVideoError, match=r"record 3 at byte .*: the file ends inside of it"):
            last.read()


class TestIndex:
    def walks(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
        seen: list[tuple[str, bool]] = []

        def counted(path: Path, verify: bool) -> tuple[list[Record], list[UnreadableVideoError]]:
            seen.append((path.name, verify))
            return find_records(path, verify)

        monkeypatch.setattr(index, "find_records", counted)
        return seen

    def test_files_are_walked_through_once_and_again_when_they_change(
        self, records_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root, seen = records_file.parent, self.walks(monkeypatch)
        first = index_entries([records_file], root)
        assert index_entries([records_file], root) == first
        assert [Record(records_file, *place).read() for place in first[records_file].records] == PAYLOADS
        assert seen == [("a.tfrecords", True)]
        write_records(records_file, PAYLOADS[:1])
        entry = index_entries([records_file], root)[records_file]
        assert [Record(records_file, *place).read() for place in entry.records] == PAYLOADS[:1]
        assert len(seen) == 2

    def test_an_index_without_checksums_does_not_serve_who_wants_them(
        self, records_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flip_bit(records_file, 21 + 16 + 12 + 100)  # inside of record 2
        seen = self.walks(monkeypatch)
        levels: tuple[Level, ...] = ("quick", "full", "quick")
        found = [index_entries([records_file], records_file.parent, level=level)[records_file] for level in levels]
        assert seen == [("a.tfrecords", False), ("a.tfrecords", True)]
        assert [entry.num_videos for entry in found] == [4, 3, 3]
        assert [bool(entry.digest) for entry in found] == [False, True, True]
        assert "record 2 at byte 37: the payload does not match its checksum" in found[1].error

    def test_a_cut_file_is_truncated_and_keeps_its_whole_records(self, records_file: Path) -> None:
        records_file.write_bytes(records_file.read_bytes()[:-5])
        entry = index_entries([records_file], records_file.parent)[records_file]
        assert (entry.num_videos, entry.is_truncated) == (3, True)

    def test_a_pipe_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.tfrecords")
        entry = index_entries([tmp_path / "a.tfrecords"], tmp_path)[tmp_path / "a.tfrecords"]
        assert (entry.records, entry.is_truncated) == ((), False)
        assert "is a pipe" in entry.error


class TestExample:
    def test_what_google_writes_is_read(self) -> None:
        message = example_class()()
        feature = message.features.feature
        feature["b"].byteslist.value.extend([b"one", b"", bytes(300)])
        feature["f"].floatlist.value.extend([0.5, -2.0, 1e30])
        feature["i"].int64list.value.extend([0, 1, 300, -1, -(2**63), 2**63 - 1])
        feature["none"].SetInParent()
        parsed = parse_example(message.SerializeToString())
        assert parsed.keys() == {"b", "f", "i", "none"}
        assert [bytes(value) for value in parsed["b"]] == [b"one", b"", bytes(300)]
        np.testing.assert_array_equal(parsed["f"], np.array([0.5, -2.0, 1e30], np.float32))
        np.testing.assert_array_equal(parsed["i"], [0, 1, 300, -1, -(2**63), 2**63 - 1])
        assert len(parsed["none"]) == 0

    def test_what_is_written_google_reads(self) -> None:
        payload = encode_example({"0/image": bytes(12288), "0/action": [0.25, -1.0]})
        feature = example_class().FromString(payload).features.feature
        assert list(feature["0/image"].byteslist.value) == [bytes(12288)]
        assert list(feature["0/action"].floatlist.value) == [0.25, -1.0]

    def test_unpacked_numbers_are_read(self) -> None:
        floats = b"".join(b"\x0d" + struct.pack("<f", value) for value in (1.5, -3.0))  # field 1, wire type 5
        ints = b"\x08\x07" + b"\x08\xff" + b"\xff" * 8 + b"\x01"  # field 1, wire type 0: 7, -1
        for number, content, expected in ((2, floats, [1.5, -3.0]), (3, ints, [7, -1])):
            feature = bytes([number << 3 | 2, len(content)]) + content
            entry = b"\x0a\x01k" + bytes([0x12, len(feature)]) + feature
            features = bytes([0x0A, len(entry)]) + entry
            parsed = parse_example(bytes([0x0A, len(features)]) + features)
            np.testing.assert_array_equal(parsed["k"], expected)

    def test_fields_that_are_not_known_are_passed_over(self) -> None:
        payload = encode_example({"a": b"1"}) + b"\x10\x05" + b"\x19" + bytes(8) + b"\x25" + bytes(4) + b"\x32\x01x"
        assert [bytes(value) for value in parse_example(payload)["a"]] == [b"1"]

    @pytest.mark.parametrize(
        "payload",
        [
            encode_example({"a": b"12345"})[:-2],
            b"\x0a",
            b"\x0a\xff" * 9,
            b"\xff" * 12,
            b"\x0b\x00",
            b"\x08\x01\x0a\x02\x08\x01",
        ],
    )
    def test_other_bytes_are_refused(self, payload: bytes) -> None:
        with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
            parse_example(payload)
