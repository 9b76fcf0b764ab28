"""I3D (Carreira and Zisserman, 2017), Inception-v1 inflated to 3D: the detector of Frechet video distance.

The published distance uses the 400 logits of Kinetics-400, averaged over time, before the softmax. Three pipelines are
in use (`PROFILES`); their networks differ in the epsilon of batch norm alone, so that one module serves all. Two sets
of RGB weights fit the module: those trained on Kinetics from scratch, which the distance is defined by, and those that
began from ImageNet, which give another metric. Files are told apart by their digests.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.metrics.detectors import Detector, DetectorCard, Preprocessing
from models.metrics.files import KnownFile, cut_prefix, fit, identify, read_tensors, vouch
from models.random import keyed_generator

Triple = tuple[int, int, int]

NUM_CLASSES = 400

# channels of a block: branch 0 | branch 1: 1x1x1, 3x3x3 | branch 2: 1x1x1, 3x3x3 | branch 3
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, kernel_size: Triple, stride: Triple) -> Tensor:
    """Pad `[B, C, T, H, W]` with zeros as TensorFlow's SAME does: `ceil(size / stride)` outputs, the odd one behind."""
    pads: list[int] = []
    for size, kernel, step in zip(reversed(x.shape[2:]), reversed(kernel_size), reversed(stride), strict=True):
        total = max((-(-size // step) - 1) * step + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """SAME convolution without bias, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Triple, stride: Triple = (1, 1, 1), eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel_size, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, T, H, W]` to `[B, out_channels, ceil(T / s_t), ceil(H / s_h), ceil(W / s_w)]`."""
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel_size, self.stride))))


