import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from datamodules.sampler import (
    ClipBatchSampler,
    ClipRequest,
    Curriculum,
    ResumableLoader,
    ValidationBatchSampler,
    collate_clips,
    make_item,
)
from datamodules.video import Split, VideoDataModule

GROWING = Curriculum(frames_at=lambda step: min(2 * step + 2, 16), margin_frames=3, frame_multiple=2)


class Requests(Dataset[dict[str, Any]]):
    """Shows which frames of which sample were asked for, as pixel values."""

    def __init__(self, size: int, num_frames: int = 16) -> None:
        self.size, self.num_frames = size, num_frames

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        frames = torch.arange(request.read_start, request.read_start + (request.read_frames or self.num_frames))
        video = frames.float().reshape(1, -1, 1, 1).expand(3, -1, 1, 1)
        return make_item(request, video, label=request.epoch)


def sampler_of(epoch: int = 0, size: int = 23, **options: Any) -> ClipBatchSampler:
    sampler = ClipBatchSampler(size, **{"batch_size": 4, "num_frames": 16, "seed": 5, **options})
    sampler.set_epoch(epoch)
    return sampler


def seen(batch: dict[str, Any]) -> tuple[Any, ...]:
    """All that identifies a batch."""
    window = tuple(batch.get(name) for name in ("window_start", "window_frames", "margin_before"))
    return batch["index"].tolist(), batch["label"].tolist(), batch["video"][0, 0, :, 0, 0].tolist(), window


def endless(loader: ResumableLoader) -> Iterator[tuple[Any, ...]]:
    """Batches of epoch after epoch, from the epoch that the loader is in."""
    epoch = loader.batch_sampler.epoch
    while True:
        loader.batch_sampler.set_epoch(epoch)
        yield from (seen(batch) for batch in loader)
        epoch += 1


def loader_of(workers: int = 0, size: int = 23, **options: Any) -> ResumableLoader:
    return ResumableLoader(
        Requests(size),
        sampler_of(size=size, curriculum=GROWING, **options),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_clips,
    )


@pytest.mark.parametrize("epoch", [0, 3])
def test_ranks_together_see_what_one_process_with_the_larger_batch_sees(epoch: int) -> None:
    alone = list(sampler_of(epoch, batch_size=6, curriculum=GROWING))
    ranks = [list(sampler_of(epoch, batch_size=2, rank=r, world_size=3, curriculum=GROWING)) for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)] == alone
    assert len({request.index for batch in alone for request in batch}) == 18  # 3 full batches, no sample twice


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = [
        tuple(r.index for b in sampler_of(epoch, seed=seed) for r in b) for epoch in range(3) for seed in range(3)
    ]
    assert len(set(orders)) == 9


def test_iterating_twice_gives_the_same_batches() -> None:
    sampler = sampler_of(epoch=1)
    assert list(sampler) == list(sampler)


def test_without_reshuffling_all_epochs_repeat_the_first() -> None:
    assert list(sampler_of(epoch=4, reshuffle=False)) == list(sampler_of(epoch=0))


def test_data_set_smaller_than_a_global_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"7 clips, fewer than one global batch of 8 = 4 clips x 2 processes"):
        sampler_of(size=7, world_size=2)


def test_requests_travel_to_workers() -> None:
    request = next(iter(sampler_of(curriculum=GROWING)))[0]
    assert pickle.loads(pickle.dumps(request)) == request


class TestCurriculum:
    @pytest.mark.parametrize("margin", [None, 0, 3])
    @pytest.mark.parametrize("multiple", [1, 4])
    def test_windows_and_margins_stay_inside_the_clip(self, margin: int | None, multiple: int) -> None:
        for step in range(50):
            window = Curriculum(lambda step: step % 17 + 4, margin, multiple).window(seed=1, step=step, num_frames=20)
            start, end = window["window_start"], window["window_start"] + window["window_frames"]
            read_start, read_end = window["read_start"], window["read_start"] + window["read_frames"]
            assert start % multiple == 0
            assert 0 <= start < end <= 20
            if margin is None:
                assert (read_start, read_end) == (0, 20)
            else:
                assert (read_start, read_end) == (max(0, start - margin), min(20, end + margin))

    def test_starts_are_uniform_over_all_that_fit(self) -> None:
        curriculum = Curriculum(lambda step: 8, 0, 4)
        starts = [curriculum.window(0, step, 20)["window_start"] for step in range(400)]
        assert {start: starts.count(start) // 60 for start in set(starts)} == {0: 1, 4: 1, 8: 1, 12: 1}  # 100 +- 20

    def test_a_length_that_no_clip_has_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"asks for 17 frames at step 3, but a clip has 16"):
            Curriculum(lambda step: 17, 0, 1).window(0, 3, 16)

    def test_impossible_settings_are_refused(self) -> None:
        with pytest.raises(ValueError, match="frame_multiple >= 1"):
            Curriculum(lambda step: 4, 0, 0)

    def test_all_batches_of_an_optimizer_step_share_the_window(self) -> None:
        curriculum = Curriculum(lambda step: step + 1, 0, 1)
        lengths = [
            batch[0].window_frames
            for epoch in range(2)
            for batch in sampler_of(epoch, accumulate_grad_batches=2, curriculum=curriculum)
        ]
        assert lengths == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]  # 5 batches an epoch: the last one steps alone

    def test_batch_tells_window_and_margin_as_plain_integers(self) -> None:
        for batch in loader_of():
            assert type(batch["window_start"]) is type(batch["window_frames"]) is type(batch["margin_before"]) is int
            frames = batch["video"][0, 0, :, 0, 0].tolist()
            window = frames[batch["margin_before"] : batch["margin_before"] + batch["window_frames"]]
            assert window == list(range(batch["window_start"], batch["window_start"] + batch["window_frames"]))

    def test_without_a_curriculum_batches_hold_whole_clips_and_no_window(self) -> None:
        batch = next(iter(ResumableLoader(Requests(23), sampler_of(), collate_fn=collate_clips)))
        assert set(batch) == {"video", "label", "index"}
        assert batch["video"].shape == (4, 3, 16, 1, 1)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64


