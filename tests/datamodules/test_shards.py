"""Shards on disk: whole or not there, read by number, and readable by the library that wrote them."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litdata import StreamingDataset

from datamodules.shards import FORMAT_VERSION, ShardPlan, ShardReader, begin, read_header

SIZES = [3, 0, 5, 1, 4, 2, 7]


def item(number: int) -> dict[str, Any]:
    """Arrays of any length, integers and bytes."""
    return {
        "grid": np.full((2, SIZES[number], 2), 1000 + number, np.uint16),
        "label": number - 2,
        "blob": np.arange(number, dtype=np.uint8),
        "name": f"video {number}".encode(),
    }


def write(folder: Path, num_items: int = 7, shard_items: int = 3) -> ShardPlan:
    plan = ShardPlan(folder, num_items, shard_items)
    for shard in plan.missing():
        plan.write(shard, [item(number) for number in plan.items(shard)])
    return plan


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    write(folder).close()
    return folder


def test_items_come_back_by_their_number_in_any_order(split: Path) -> None:
    reader = ShardReader(split)
    assert len(reader) == 7
    for number in (6, 0, 3, 2, 3, 5, 1, 4):
        leaves, expected = reader.leaves(number), item(number)
        assert leaves.keys() == expected.keys()
        grid = reader.array(leaves["grid"], "<u2")
        assert grid.shape == expected["grid"].shape
        assert np.array_equal(grid, expected["grid"])
        assert reader.integer(leaves["label"]) == number - 2
        assert leaves["blob"].tolist() == list(range(number))
        assert leaves["name"].tobytes() == expected["name"]


@pytest.mark.parametrize("number", [-1, 7])
def test_there_is_no_item_beyond_the_last(split: Path, number: int) -> None:
    with pytest.raises(IndexError, match=f"has 7 items, there is no number {number}"):
        ShardReader(split).leaves(number)


def test_a_reader_that_has_read_travels_to_workers_without_its_data(split: Path) -> None:
    reader = ShardReader(split)
    fresh = len(pickle.dumps(reader))
    reader.leaves(5)
    sent = pickle.dumps(reader)
    assert len(sent) == fresh
    assert pickle.loads(sent).leaves(5)["name"].tobytes() == b"video 5"


def test_the_library_streams_the_same_items(split: Path) -> None:
    streamed = list(StreamingDataset(str(split), shuffle=False))
    assert len(streamed) == 7
    for number, sample in enumerate(streamed):
        expected = item(number)
        assert sample.keys() == expected.keys()
        assert np.array_equal(sample["grid"], expected["grid"])
        assert sample["label"] == expected["label"]
        assert np.array_equal(sample["blob"], expected["blob"])
        assert sample["name"] == expected["name"]


def test_nothing_but_shards_and_their_index_is_left(split: Path) -> None:
    names = ["chunk-0-0.bin", "chunk-0-1.bin", "chunk-0-2.bin", "config.json", "index.json"]
    assert sorted(path.name for path in split.iterdir()) == names


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_the_shards_out(tmp_path: Path, world_size: int) -> None:
    plan = ShardPlan(tmp_path, 7, 2)
    shards = [plan.missing(rank, world_size) for rank in range(world_size)]
    assert sorted(shard for share in shards for shard in share) == [0, 1, 2, 3]
    assert [list(plan.items(shard)) for shard in range(4)] == [[0, 1], [2, 3], [4, 5], [6]]


def test_what_is_there_is_nobodys_share_and_moves_no_other(tmp_path: Path) -> None:
    plan = ShardPlan(tmp_path, 7, 1)
    before = plan.missing(1, 2)
    plan.write(0, [item(0)])
    plan.write(3, [item(3)])
    assert plan.missing(1, 2) == [shard for shard in before if shard != 3] == [1, 5]


def test_a_split_with_a_missing_shard_cannot_be_closed(tmp_path: Path) -> None:
    plan = write(tmp_path / "train")
    (tmp_path / "train/chunk-0-1.bin").unlink()
    with pytest.raises(RuntimeError, match=r"1 shards of .*train are missing, the first is 1"):
        plan.close()
    assert not (tmp_path / "train/index.json").exists()


def test_a_shard_removed_later_is_made_again(tmp_path: Path) -> None:
    """What the error about a damaged file tells to do."""
    write(tmp_path / "train").close()
    (tmp_path / "train/chunk-0-1.bin").unlink()
    (tmp_path / "train/index.json").unlink()
    write(tmp_path / "train").close()
    reader = ShardReader(tmp_path / "train")
    assert [reader.integer(reader.leaves(number)["label"]) for number in range(7)] == list(range(-2, 5))


def test_traces_of_a_killed_process_are_swept_up(tmp_path: Path) -> None:
    (tmp_path / "train/.shard-1").mkdir(parents=True)
    (tmp_path / "train/.shard-1/chunk-0-0.bin").write_bytes(b"half a sha")
    write(tmp_path / "train").close()
    assert [path.name for path in (tmp_path / "train").iterdir() if path.name.startswith(".")] == []


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Shard 0 of .* holds 3 items, got 2"):
        ShardPlan(tmp_path, 7, 3).write(0, [item(0), item(1)])


def test_a_shard_beyond_the_formats_limit_is_refused(tmp_path: Path) -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**16, 2**15), (0, 0))
    with pytest.raises(ValueError, match=r"would have 2.0 GiB, .* fewer than 1 items into one \(--shard_items\)"):
        ShardPlan(tmp_path, 1, 1).write(0, [{"grid": huge}])


HEADER = {"format_version": FORMAT_VERSION, "kind": "tokens", "shape": (4, 8), "seed": 3}


class TestHeader:
    def test_an_unfinished_cache_goes_on_with_the_same_settings_only(self, tmp_path: Path) -> None:
        begin(tmp_path / "cache", HEADER)
        begin(tmp_path / "cache", HEADER)
        with pytest.raises(ValueError, match=r"begun with other settings:\n  seed: 3 there, 4 now\nGive those"):
            begin(tmp_path / "cache", HEADER | {"seed": 4})
        assert json.loads((tmp_path / "cache/cache.json").read_text())["seed"] == 3

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(FileExistsError, match=r"exists already.*\(--out\)"):
            begin(tmp_path, HEADER)

    def test_an_empty_folder_will_do(self, tmp_path: Path) -> None:
        begin(tmp_path, HEADER)
        assert (tmp_path / "cache.json").is_file()

    @pytest.mark.parametrize(
        ("changes", "kind", "words"),
        [
            ({}, "frames", "holds tokens in format 1, but frames in format 1 are needed"),
            ({"format_version": 9}, "tokens", "holds tokens in format 9, but tokens in format 1"),
        ],
    )
    def test_another_kind_or_format_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], kind: str, words: str
    ) -> None:
        begin(tmp_path / "cache", HEADER | changes)
        with pytest.raises(ValueError, match=words):
            read_header(tmp_path / "cache", kind, "longtake tokenize")
