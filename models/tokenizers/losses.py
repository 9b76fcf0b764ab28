"""Losses of the tokenizers: adversarial, with the penalties that steady it, feature matching and perceptual.

TATS, with k(s) = 0 before the discriminators start and 1 from then on, f one random frame of each clip, D_i and D_v the
discriminators of frames and clips:

    L_AE = 4 |x - x'| + commitment + 4 LPIPS(f, f') + k(s) [-mean D_i(f') - mean D_v(x')] + 4 k(s) [FM_i + FM_v]
    L_D  = k(s) [hinge(D_i; f, f') + hinge(D_v; x, x')]

The paper writes the adversarial loss with logarithms; the released code trains with the hinge. MAGVIT, with one
discriminator of clips, P the squared distance of a ResNet's logits, and the means e of past logits:

    L_AE = |x - x'|^2 + quantizer + 0.1 P(x, x') + 0.1 mean softplus(-D(x'))
    L_D  = mean softplus(-D(x)) + mean softplus(D(x')) + 10 mean |dD(x)/dx|^2
           + 0.001 [relu(mean D(x) - e_fake)^2 + relu(e_real - mean D(x'))^2]

All of it is computed in the tokenizer's native range.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.blocks.distributed import sum_over_ranks, world_size

GANLoss = Literal["hinge", "vanilla", "non_saturating"]


def pick_frames(video: Tensor, frames: Tensor) -> Tensor:
    """Take frame `frames[b]` of each clip: `[B, C, T, H, W]` and `[B]` int64 to `[B, C, H, W]`."""
    return video[torch.arange(len(video), device=video.device), :, frames]


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator: 1 at zero logits."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def vanilla_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross-entropy of a discriminator (halved): log 2 at zero logits."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def non_saturating_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross-entropy of a discriminator: 2 log 2 at zero logits."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def adversarial_loss(fake_logits: Tensor, gan_loss: GANLoss) -> Tensor:
    """Loss of the generator: mean softplus(-D(x')) if `non_saturating`, else -mean D(x')."""
    return F.softplus(-fake_logits).mean() if gan_loss == "non_saturating" else -fake_logits.mean()


def r1_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """Mean over the batch of the squared gradient of each real's logits, summed over its elements.

    There is no factor 1/2 (MAGVIT's release). Each logit should depend on one real alone. Batch norm mixes them: then
    it is the gradient of the sum of all ranks' logits, the same as in one process with all batches.

    Args:
        logits: of `real`, which requires a gradient.
        real: `[B, ...]`.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., 2021), on mean logits as in MAGVIT's release.

    The means of past logits are state. They are those of steps before this one, over the batches of all ranks.

    Args:
        decay: Decay of the moving averages, from 0.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))
        self._seen: list[tuple[Tensor, Tensor]] = []  # of this step's batches

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """relu(mean D(x) - e_fake)^2 + relu(e_real - mean D(x'))^2."""
        real, fake = (sum_over_ranks(logits.mean()) / world_size() for logits in (real_logits, fake_logits))
        self._seen.append((real.detach(), fake.detach()))
        return F.relu(real - self.fake).square() + F.relu(self.real - fake).square()

    def update(self) -> None:
        """Move the averages, once a step, however many batches it has."""
        for average, means in zip((self.real, self.fake), zip(*self._seen, strict=True), strict=True):
            average.lerp_(torch.stack(means).mean().to(average.dtype), 1 - self.decay)
        self.forget()

    def forget(self) -> None:
        """Leave this step's batches out."""
        self._seen.clear()


def feature_matching_loss(fake_maps: list[Tensor], real_maps: list[Tensor]) -> Tensor:
    """Sum over a discriminator's hidden maps of the mean |fake - sg(real)|."""
    if not fake_maps:
        raise ValueError("This discriminator shows no hidden maps to match: set --model.feature_matching_weight=0.")
    distances = [F.l1_loss(fake, real.detach()) for fake, real in zip(fake_maps, real_maps, strict=True)]
    return torch.stack(distances).sum()


def generator_terms(
    discriminator: nn.Module, real: Tensor, fake: Tensor, gan_loss: GANLoss = "hinge", match_features: bool = True
) -> tuple[Tensor, Tensor]:
    """What a discriminator tells the generator.

    Args:
        discriminator: of frames or of clips; gives logits and a list of hidden maps.
        real: pixels in the native range.
        fake: their reconstruction.
        gan_loss: see `adversarial_loss`.
        match_features: whether to compute the second term; the first does without `real`.

    Returns:
        The adversarial and the feature matching loss.
    """
    logits, fake_maps = discriminator(fake)
    gan = adversarial_loss(_full_precision(logits), gan_loss)
    if not match_features:
        return gan, torch.zeros_like(gan)
    with torch.no_grad():
        _, real_maps = discriminator(real)
    return gan, feature_matching_loss(fake_maps, real_maps)


def discriminator_terms(
    discriminator: nn.Module, real: Tensor, fake: Tensor, gan_loss: GANLoss, with_r1: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How a discriminator does on pixels and their reconstruction; no gradient reaches either.

    Args:
        discriminator: of frames or of clips; gives logits and a list of hidden maps.
        real: pixels in the native range.
        fake: their reconstruction.
        gan_loss: which loss.
        with_r1: compute the penalty; the pass over `real` is in float32 then.

    Returns:
        Its loss, its R1 penalty (0 without), its logits of `real` and of `fake`.
    """
    real = real.detach()
    if with_r1:
        with torch.autocast(real.device.type, enabled=False):
            real = _full_precision(real).requires_grad_()
            real_logits, _ = discriminator(real)
            penalty = r1_penalty(real_logits, real)
    else:
        real_logits, _ = discriminator(real)
        penalty = real.new_zeros(())
    fake_logits, _ = discriminator(fake.detach())
    real_logits, fake_logits = _full_precision(real_logits), _full_precision(fake_logits)
    loss = {"hinge": hinge_loss, "vanilla": vanilla_loss, "non_saturating": non_saturating_loss}[gan_loss]
    return loss(real_logits, fake_logits), penalty, real_logits, fake_logits


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