class TestResuming:
    @pytest.mark.parametrize("batches", [0, 2, 5, 7, 10])  # an epoch has 5
    @pytest.mark.parametrize("workers", [0, 2])
    def test_goes_on_exactly_where_it_stopped(self, batches: int, workers: int) -> None:
        uninterrupted = endless(loader_of())
        expected = [next(uninterrupted) for _ in range(13)]
        first = loader_of(workers)
        stream = endless(first)
        before = [next(stream) for _ in range(batches)]
        state = first.state_dict()
        second = loader_of(workers)
        second.load_state_dict(state)
        stream = endless(second)
        assert before + [next(stream) for _ in range(13 - batches)] == expected

    def test_state_survives_until_the_first_batch(self) -> None:
        first, second = loader_of(), loader_of()
        next(iter(first))
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()

    def test_an_epoch_after_a_resumed_one_is_whole(self) -> None:
        loader = loader_of()
        loader.load_state_dict({**loader.state_dict(), "batch": 3})
        assert [len(list(loader)) for _ in range(2)] == [2, 5]

    def test_an_abandoned_epoch_leaves_no_trace(self) -> None:
        loader = loader_of(workers=1)
        expected = [seen(batch) for batch in loader]
        iterator = iter(loader)
        next(iterator)
        assert [seen(batch) for batch in loader] == expected

    def test_state_is_the_same_on_all_ranks_and_for_another_number_of_them(self) -> None:
        loaders = [loader_of(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
        for loader in loaders:
            next(iter(loader))
        states = [loader.state_dict() for loader in loaders]
        assert states[0] == states[1]
        alone, expected = loader_of(batch_size=4), loader_of(batch_size=4)
        alone.load_state_dict(states[0])
        assert [seen(batch) for batch in alone] == [seen(batch) for batch in expected][1:]

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 2, 2), (4, 1, 2)])
    def test_killed_twice_in_an_epoch_the_ledger_is_that_of_an_uninterrupted_run(
        self, ranks: tuple[int, ...], workers: int
    ) -> None:
        """Each time with its own number of ranks, which share a global batch of 4; workers have prefetched more."""
        uninterrupted = endless(loader_of())
        expected = [next(uninterrupted) for _ in range(8)]  # an epoch has 5
        ledger, state = [], None
        for world_size, batches in zip(ranks, (2, 1, 5), strict=True):
            loaders = [
                loader_of(workers, batch_size=4 // world_size, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            streams = [endless(loader) for loader in loaders]
            for _ in range(batches):
                indices, epochs, frames, windows = zip(*(next(stream) for stream in streams), strict=True)
                ledger.append(([i for rank in indices for i in rank], [e for r in epochs for e in r], frames, windows))
            (state,) = {tuple(loader.state_dict().items()) for loader in loaders}  # the same on all ranks
            state = dict(state)
        assert [entry[:2] for entry in ledger] == [entry[:2] for entry in expected]
        for (*_, frames, windows), (*_, frames_expected, window_expected) in zip(ledger, expected, strict=True):
            assert set(map(tuple, frames)) == {tuple(frames_expected)}
            assert set(windows) == {window_expected}
        assert len({index for entry in ledger[:5] for index in entry[0]}) == 20  # none lost, none twice

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"size": 24}, "clips in the training set: 23 in the checkpoint, 24 now"),
            ({"seed": 6}, r"seed of the data order \(--data.seed\): 5 in the checkpoint, 6 now"),
            (
                {"batch_size": 3},
                r"clips per global batch \(--data.batch_size x processes\): 4 in the checkpoint, 3 now",
            ),
        ],
    )
    def test_another_order_is_refused(self, changed: dict[str, int], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            loader_of(**changed).load_state_dict(loader_of().state_dict())


class TestValidation:
    @pytest.mark.parametrize("size", [1, 4, 5, 11, 12, 13])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_every_rank_has_as_many_batches_and_no_clip_is_missed(self, size: int, world_size: int) -> None:
        samplers = [ValidationBatchSampler(size, 2, rank, world_size) for rank in range(world_size)]
        ranks = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in ranks} == {len(samplers[0])}
        indices = [request.index for batches in ranks for batch in batches for request in batch]
        assert set(indices) == set(range(size))
        assert len(indices) - size < world_size

    def test_one_process_sees_the_clips_in_order(self) -> None:
        batches = [[request.index for request in batch] for batch in ValidationBatchSampler(5, 2)]
        assert batches == [[0, 1], [2, 3], [4]]


