"""A continuous causal tokenizer without training: what tests of W.A.L.T use where a real one would be slow."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from models.random import keyed_generator
from models.tokenizers import Encoded


class LinearTokenizer(nn.Module):
    """The mean colours of blocks of 8 x 8 pixels, four frames a latent frame, and a latent frame for the first one.

    1 + 4k frames have 1 + k latent frames of 12 channels, mixed by a rotation. Videos that are constant in each block
    come back as they were.
    """

    downsample = (4, 8, 8)
    codebook_size = None

    def __init__(self) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(12, 12, generator=keyed_generator(12)))[0]
        self.rotation = nn.Parameter(rotation, requires_grad=False)

    def encode(self, video: Tensor) -> Encoded:
        self.latent_shape(*video.shape[2:])
        frames = F.avg_pool3d(video, (1, 8, 8))
        frames = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], dim=2)
        groups = rearrange(frames, "b c (t four) h w -> b t h w (four c)", four=4) @ self.rotation
        return Encoded(groups.movedim(-1, 1), None, {}, {})  # type: ignore[arg-type] # no codes

    def decode(self, latents: Tensor) -> Tensor:
        groups = latents.movedim(1, -1) @ self.rotation.T
        frames = rearrange(groups, "b t h w (four c) -> b c (t four) h w", four=4)[:, :, 3:]
        return repeat(frames, "b c t h w -> b c t (h y) (w x)", y=8, x=8).clamp(-1, 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        if not self.valid_frames(frames):
            raise ValueError(f"{frames} frames are not 1 + 4k")
        return 1 + frames // 4, height // 8, width // 8

    def valid_frames(self, frames: int) -> bool:
        return frames % 4 == 1

    def context_frames(self) -> None:
        return None


@pytest.fixture
def continuous_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path at which generators find the tokenizer of this file; other paths hold what they hold."""
    from lightning_modules import generator, walt

    path = tmp_path / "continuous"
    path.mkdir()
    load: Callable[[Path], nn.Module] = generator.load_tokenizer
    for module in (generator, walt):
        monkeypatch.setattr(
            module, "load_tokenizer", lambda asked: LinearTokenizer().eval() if asked == path else load(asked)
        )
    return path
