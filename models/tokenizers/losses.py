"""Losses of TATS' tokenizer: adversarial, feature matching and perceptual.

With k(s) = 0 before the discriminators start and 1 from then on, f one random frame of each clip, D_i and D_v the
discriminators of frames and clips:

    L_AE = 4 |x - x'| + commitment + 4 LPIPS(f, f') + k(s) [-mean D_i(f') - mean D_v(x')] + 4 k(s) [FM_i + FM_v]
    L_D  = k(s) [hinge(D_i; f, f') + hinge(D_v; x, x')]

The paper writes the adversarial loss with logarithms; the released code trains with the hinge. All of it is computed in
the tokenizer's native range.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.tokenizers.discriminators import PatchDiscriminator

GANLoss = Literal["hinge", "vanilla"]


def pick_frames(video: Tensor, frames: Tensor) -> Tensor:
    """Take frame `frames[b]` of each clip: `[B, C, T, H, W]` and `[B]` int64 to `[B, C, H, W]`."""
    return video[torch.arange(len(video), device=video.device), :, frames]


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator: 1 at zero logits."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def vanilla_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross-entropy of a discriminator (halved): log 2 at zero logits."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def feature_matching_loss(fake_maps: list[Tensor], real_maps: list[Tensor]) -> Tensor:
    """Sum over a discriminator's hidden maps of the mean |fake - sg(real)|."""
    distances = [F.l1_loss(fake, real.detach()) for fake, real in zip(fake_maps, real_maps, strict=True)]
    return torch.stack(distances).sum()


def generator_terms(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """What a discriminator tells the generator.

    Args:
        discriminator: of frames or of clips.
        real: pixels in the native range.
        fake: their reconstruction.

    Returns:
        -mean D(fake), for both kinds of adversarial loss, and the feature matching loss.
    """
    logits, fake_maps = discriminator(fake)
    with torch.no_grad():
        _, real_maps = discriminator(real)
    return -_full_precision(logits).mean(), feature_matching_loss(fake_maps, real_maps)


def discriminator_loss(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor, gan_loss: GANLoss) -> Tensor:
    """Loss of a discriminator on pixels and their reconstruction; no gradient reaches either."""
    real_logits, _ = discriminator(real.detach())
    fake_logits, _ = discriminator(fake.detach())
    loss = {"hinge": hinge_loss, "vanilla": vanilla_loss}[gan_loss]
    return loss(_full_precision(real_logits), _full_precision(fake_logits))


class LPIPS(nn.Module):
    """Perceptual distance of two images: weighted squared differences of VGG16's features (Zhang et al., 2018).

    Frozen and always in evaluation. TATS feeds it images in the native range [-0.5, 0.5], although its shift and scale
    are made for [-1, 1]; so does this. (In the release, dropout was on during training as well. Not here.)
    """

    shift: Tensor
    scale: Tensor

    _STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    _FILES = ("vgg16-397923af", "vgg")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        layers: list[nn.Module] = []
        channels = 3
        self._taps = []  # after which layers the features are compared: relu1_2, 2_2, 3_3, 4_3, 5_3
        for stage in self._STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self._taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # torchvision's numbering
        self.heads = nn.ParameterList(torch.zeros(1, stage[-1], 1, 1) for stage in self._STAGES)
        self.requires_grad_(False).eval()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LPIPS":
        """Read torchvision's VGG16 and LPIPS' heads.

        Args:
            folder: holds `vgg16-397923af` and `vgg` (version 0.1), each as `.pth` or `.safetensors`.

        Raises:
            FileNotFoundError: if one of them is missing; says where both are found.
            ValueError: if one of them holds something else.
        """
        vgg, heads = (_read(Path(folder), stem) for stem in cls._FILES)
        lpips = cls()
        state = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
        state |= {f"heads.{i}": heads[name] for i in range(5) if (name := f"lin{i}.model.1.weight") in heads}
        try:
            lpips.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder} does not hold the weights of LPIPS with VGG16: {error}") from error
        return lpips

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of images `[B, 3, H, W]`, at least 16 x 16 pixels each: a scalar."""
        features = torch.cat([x, y])
        features = (features - self.shift) / self.scale
        distance = features.new_zeros(())
        for i, layer in enumerate(self.features):
            features = layer(features)
            if i in self._taps:
                a, b = F.normalize(features, dim=1, eps=1e-10).chunk(2)
                distance = distance + ((a - b).square() * self.heads[self._taps.index(i)]).sum(1).mean()
        return distance

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation."""
        return super().train(False)


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _read(folder: Path, stem: str) -> dict[str, Tensor]:
    if (path := folder / f"{stem}.safetensors").exists():
        return load_file(path)
    if (path := folder / f"{stem}.pth").exists():
        return torch.load(path, map_location="cpu", weights_only=True)
    raise FileNotFoundError(
        f"No {path} for the perceptual loss. It reads two files:\n"
        "  https://download.pytorch.org/models/vgg16-397923af.pth\n"
        "  https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
    )