class MaxPool(nn.Module):
    """SAME max pooling. It pads with zeros, which are harmless behind a ReLU."""

    def __init__(self, kernel_size: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, T, H, W]` to `[B, C, ceil(T / s_t), ceil(H / s_h), ceil(W / s_w)]`."""
        return F.max_pool3d(pad_same(x, self.kernel_size, self.stride), self.kernel_size, self.stride)


class Mixed(nn.Module):
    """Inception block of four branches."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], eps: float) -> None:
        super().__init__()
        c0, c1, c2, c3, c4, c5 = channels
        one, three = (1, 1, 1), (3, 3, 3)
        self.b0 = Unit(in_channels, c0, one, eps=eps)
        self.b1a, self.b1b = Unit(in_channels, c1, one, eps=eps), Unit(c1, c2, three, eps=eps)
        self.b2a, self.b2b = Unit(in_channels, c3, one, eps=eps), Unit(c3, c4, three, eps=eps)
        self.pool, self.b3b = MaxPool(three, one), Unit(in_channels, c5, one, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, T, H, W]` to the channels of the four branches, one behind the other."""
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x))], dim=1)


class Logits(nn.Module):
    """Convolution of one voxel with a bias, under the name that the released files give it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 1024, T, 1, 1]` to `[B, 400, T, 1, 1]`."""
        return self.conv3d(x)


class I3D(nn.Module):
    """Inception-I3D for RGB, in evaluation only: its dropout is left out.

    Names of modules are those of the PyTorch files in circulation. 12,697,264 parameters.

    Args:
        eps: Of batch norm: 1e-3 in TensorFlow, 1e-5 in the port that VideoGPT, TATS and MeBT use.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, (7, 7, 7), (2, 2, 2), eps)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, (1, 1, 1), eps=eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, (3, 3, 3), eps=eps)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, widths in MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, Mixed(channels, widths, eps))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Logits()
        self.eval()

    def logits_over_time(self, video: Tensor) -> Tensor:
        """Map video `[B, 3, T, H, W]` in [-1, 1] to logits `[B, 400, ceil(T / 8) - 1]`.

        The last pooling spans two steps and the whole plane: 7 x 7 at the 224 x 224 that the weights are for.
        """
        x = video
        for name, layer in self.named_children():
            if name == "logits":
                x = F.avg_pool3d(x, (2, *x.shape[3:]), stride=1)
            x = layer(x)
        return x.flatten(2)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean logits over time `[B, 400]`, as features and as logits."""
        logits = self.logits_over_time(video).mean(dim=2)
        return logits, logits


@dataclass(frozen=True)
class Profile:
    """A pipeline around the network.

    Args:
        preprocessing: From video to input.
        eps: Of batch norm.
        ddof: Of the covariance.
        suffix: What distinguishes its numbers from those of the reference.
    """

    preprocessing: Preprocessing
    eps: float
    ddof: int
    suffix: str


PROFILES = {
    # DeepMind's and Google's TensorFlow release; MAGVIT, W.A.L.T
    "tf": Profile(Preprocessing(224, "legacy", min_frames=9), 1e-3, 1, ""),
    # the port of VideoGPT; TATS, MeBT, DIGAN
    "videogpt": Profile(Preprocessing(224, "half_pixel", quantise="floor", min_frames=9), 1e-5, 1, "_videogpt"),
    # StyleGAN-V's TorchScript
    "stylegan_v": Profile(
        Preprocessing(224, "half_pixel", crop=True, quantise="round", min_frames=9), 1e-3, 0, "_stylegan_v"
    ),
}

_FROM_IMAGENET = (
    "its weights began from ImageNet, which makes another metric than FVD, although they load without an error."
)
KNOWN = {
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2": KnownFile(
        "i3d_torchscript.pt", profile="stylegan_v"
    ),
    "a867b87ac3a9097d200598b1d48a1b890d8ec744": KnownFile("i3d_pretrained_400.pt", profile="videogpt"),
    "fa7df95674dbf3579e7fccd954e51e706b4734c1": KnownFile("deepmind/i3d-kinetics-400", profile="tf"),
    "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a": KnownFile("rgb_imagenet.pt of pytorch-i3d", _FROM_IMAGENET),
    "2a7c22e23e6c74f50a0166ce61110bccd2ab48bb": KnownFile("model_rgb.pth of kinetics_i3d_pytorch", _FROM_IMAGENET),
}
WHERE = (
    "FVD takes one of:\n"
    "  i3d_torchscript.pt, 51,235,320 bytes, sha256 bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2 "
    "(StyleGAN-V; Hugging Face flateon/FVD-I3D-torchscript, Dropbox s/ge9e5ujwgetktms);\n"
    "  i3d_pretrained_400.pt, about 49 MB, git blob a867b87ac3a9097d200598b1d48a1b890d8ec744 "
    "(in the repositories SongweiGe/TATS and Ugness/MeBT);\n"
    "  the 230 variables of deepmind/i3d-kinetics-400 as .npz or .safetensors.\n"
    "Without any of them the detector random_i3d works; its numbers are no FVD."
)


def load_i3d(path: str | Path, profile: str | None = None, sha256: str | None = None) -> Detector:
    """Load the detector of Frechet video distance.

    Args:
        path: A TorchScript archive, a PyTorch state dict, or DeepMind's variables as .npz or .safetensors.
        profile: `tf`, `videogpt` or `stylegan_v`; None for the one that the file was published with, `tf` for files
            that nobody has published.
        sha256: The file's digest: accepts exactly this file where none was published. Also loads weights that began
            from ImageNet, whose numbers are then named after the detector `i3d_imagenet`.

    Raises:
        FileNotFoundError: If there is no such file; says what it is and where it is found.
        ValueError: If it is another file, has no known digest, or does not fit.
    """
    path = Path(path)
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"There is no profile {profile!r} of I3D; expected one of {', '.join(PROFILES)}.")
    found, known = identify(path, KNOWN, sha256, WHERE)
    if known is None and sha256 is None and path.suffix not in (".npz", ".safetensors"):
        raise vouch(path, found)
    state = read_tensors(path)
    if known is None:
        known = KNOWN.get(shard_id(state)) if _is_tensorflow(state) else None
        if known is None and sha256 is None:
            raise vouch(path, found)
    pipeline = PROFILES[profile or (known and known.profile) or "tf"]
    name = f"i3d{pipeline.suffix or '_tf'}"
    published = {
        "frechet": f"fvd{pipeline.suffix}",
        "reconstruction_frechet": f"rfvd{pipeline.suffix}",
        "kernel": f"kvd{pipeline.suffix}",
    }
    if known is not None and known.refused:
        name, published = "i3d_imagenet", {}
    with torch.device("meta"):
        network = I3D(pipeline.eps)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if tensor.ndim}
    state = fit(to_module_names(state), shapes, path)
    counters = {key: torch.tensor(0) for key in network.state_dict().keys() - state.keys()}
    network.load_state_dict(state | counters, assign=True)
    card = DetectorCard(name, found.sha256, NUM_CLASSES, NUM_CLASSES, pipeline.preprocessing, pipeline.ddof, published)
    return Detector(network, card)


def random_i3d(seed: int = 0) -> Detector:
    """Make a detector of random weights: works offline, says little about quality, and is no FVD.

    The network is I3D in full width. So that a CPU can run it, clips are seen at 64 x 64 (antialiased when they are
    larger), a twelfth of the pixels that the real one sees. Weights are normal with variance `2 / fan_in` and never
    change for one seed.
    """
    with torch.device("meta"):
        network = I3D()
    network.to_empty(device="cpu")
    generator = keyed_generator(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            gain = 1.0 if module.bias is not None else 2.0
            std = (gain / module.weight[0].numel()) ** 0.5
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * std
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm3d):
            module.reset_parameters()  # constants
    preprocessing = Preprocessing(64, "half_pixel", antialias=True, min_frames=9)
    card = DetectorCard("random_i3d", f"random, seed {seed}", NUM_CLASSES, NUM_CLASSES, preprocessing)
    return Detector(network, card)


def layouts() -> Iterator[tuple[str, str, str]]:
    """Yield each unit's name in our module, in TensorFlow and in kinetics_i3d_pytorch (and its TorchScript)."""
    for stem in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"):
        yield stem, stem, stem.lower()
    for block in MIXED:
        lower = block.lower()
        last = "0a" if block == "Mixed_5b" else "0b"  # a slip of the release that all its files share
        yield f"{block}.b0", f"{block}/Branch_0/Conv3d_0a_1x1", f"{lower}.branch_0"
        yield f"{block}.b1a", f"{block}/Branch_1/Conv3d_0a_1x1", f"{lower}.branch_1.0"
        yield f"{block}.b1b", f"{block}/Branch_1/Conv3d_0b_3x3", f"{lower}.branch_1.1"
        yield f"{block}.b2a", f"{block}/Branch_2/Conv3d_0a_1x1", f"{lower}.branch_2.0"
        yield f"{block}.b2b", f"{block}/Branch_2/Conv3d_{last}_3x3", f"{lower}.branch_2.1"
        yield f"{block}.b3b", f"{block}/Branch_3/Conv3d_0b_1x1", f"{lower}.branch_3.1"
    yield "logits", "Logits/Conv3d_0c_1x1", "conv3d_0c_1x1"


_NORM = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def to_module_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a file's tensors to the names and shapes of `I3D`, whichever of the three layouts they have.

    A tensor that has no place keeps its name, for the caller to complain about.
    """
    names: dict[str, str] = {}
    if _is_tensorflow(state):
        for ours, theirs, _ in layouts():
            names |= {f"{theirs}/conv_3d/w": f"{ours}.conv3d.weight", f"{theirs}/conv_3d/b": f"{ours}.conv3d.bias"}
            names |= {f"{theirs}/batch_norm/{tf}": f"{ours}.bn.{torch_}" for torch_, tf in _NORM.items()}
        names |= {name.replace("5b/Branch_2/Conv3d_0a_3", "5b/Branch_2/Conv3d_0b_3"): names[name] for name in names}
        state = {names.get(name, name): tensor for name, tensor in cut_prefix(state, _TF_STEM).items()}
        biases = {key: tensor for key, tensor in state.items() if key.endswith("bn.bias")}
        scales = {key.replace("bias", "weight"): torch.ones(bias.numel()) for key, bias in biases.items()}
        # kernels are T H W in out; statistics are 1 1 1 1 C
        return scales | {
            key: tensor.permute(4, 3, 0, 1, 2) if key.endswith("conv3d.weight") else tensor.reshape(-1)
            for key, tensor in state.items()
        }
    if any(name.endswith(_LOWER_STEM) for name in state):
        for ours, _, theirs in layouts():
            names |= {f"{theirs}.conv3d.{kind}": f"{ours}.conv3d.{kind}" for kind in ("weight", "bias")}
            names |= {f"{theirs}.batch3d.{kind}": f"{ours}.bn.{kind}" for kind in ("weight", *_NORM)}
        return {names.get(name, name): tensor for name, tensor in cut_prefix(state, _LOWER_STEM).items()}
    return dict(state)


_TF_STEM, _LOWER_STEM = "Conv3d_1a_7x7/conv_3d/w", "conv3d_1a_7x7.conv3d.weight"


def _is_tensorflow(state: dict[str, Tensor]) -> bool:
    return any(name.removesuffix(":0").endswith(_TF_STEM) for name in state)


def shard_id(state: dict[str, Tensor]) -> str:
    """Git blob id of the variables written one behind the other, sorted by name: the data shard of their checkpoint.

    TensorFlow's shard holds nothing else: 12,704,544 float32 values are its 50,818,176 bytes. So variables that were
    copied to another container are still recognised.
    """
    values = [tensor.float().contiguous().numpy().tobytes() for _, tensor in sorted(state.items())]
    digest = hashlib.sha1(f"blob {sum(map(len, values))}\0".encode(), usedforsecurity=False)
    for value in values:
        digest.update(value)
    return digest.hexdigest()
