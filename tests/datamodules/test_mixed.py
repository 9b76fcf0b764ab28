from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.frame_cache import FrameWriter
from datamodules.mixed import MixedClips, MixedDataModule
from datamodules.sampler import ClipRequest, ResumableLoader, make_item
from datamodules.shapes import MovingShapesDataModule


def mixed(
    num_videos: int = 12, num_images: int = 40, part_options: dict[str, Any] | None = None, **options: Any
) -> MixedDataModule:
    """Moving shapes and still ones; all sizes are small."""
    options = {"num_frames": 5, "resolution": 32, "images_per_stack": 2, "batch_size": 4, "seed": 3, **options}
    shared = {"resolution": 32, **(part_options or {})}
    return MixedDataModule(
        MovingShapesDataModule(num_videos, 3, num_frames=5, **shared),
        MovingShapesDataModule(num_images, 3, num_frames=1, stills=True, **shared),
        **options,
    )


def loader_of(data: MixedDataModule, epoch: int = 0, rank: int = 0, world_size: int = 1) -> ResumableLoader:
    data.setup("fit")
    loader = data.train_dataloader()
    sampler = loader.batch_sampler
    sampler.rank, sampler.world_size = rank, world_size
    sampler.set_epoch(epoch)
    return loader


class Numbers(Dataset[dict[str, Any]]):
    """Clips that are the number of their sample, and the epoch that it was asked for as label."""

    def __init__(self, size: int, num_frames: int) -> None:
        self.size, self.num_frames = size, num_frames

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        return make_item(request, torch.full((3, self.num_frames, 1, 1), float(request.index)), request.epoch)


def images_of_epochs(num_images: int, epochs: int) -> list[tuple[int, int]]:
    """Number and pass of all images, in the order in which 12 stacks of 2 an epoch show them."""
    dataset = MixedClips(Numbers(12, 5), Numbers(num_images, 1), 2, num_frames=5, image_ratio=0.5, seed=3)
    stacks = [
        dataset[ClipRequest(index, epoch)] for epoch in range(epochs) for index in dataset.order(epoch) if index >= 12
    ]
    return [
        (int(number), image_pass)
        for item in stacks
        for number, image_pass in zip(item["video"][0, :2, 0, 0], item["frame_label"].tolist(), strict=True)
    ]


class TestRows:
    def test_each_batch_holds_the_share_of_images(self) -> None:
        for ratio, expected in ((0.25, 1), (0.5, 2), (0.75, 3)):
            batches = list(loader_of(mixed(image_ratio=ratio)))
            assert [batch["is_image"].sum().item() for batch in batches] == [expected] * len(batches)
            assert batches[0]["is_image"].dtype == torch.bool

    @pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.6, 0.9])
    def test_an_epoch_has_all_videos_once_and_its_share_of_stacks(self, ratio: float) -> None:
        data = mixed(num_videos=20, image_ratio=ratio)
        data.setup()
        dataset: Any = data.datasets["train"]
        order = dataset.order(2)
        assert sorted(index for index in order if index < 20) == list(range(20))
        stacks = [index for index in order if index >= 20]
        assert stacks == list(range(20, len(dataset)))
        assert len(stacks) / len(order) == pytest.approx(ratio, abs=1 / len(order))

    def test_a_stack_holds_images_then_black_and_a_video_holds_itself(self) -> None:
        data = mixed()
        batch = next(iter(loader_of(data)))
        videos, images = (data.videos.make_dataset("train"), data.images.make_dataset("train"))
        for row in range(4):
            video = batch["video"][row]
            if batch["is_image"][row]:
                assert torch.all(video[:, 2:] == -1)
                labels = batch["frame_label"][row].tolist()
                found = [
                    [i for i in range(40) if torch.equal(images.render(i)[:, 0], video[:, frame])] for frame in range(2)
                ]
                assert [images[ClipRequest(i)]["label"] for (i,) in found] == labels
                assert batch["label"][row] == labels[0]
                assert batch["index"][row] >= 12
            else:
                assert torch.equal(video, videos.render(int(batch["index"][row])))
                assert batch["frame_label"][row].tolist() == [batch["label"][row]] * 2
        assert batch["video"].shape == (4, 3, 5, 32, 32)
        assert batch["frame_label"].dtype == torch.int64

    def test_each_image_of_a_stack_has_its_own_caption(self) -> None:
        data = mixed(part_options={"captions": True})
        batch = next(iter(loader_of(data)))
        for row in range(4):
            texts = batch["frame_text"][row]
            assert len(texts) == 2
            assert batch["text"][row] == texts[0]
            assert ("moves" in texts[0], "moves" in texts[1]) == (not batch["is_image"][row],) * 2
            if not batch["is_image"][row]:
                assert texts[0] == texts[1]
        assert any(texts[0] != texts[1] for texts in batch["frame_text"])

    def test_low_resolution_copies_are_stacked_too(self) -> None:
        batch = next(iter(loader_of(mixed(part_options={"low_res_factor": 4}))))
        pooled = torch.nn.functional.avg_pool3d(batch["video"], (1, 4, 4))
        assert torch.allclose(batch["low_res"], pooled, atol=1e-6)

    def test_captions_on_one_side_only_are_refused(self) -> None:
        data = MixedDataModule(
            MovingShapesDataModule(12, 3, num_frames=5, resolution=32, captions=True),
            MovingShapesDataModule(12, 3, num_frames=1, resolution=32, stills=True),
            num_frames=5, resolution=32, images_per_stack=2, batch_size=4,
        )  # fmt: skip
        with pytest.raises(ValueError, match="Only some clips of the batch hold frame_text, text"):
            next(iter(loader_of(data)))

    def test_validation_and_ordered_clips_are_videos_alone(self) -> None:
        data = mixed()
        data.setup()
        for split, size in (("val", 3), ("train", 12)):
            batches = list(data.ordered_dataloader(split))  # type: ignore[arg-type]
            assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(size))
            assert not torch.cat([batch["is_image"] for batch in batches]).any()
            assert batches[0]["frame_label"].shape == (len(batches[0]["index"]), 2)


