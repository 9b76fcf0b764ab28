from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.metrics import load_c3d
from models.metrics.c3d import C3D
from models.metrics.files import digests
from models.random import keyed_generator

# the arrays of conv3d_deepnetA_ucf.npz
SHAPES = {
    "conv1a": (64, 3), "conv2a": (128, 64), "conv3a": (256, 128), "conv3b": (256, 256), "conv4a": (512, 256),
    "conv4b": (512, 512), "conv5a": (512, 512), "conv5b": (512, 512),
}  # fmt: skip
LINEAR = {"fc6": (4096, 8192), "fc7": (4096, 4096), "fc8": (101, 4096)}


def official_state() -> dict[str, Tensor]:
    """Names and shapes of the release; each array is one number, so that the file stays small."""
    shapes = {name: (*shape, 3, 3, 3) for name, shape in SHAPES.items()} | LINEAR
    state = {}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        state[f"{name}/W"] = torch.tensor(number / 1000).expand(shape)
        state[f"{name}/b"] = torch.tensor(float(-number)).expand(shape[0])
    return state


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    path = tmp_path_factory.mktemp("c3d") / "mean2.npz"
    volume = np.random.default_rng(0).uniform(0, 255, (1, 3, 16, 128, 171)).astype(np.float32)
    np.savez(path, mean=volume)
    return path, torch.from_numpy(volume)


def save(state: dict[str, Tensor], path: Path) -> str:
    torch.save(state, path)
    return digests(path).sha256


def test_shapes_and_size() -> None:
    with torch.device("meta"):
        network, video = C3D(), torch.empty(2, 3, 16, 112, 112)
    shapes = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: list(output.shape[1:])}))
    features, logits = network(video)
    assert shapes == {
        "conv1a": [64, 16, 112, 112],
        "conv2a": [128, 16, 56, 56],
        "conv3a": [256, 8, 28, 28],
        "conv3b": [256, 8, 28, 28],
        "conv4a": [512, 4, 14, 14],
        "conv4b": [512, 4, 14, 14],
        "conv5a": [512, 2, 7, 7],
        "conv5b": [512, 2, 7, 7],
        "fc6": [4096],
        "fc7": [4096],
        "fc8": [101],
    }
    assert (features.shape, logits.shape) == ((2, 4096), (2, 101))
    assert sum(parameter.numel() for parameter in network.parameters()) == 78_409_573


@pytest.mark.parametrize("prefix", ["", "c3d."])
def test_official_arrays_load(tmp_path: Path, mean: tuple[Path, Tensor], prefix: str) -> None:
    path = tmp_path / "conv3d_deepnetA_ucf.pt"
    digest = save({prefix + name: tensor for name, tensor in official_state().items()}, path)
    detector = load_c3d(path, mean[0], sha256=digest)
    network = detector.network
    assert float(network.get_parameter("conv3a.weight")[0, 0, 0, 0, 0]) == pytest.approx(3 / 1000)
    assert float(network.get_parameter("fc8.bias")[0]) == -11
    assert torch.equal(network.mean, mean[1][0, :, :, 8:120, 8:120])
    assert detector.card.metric_name("inception_score") == "inception_score"
    assert detector.card.metric_name("class_coherence") == "class_coherence"
    assert detector.card.metric_name("frechet") == "frechet_c3d_ucf101"
    assert detector.card.weights == digest


class Stop(Exception):
    pass


def test_network_sees_blue_first_in_grey_levels_without_the_mean(tmp_path: Path, mean: tuple[Path, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    detector = load_c3d(path, mean[0], sha256=save(official_state(), path))
    seen = []

    def look(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])
        raise Stop  # the rest takes seconds

    detector.network.get_submodule("conv1a").register_forward_pre_hook(look)
    video = torch.randint(256, (1, 3, 16, 57, 57), generator=keyed_generator(0), dtype=torch.uint8)
    with pytest.raises(Stop):
        detector(video)
    expected = video.flip(1)[0, :, 3, 0, 0].float() - mean[1][0, :, 3, 8, 8]  # corners are aligned: pixel 0 is pixel 0
    assert torch.allclose(seen[0][0, :, 3, 0, 0], expected, atol=1e-3)
    expected = video.flip(1)[0, :, 3, 56, 56].float() - mean[1][0, :, 3, 119, 119]
    assert torch.allclose(seen[0][0, :, 3, 111, 111], expected, atol=1e-3)
    with pytest.raises(ValueError, match="c3d_ucf101 takes at most 16 frames"):
        detector(video.repeat(1, 1, 2, 1, 1))
    with pytest.raises(ValueError, match="c3d_ucf101 needs at least 16 frames"):
        detector(video[:, :, :15])


def test_what_is_missing_is_named(tmp_path: Path, mean: tuple[Path, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match=r"conv3d_deepnetA_ucf.npz(.|\n)*mean2.npz"):
        load_c3d(path)
    digest = save(official_state(), path)
    with pytest.raises(ValueError, match=f"say so with sha256={digest}"):
        load_c3d(path, mean[0])
    with pytest.raises(ValueError, match="no mean"):
        load_c3d(path, sha256=digest)
    with pytest.raises(FileNotFoundError, match="No mean volume at"):
        load_c3d(path, tmp_path / "none.npz", sha256=digest)
    np.savez(tmp_path / "other.npz", mean=np.zeros((3, 16, 112, 112)))
    with pytest.raises(ValueError, match=r"3 x 16 x 128 x 171; found \[3, 16, 112, 112\]"):
        load_c3d(path, tmp_path / "other.npz", sha256=digest)
