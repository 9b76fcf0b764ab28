"""C3D (Tran et al., 2015) finetuned on UCF-101: the classifier of the inception score of videos.

The weights are those of TGANv2, which all later papers use: 11 layers under the names conv1a ... fc8, and the mean
volume of the training clips in a file of its own.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.metrics.detectors import Detector, DetectorCard, Preprocessing
from models.metrics.files import fit, identify, read_tensors, vouch

CONVS = {
    "conv1a": (3, 64),
    "conv2a": (64, 128),
    "conv3a": (128, 256),
    "conv3b": (256, 256),
    "conv4a": (256, 512),
    "conv4b": (512, 512),
    "conv5a": (512, 512),
    "conv5b": (512, 512),
}
NUM_CLASSES = 101


class C3D(nn.Module):
    """Eight convolutions, three linear layers; 16 frames of 112 x 112. 78,409,573 parameters.

    Dropout is left out: the network is for evaluation.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, (in_channels, out_channels) in CONVS.items():
            self.add_module(name, nn.Conv3d(in_channels, out_channels, 3, padding=1))
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, NUM_CLASSES)
        self.register_buffer("mean", torch.zeros(3, 16, 112, 112))  # BGR, 0 ... 255

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[B, 3, 16, 112, 112]` in [-1, 1] to the activations of fc7 `[B, 4096]` and the logits `[B, 101]`."""
        x = (video.flip(1) + 1) * 127.5 - self.mean
        for name in CONVS:
            x = F.relu(self.get_submodule(name)(x))
            if name == "conv1a":
                x = F.max_pool3d(x, (1, 2, 2))
            elif name in ("conv2a", "conv3b", "conv4b"):
                x = F.max_pool3d(x, 2)
        x = F.max_pool3d(F.pad(x, (0, 1, 0, 1)), 2)  # [B, 512, 1, 4, 4]
        features = F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))
        return features, self.fc8(features)


WHERE = (
    "The inception score of videos takes two files of TGANv2 (pfnet-research/tgan2): conv3d_deepnetA_ucf.npz, the "
    "weights of C3D finetuned on UCF-101, and mean2.npz, the mean volume of its training clips. StyleGAN-V's "
    "c3d_ucf101.pt (Dropbox s/jxpu7avzdc9n97q) holds both. No digest of them was published: give sha256=."
)


_LAYER = re.compile(r"^(?:.*[./])?(conv\d[ab]|fc\d)[./](W|b|weight|bias)$")


def _module_name(match: re.Match[str]) -> str:
    kind = {"W": "weight", "b": "bias"}.get(match[2], match[2])  # Chainer's names
    return f"{match[1]}.{kind}"


def load_c3d(path: str | Path, mean: str | Path | None = None, sha256: str | None = None) -> Detector:
    """Load the classifier of the video inception score.

    Args:
        path: .npz, .safetensors, a state dict or a TorchScript archive that holds conv1a ... fc8, each with `W` and `b`
            or `weight` and `bias`.
        mean: File with an array `mean` `[3, 16, 128, 171]` (a leading axis of 1 is fine) in BGR from 0 to 255, unless
            `path` holds `mean` `[3, 16, 112, 112]` itself.
        sha256: Digest of `path`. Nobody has published one, so it is asked for: look it up once, and keep it.

    Raises:
        FileNotFoundError: If there is no such file; says what it is and where it is found.
        ValueError: If no digest is given, or the file does not fit.
    """
    path = Path(path)
    found, _ = identify(path, {}, sha256, WHERE)
    if sha256 is None:
        raise vouch(path, found)
    state = {_LAYER.sub(_module_name, name): tensor for name, tensor in read_tensors(path).items()}
    if mean is not None:
        state["mean"] = _mean_volume(Path(mean))
    with torch.device("meta"):
        network = C3D()
    network.load_state_dict(
        fit(state, {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}, path), assign=True
    )
    quantities = ("inception_score", "class_coherence", "inception_coherence")
    card = DetectorCard(
        "c3d_ucf101",
        found.sha256,
        4096,
        NUM_CLASSES,
        Preprocessing(112, "aligned_corners", min_frames=16, max_frames=16),
        published={quantity: quantity for quantity in quantities},
    )
    return Detector(network, card)


def _mean_volume(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"No mean volume at {path}. {WHERE}")
    volume = read_tensors(path).get("mean", torch.empty(0)).float().squeeze(0)
    if volume.shape != (3, 16, 128, 171):
        raise ValueError(f"{path} should hold an array `mean` of 3 x 16 x 128 x 171; found {list(volume.shape)}.")
    return volume[:, :, 8:120, 8:120].contiguous()
