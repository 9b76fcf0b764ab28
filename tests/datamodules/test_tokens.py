"""The cache of codes: what is written, what is read back, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from datamodules import MovingShapesDataModule, TokenDataModule
from datamodules.sampler import ClipRequest
from datamodules.tokens import CodeClips, read_codes, write_codes
from models.random import keyed_generator

ABOUT: dict[str, Any] = {"tokenizer_digest": "abc", "codebook_size": 1000, "num_frames": 16, "resolution": 32}


def shades(video: Tensor) -> Tensor:
    """A tokenizer for tests: the mean brightness of 4 x 8 x 8 pixels, in 1000 steps."""
    patches = video.mean(dim=1).unflatten(1, (-1, 4)).unflatten(3, (-1, 8)).unflatten(5, (-1, 8))
    return ((patches.mean(dim=(2, 4, 6)) + 1) * 499.5).round().long()  # [B, t, h, w]


def moving_shapes() -> MovingShapesDataModule:
    return MovingShapesDataModule(num_train=7, num_val=3, num_frames=16, resolution=32, batch_size=3, seed=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "codes"
    write_codes(folder, moving_shapes(), shades, ABOUT)
    return folder


@pytest.fixture
def data(cache: Path) -> TokenDataModule:
    module = TokenDataModule(str(cache), num_frames=16, resolution=32, batch_size=2, seed=5)
    module.setup("fit")
    return module


@pytest.mark.parametrize(("split", "count"), [("train", 7), ("val", 3)])
def test_every_clip_is_kept_once_in_order(cache: Path, split: str, count: int) -> None:
    """The last batch is smaller, the training set does not divide by the batch size: nothing is lost or repeated."""
    pixels = moving_shapes()
    pixels.setup("fit")
    tensors, about = read_codes(cache, split)
    clips = [pixels.datasets[split][ClipRequest(index)] for index in range(count)]
    assert torch.equal(tensors["codes"], shades(torch.stack([clip["video"] for clip in clips])))
    assert tensors["label"].tolist() == [clip["label"] for clip in clips]
    assert tensors["index"].tolist() == list(range(count))
    assert about == ABOUT


def test_nothing_but_the_two_splits_is_left_in_the_folder(cache: Path) -> None:
    assert sorted(path.name for path in cache.iterdir()) == ["train.safetensors", "val.safetensors"]


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**16, "U16"), (2**16 + 1, "I32")])
def test_codes_take_as_few_bytes_as_the_codebook_allows(tmp_path: Path, codebook_size: int, dtype: str) -> None:
    def largest(video: Tensor) -> Tensor:
        return torch.full((len(video), 1, 1, 1), codebook_size - 1)

    write_codes(tmp_path / "codes", moving_shapes(), largest, ABOUT | {"codebook_size": codebook_size})
    with safe_open(tmp_path / "codes/val.safetensors", "pt") as opened:
        assert opened.get_slice("codes").get_dtype() == dtype
    codes = read_codes(tmp_path / "codes", "val")[0]["codes"]
    assert codes.dtype == torch.int64
    assert codes.flatten().tolist() == [codebook_size - 1] * 3


def test_a_folder_that_exists_is_not_written_to(cache: Path) -> None:
    with pytest.raises(FileExistsError, match=r"codes exists already.*\(--out\)"):
        write_codes(cache, moving_shapes(), shades, ABOUT)


def test_a_cache_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    def fails_on_validation(video: Tensor) -> Tensor:
        if len(seen) == 3:  # batches of the training set
            raise RuntimeError("the power is gone")
        seen.append(1)
        return shades(video)

    seen: list[int] = []
    with pytest.raises(RuntimeError, match="power"):
        write_codes(tmp_path / "codes", moving_shapes(), fails_on_validation, ABOUT)
    data = TokenDataModule(str(tmp_path / "codes"), num_frames=16, resolution=32)
    with pytest.raises(FileNotFoundError, match=r"No codes at .*val.safetensors \(--data.root\).*longtake tokenize"):
        data.setup("fit")


@pytest.mark.parametrize(("start", "frames"), [(0, 4), (4, 8), (12, 4), (0, 16)])
def test_a_window_is_a_slice_of_the_codes(start: int, frames: int) -> None:
    codes = torch.randint(1000, (3, 4, 2, 2), generator=keyed_generator(0))
    clips = CodeClips({"codes": codes, "label": torch.tensor([4, 5, 6]), "index": torch.tensor([7, 8, 9])}, 4)
    # a margin is asked for, as it would be of pixels, and is not needed
    item = clips[ClipRequest(1, window_start=start, window_frames=frames, read_start=max(0, start - 8), read_frames=16)]
    assert torch.equal(item.pop("codes"), codes[1, start // 4 : (start + frames) // 4])
    assert item == {"label": 5, "index": 8, "window_start": start, "window_frames": frames, "margin_before": 0}


def test_without_a_curriculum_a_clip_is_all_of_its_codes() -> None:
    codes = torch.randint(1000, (3, 4, 2, 2), generator=keyed_generator(0))
    clips = CodeClips({"codes": codes, "label": torch.tensor([4, 5, 6]), "index": torch.tensor([7, 8, 9])}, 4)
    item = clips[ClipRequest(2)]
    assert item.keys() == {"codes", "label", "index"}
    assert torch.equal(item["codes"], codes[2])


def test_training_batches_are_those_of_the_pixels(cache: Path) -> None:
    """Cached codes and pixels give a prior the same clips in the same windows."""
    modules = (moving_shapes(), TokenDataModule(str(cache), num_frames=16, resolution=32, batch_size=3, seed=5))
    loaders = []
    for module in modules:
        module.set_curriculum(lambda step: (4, 12)[step % 2], 8, 4)
        module.setup("fit")
        loaders.append(module.train_dataloader())
    for pixels, cached in zip(*loaders, strict=True):
        assert torch.equal(pixels["index"], cached["index"])
        assert torch.equal(pixels["label"], cached["label"])
        assert pixels["window_start"] == cached["window_start"]
        assert pixels["window_frames"] == cached["window_frames"]
        first = pixels["margin_before"] // 4
        window = shades(pixels["video"])[:, first : first + pixels["window_frames"] // 4]
        assert torch.equal(window, cached["codes"])


def test_validation_keeps_whole_clips_under_a_curriculum(data: TokenDataModule) -> None:
    data.set_curriculum(lambda step: 4, 8, 4)
    batches = list(data.val_dataloader())
    assert [tuple(batch["codes"].shape) for batch in batches] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    assert "window_frames" not in batches[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 32}, r"holds codes for num_frames=16, not 32 \(--data.num_frames\)"),
        ({"resolution": 64}, r"holds codes for resolution=32, not 64 \(--data.resolution\)"),
    ],
)
def test_codes_of_other_clips_are_refused(cache: Path, changes: dict[str, int], message: str) -> None:
    data = TokenDataModule(str(cache), **({"num_frames": 16, "resolution": 32} | changes))
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_codes_of_another_tokenizer_are_refused(cache: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require_tokenizer("xyz")
    with pytest.raises(ValueError, match=r"made by tokenizer abc, the model uses xyz.*--model.tokenizer"):
        data.setup("validate")


def test_codes_of_the_models_tokenizer_are_taken(cache: Path) -> None:
    data = TokenDataModule(str(cache), num_frames=16, resolution=32)
    data.require_tokenizer("abc")
    data.setup("fit")
    assert len(data.datasets["train"]) == 7
