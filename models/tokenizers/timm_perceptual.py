"""A perceptual loss from any image classifier of timm, as MAGVIT takes one from a ResNet-50."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class TimmPerceptual(nn.Module):
    """Mean squared difference of two images' ImageNet logits (MAGVIT's release).

    The images are resized to the classifier's size and fed in the tokenizer's native range as they are, without
    ImageNet's mean and deviation: so did the release, with [0, 1]. Frozen and always in evaluation.

    Args:
        network: Name of a timm model, such as `resnet50`.
        weights: Its weights as timm publishes them, `.safetensors` or `.pth`.
        size: Height and width of what the classifier sees.

    Raises:
        FileNotFoundError: if there are no weights. Random ones would be no perceptual loss.
        ValueError: if timm knows no such model, or the weights are those of another.
    """

    def __init__(self, network: str, weights: str | Path, size: int = 224) -> None:
        super().__init__()
        if not timm.is_model(network):
            raise ValueError(
                f"timm has no model {network!r} (--model.perceptual_network): expected lpips, or its name."
            )
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"No file {path} with the weights of timm's {network} for the perceptual loss.")
        self.size = size
        self.classifier = timm.create_model(network, pretrained=False)
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        try:
            self.classifier.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the weights of timm's {network}: {error}") from error
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of images `[B, 3, H, W]`: a scalar."""
        images = F.interpolate(torch.cat([x, y]), (self.size, self.size), mode="bilinear", align_corners=False)
        logits = self.classifier(images).float()  # [2 B, classes]
        return F.mse_loss(*logits.chunk(2))

    def train(self, mode: bool = True) -> "TimmPerceptual":
        """Stay in evaluation."""
        return super().train(False)