class Recorder(LightningModule):
    """Notes each batch and the optimizer step it is used in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.record: list[tuple[Any, ...]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.record.append((self.global_step, *seen(batch)))
        return self.weight**2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert "window_start" not in batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RequestsDataModule(VideoDataModule):
    def make_dataset(self, split: Split) -> Requests:
        return Requests(23 if split == "train" else 5)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., list[tuple[Any, ...]]]:
    def run(resume: str | None = None, workers: int = 0, **options: Any) -> list[tuple[Any, ...]]:
        module = Recorder()
        data = RequestsDataModule(num_frames=16, batch_size=4, num_workers=workers, seed=5)
        data.set_curriculum(lambda step: min(step + 1, 16), 0, 1)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1),
                ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1),
            ],
            use_distributed_sampler=False,
            **options,
        )
        trainer.fit(module, data, ckpt_path=resume and tmp_path / resume, weights_only=True)
        return module.record

    return run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
class TestUnderLightning:
    @pytest.mark.parametrize(
        "options", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3}, {"limit_train_batches": 0.5}]
    )
    def test_lengths_belong_to_the_trainers_own_optimizer_steps(
        self, fit: Callable[..., list[tuple[Any, ...]]], options: dict[str, Any]
    ) -> None:
        record = fit(max_epochs=3, **options)
        assert len(record) >= 6
        for global_step, *_, (_, window_frames, _) in record:
            assert window_frames == min(global_step + 1, 16)

    @pytest.mark.parametrize("stop", [3, 5, 7, 10])  # an epoch has 5 batches
    @pytest.mark.parametrize("options", [{}, {"val_check_interval": 1, "check_val_every_n_epoch": None}])
    def test_a_resumed_fit_sees_the_same_batches(
        self, fit: Callable[..., list[tuple[Any, ...]]], stop: int, options: dict[str, Any]
    ) -> None:
        before = fit(max_steps=stop, **options)
        after = fit(resume=f"step={stop}.ckpt", max_steps=13, **options)
        assert before + after == fit(max_steps=13, **options)

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_a_fit_resumed_at_an_epochs_end_sees_the_same_batches(
        self, fit: Callable[..., list[tuple[Any, ...]]], epochs: int
    ) -> None:
        before = fit(max_epochs=epochs)
        after = fit(resume=f"epoch={epochs - 1}.ckpt", max_epochs=4)
        assert before + after == fit(max_epochs=4)

    def test_a_fit_with_workers_resumes_in_mid_epoch(self, fit: Callable[..., list[tuple[Any, ...]]]) -> None:
        before = fit(max_steps=7, workers=2)
        after = fit(resume="step=7.ckpt", max_steps=9, workers=2)
        assert before + after == fit(max_steps=9)

    def test_overfitting_repeats_the_same_batches(self, fit: Callable[..., list[tuple[Any, ...]]]) -> None:
        record = fit(max_epochs=3, overfit_batches=2)
        indices = [tuple(index) for _, index, *_ in record]
        assert indices[:2] == indices[2:4] == indices[4:6]


class TestCollation:
    def test_optional_entries_become_tensors_and_lists(self) -> None:
        items = [
            make_item(
                ClipRequest(i), torch.zeros(3, 2, 4, 4), 7, text=f"clip {i}", is_image=i == 1, audio=torch.ones(1)
            )
            for i in range(2)
        ]
        batch = collate_clips(items)
        assert batch["text"] == ["clip 0", "clip 1"]
        assert torch.equal(batch["is_image"], torch.tensor([False, True]))
        assert batch["audio"].shape == (2, 1)
        assert (batch["label"].tolist(), batch["index"].tolist()) == ([7, 7], [0, 1])
        assert "window_start" not in batch

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_an_entry_of_some_clips_only_is_refused(self, order: tuple[int, int]) -> None:
        items = [
            make_item(ClipRequest(0), torch.zeros(3, 2, 4, 4), 0),
            make_item(ClipRequest(1), torch.zeros(3, 2, 4, 4), 0, text="a"),
        ]
        with pytest.raises(ValueError, match="Only some clips of the batch hold text"):
            collate_clips([items[i] for i in order])