class TestOrder:
    def test_all_images_come_before_one_comes_again_over_epochs(self) -> None:
        seen = images_of_epochs(num_images=40, epochs=5)
        passes = [seen[start : start + 40] for start in range(0, 120, 40)]
        assert len(seen) == 120
        assert all(sorted(images) == [(i, number) for i in range(40)] for number, images in enumerate(passes))
        assert len({tuple(i for i, _ in images) for images in passes}) == 3

    def test_few_images_come_again_within_an_epoch_under_another_key(self) -> None:
        seen = images_of_epochs(num_images=5, epochs=1)
        assert len(seen) == len(set(seen)) == 24
        counts = torch.tensor([i for i, _ in seen]).bincount()
        assert sorted(counts.tolist()) == [4, 5, 5, 5, 5]

    def test_ranks_together_see_what_one_process_sees(self) -> None:
        alone = list(loader_of(mixed(batch_size=4), epoch=2))
        ranks = [list(loader_of(mixed(batch_size=2), 2, rank, 2)) for rank in range(2)]
        assert len(alone) == len(ranks[0]) == 6
        for whole, *parts in zip(alone, *ranks, strict=True):
            for key in ("video", "index", "is_image", "frame_label"):
                assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])

    def test_seeds_and_epochs_have_orders_of_their_own(self) -> None:
        orders = {
            tuple(MixedClips(Numbers(12, 5), Numbers(9, 1), 2, 5, 0.5, seed).order(epoch))
            for seed in range(3)
            for epoch in range(3)
        }
        assert len(orders) == 9

    @pytest.mark.parametrize("part", ["videos", "images"])
    def test_the_seed_reaches_both_parts(self, part: str) -> None:
        first, second = (getattr(mixed(seed=seed), part).make_dataset("train").render(0) for seed in (0, 1))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_resuming_in_mid_epoch_sees_the_same_rows(self, workers: int) -> None:
        whole = [batch["video"] for batch in loader_of(mixed(), epoch=1)]
        first = loader_of(mixed(), epoch=1)
        batches = iter(first)
        for _ in range(2):
            next(batches)
        resumed = loader_of(mixed(num_workers=workers))
        resumed.load_state_dict(first.state_dict())
        rest = [batch["video"] for batch in resumed]
        assert len(rest) == len(whole) - 2
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))

    def test_another_share_cannot_be_resumed(self) -> None:
        state = loader_of(mixed()).state_dict()
        with pytest.raises(ValueError, match="cannot be resumed"):
            loader_of(mixed(image_ratio=0.25)).load_state_dict(state)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_frames": 9}, r"videos have num_frames=5, expected 9 .*--data.videos.init_args.num_frames"),
            ({"resolution": 64}, r"videos have resolution=32, expected 64"),
            ({"image_ratio": 0.0}, r"image_ratio=0.0.*--data.image_ratio"),
            ({"image_ratio": 1.0}, r"image_ratio=1.0"),
            ({"images_per_stack": 6}, r"images_per_stack=6: .*from 1 to num_frames=5"),
        ],
    )
    def test_values_that_do_not_agree_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mixed(**options)

    def test_videos_are_no_images(self) -> None:
        videos = MovingShapesDataModule(8, 2, num_frames=5, resolution=32)
        with pytest.raises(ValueError, match=r"images have num_frames=5, expected 1"):
            MixedDataModule(videos, videos, num_frames=5, resolution=32)

    def test_a_model_that_knows_no_images_is_refused(self) -> None:
        class Model:
            accepts_images = False

        model = Model()
        with pytest.raises(ValueError, match=r"Model, as it is set up, .*black frames.*--model.joint_images=true"):
            mixed().require_model(model)
        model.accepts_images = True
        mixed().require_model(model)

    def test_images_are_not_cached_as_videos(self, tmp_path: Path) -> None:
        data = mixed()
        data.setup("fit")
        with pytest.raises(ValueError, match="MixedDataModule cannot be cached"):
            FrameWriter(tmp_path / "frames", data)

    def test_a_curriculum_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a curriculum needs the videos alone"):
            mixed().set_curriculum(lambda step: 5, None, 1)


def test_hyper_parameters_are_plain(tmp_path: Path) -> None:
    data = mixed()
    torch.save(dict(data.hparams), tmp_path / "hparams")
    saved = torch.load(tmp_path / "hparams", weights_only=True)
    assert saved["images"]["class_path"] == "datamodules.shapes.MovingShapesDataModule"
    assert saved["images"]["init_args"]["stills"] is True
    assert (saved["images_per_stack"], saved["seed"]) == (2, 3)
