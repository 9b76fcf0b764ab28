"""Codes computed once: a frozen tokenizer's output for every clip of a data module, and the data module that reads it.

A cache is a folder with one safetensors file a split. Each holds `codes` `[n, t, h, w]` (uint16, or int32 for codebooks
beyond 65,536), `label` and `index` `[n]`, and says in its header what made it: the tokenizer's hash and the geometry.
The curriculum's windows are cut from the codes of whole clips, so no margin is needed.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.sampler import ClipRequest
from datamodules.video import Split, VideoDataModule


def write_codes(folder: Path, data: VideoDataModule, encode: Callable[[Tensor], Tensor], about: dict[str, Any]) -> None:
    """Tokenize every clip of both splits; a split's file appears when it is complete.

    Clips are those of epoch 0, without a curriculum: whole, one for each sample.

    Args:
        folder: Where to write `train.safetensors` and `val.safetensors`.
        data: Gives the clips.
        encode: Video `[B, 3, T, H, W]` to codes `[B, t, h, w]`.
        about: What made the codes: `tokenizer_digest`, `codebook_size`, `num_frames`, `resolution`.

    Raises:
        FileExistsError: If the folder holds a cache already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already. Remove it, or choose another destination (--out).")
    folder.mkdir(parents=True)
    dtype = torch.uint16 if about["codebook_size"] <= 2**16 else torch.int32
    data.setup("fit")
    for split in ("train", "val"):
        batches = data.ordered_dataloader(split)
        parts = [
            (encode(batch["video"]).to("cpu", dtype), batch["label"], batch["index"])
            for batch in track(batches, description=f"Tokenizing {split}", total=len(batches))
        ]
        codes, label, index = (torch.cat(column) for column in zip(*parts, strict=True))
        scratch = folder / f".{split}.part"
        save_file({"codes": codes, "label": label, "index": index}, scratch, {"about": json.dumps(about)})
        os.replace(scratch, folder / f"{split}.safetensors")


def read_codes(folder: Path, split: Split) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a split of a cache.

    Returns:
        `codes` int64 `[n, t, h, w]` with `label` and `index` `[n]`, and what made them.

    Raises:
        FileNotFoundError: If there is none.
    """
    file = folder / f"{split}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"No codes at {file} (--data.root). Make them: longtake tokenize --config <experiment> --out {folder}"
        )
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
        about = json.loads(opened.metadata()["about"])
    tensors["codes"] = tensors["codes"].long()
    return tensors, about


class CodeClips(Dataset[dict[str, Any]]):
    """The clips of one split of a cache, in memory.

    Args:
        tensors: As `read_codes` returns them.
        frames_per_latent: Pixel frames that a latent frame stands for.
    """

    def __init__(self, tensors: dict[str, Tensor], frames_per_latent: int) -> None:
        self.tensors = tensors
        self.frames_per_latent = frames_per_latent

    def __len__(self) -> int:
        return len(self.tensors["codes"])

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        """Return `codes` `[t', h, w]` of the clip, or of the window asked for, with label and index."""
        codes = self.tensors["codes"][request.index]
        item = {
            "label": int(self.tensors["label"][request.index]),
            "index": int(self.tensors["index"][request.index]),
        }
        if request.window_frames is None:
            return item | {"codes": codes}
        start = request.window_start // self.frames_per_latent
        window = codes[start : start + request.window_frames // self.frames_per_latent]
        return item | {
            "codes": window,
            "window_start": request.window_start,
            "window_frames": request.window_frames,
            "margin_before": 0,
        }


class TokenDataModule(VideoDataModule):
    """Cached codes instead of pixels: `longtake tokenize` makes them, any prior trains from them.

    Args:
        root: Folder of the cache.
        num_frames: Pixel frames of a clip; must be what was tokenized.
        resolution: Height and width of the video; must be what was tokenized.
        batch_size: Training clips per batch and process.
        val_batch_size: Validation clips per batch and process, `batch_size` by default.
        num_workers: Worker processes; the codes lie in memory, so 0 is best.
        seed: Key of the data order.

    Raises:
        ValueError: If the cache was made for other clips or with another tokenizer.
    """

    def __init__(
        self,
        root: str,
        num_frames: int = 16,
        resolution: int = 128,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_frames=num_frames,
            resolution=resolution,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)
        self.root = Path(root)
        self.tokenizer_digest: str | None = None

    def require_tokenizer(self, digest: str) -> None:
        """Say which tokenizer the model decodes with: codes of another one are refused."""
        self.tokenizer_digest = digest

    def make_dataset(self, split: Split) -> CodeClips:
        """Read the codes of a split."""
        tensors, about = read_codes(self.root, split)
        for name, value in (("num_frames", self.num_frames), ("resolution", self.resolution)):
            if about[name] != value:
                raise ValueError(f"{self.root} holds codes for {name}={about[name]}, not {value} (--data.{name}).")
        if self.tokenizer_digest not in (None, about["tokenizer_digest"]):
            raise ValueError(
                f"{self.root} was made by tokenizer {about['tokenizer_digest'][:12]}, the model uses "
                f"{str(self.tokenizer_digest)[:12]}. Tokenize again, or give that tokenizer (--model.tokenizer)."
            )
        return CodeClips(tensors, self.num_frames // tensors["codes"].shape[1])
