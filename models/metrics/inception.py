"""Inception-v3 as the Frechet inception distance has it: the graph of December 2015, ported to PyTorch.

It differs from the network of that name in image libraries: 1,008 classes, average pooling that does not count its
padding, and a max pooling in the last block. The preprocessing is that of the TensorFlow graph, which ADM's evaluator
(and so W.A.L.T on ImageNet) runs: legacy bilinear to 299 x 299, then `(x - 128) / 128` for x from 0 to 255.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.metrics.detectors import Detector, DetectorCard, Preprocessing
from models.metrics.files import KnownFile, fit, identify, read_tensors, vouch

NUM_FEATURES, NUM_CLASSES = 2048, 1008


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, out_channels, H, W]`, fewer pixels without padding or with a stride."""
        return F.relu(self.bn(self.conv(x)))


def _row(in_channels: int, out_channels: int, size: int) -> BasicConv2d:
    return BasicConv2d(in_channels, out_channels, (1, size), padding=(0, size // 2))


def _column(in_channels: int, out_channels: int, size: int) -> BasicConv2d:
    return BasicConv2d(in_channels, out_channels, (size, 1), padding=(size // 2, 0))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, pooled."""

    def __init__(self, in_channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = BasicConv2d(in_channels, 48, 1), BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches of `[B, C, H, W]`."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(288, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches of `[B, C, H, W]`."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17 x 17 with kernels of seven, one axis at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(768, 192, 1)
        self.branch7x7_1 = BasicConv2d(768, width, 1)
        self.branch7x7_2 = _row(width, width, 7)
        self.branch7x7_3 = _column(width, 192, 7)
        self.branch7x7dbl_1 = BasicConv2d(768, width, 1)
        self.branch7x7dbl_2 = _column(width, width, 7)
        self.branch7x7dbl_3 = _row(width, width, 7)
        self.branch7x7dbl_4 = _column(width, width, 7)
        self.branch7x7dbl_5 = _row(width, 192, 7)
        self.branch_pool = BasicConv2d(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches of `[B, C, H, W]`."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = BasicConv2d(768, 192, 1), BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches of `[B, C, H, W]`."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8 x 8; the last of the two pools by maximum, a peculiarity of the graph."""

    def __init__(self, in_channels: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _row(384, 384, 3), _column(384, 384, 3)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _row(384, 384, 3), _column(384, 384, 3)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches of `[B, C, H, W]`."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """The network of FID, in evaluation only. Names of modules are those of the released file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(width) for width in (128, 160, 160, 192))
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.eval()

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Map one-frame videos `[B, 3, 1, 299, 299]` in [-1, 1] to pooled features `[B, 2048]` and logits `[B, 1008]`.

        The logits go without the bias of the last layer, as in every inception score since the first.
        """
        x = ((video.squeeze(2) + 1) * 127.5 - 128) / 128
        for name, block in self.named_children():
            if name == "fc":
                break
            x = block(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)


SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE = (
    "FID and the inception score of images take pt_inception-2015-12-05-6726825d.pth, 95,628,359 bytes, "
    f"sha256 {SHA256} (release fid_weights of mseitzer/pytorch-fid; torch-fidelity calls it weights-inception-...)."
)


def load_inception(path: str | Path, sha256: str | None = None) -> Detector:
    """Load the detector of images.

    Args:
        path: The released state dict.
        sha256: The file's digest, to accept exactly this file although it is another.

    Raises:
        FileNotFoundError: If there is no such file; says what it is and where it is found.
        ValueError: If it is another file, or does not fit.
    """
    path = Path(path)
    found, known = identify(path, {SHA256: KnownFile(path.name)}, sha256, WHERE)
    if known is None and sha256 is None:
        raise vouch(path, found)
    with torch.device("meta"):
        network = InceptionV3()
    own = network.state_dict()
    state = fit(read_tensors(path), {key: tuple(value.shape) for key, value in own.items() if value.ndim}, path)
    network.load_state_dict(state | {key: torch.tensor(0) for key in own.keys() - state.keys()}, assign=True)
    card = DetectorCard(
        "inception_v3",
        found.sha256,
        NUM_FEATURES,
        NUM_CLASSES,
        Preprocessing(299, "legacy", max_frames=1),
        published={"frechet": "fid", "inception_score": "image_inception_score"},
    )
    return Detector(network, card)
