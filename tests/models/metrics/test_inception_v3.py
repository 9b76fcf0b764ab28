from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.metrics import FrechetDistance, InceptionScore, load_inception
from models.metrics import inception as inception_module
from models.metrics.files import digests
from models.metrics.inception import InceptionV3
from models.random import keyed_generator

OPTIONS = {"num_classes": 1008, "aux_logits": False, "transform_input": False, "init_weights": False}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights in the layout of the released file, which is torchvision's with 1,008 classes."""
    generator = keyed_generator(0)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in torchvision.models.inception_v3(**OPTIONS).state_dict().items()
        }
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        else:
            scale = (2 / torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 0.1
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


def test_network_is_torchvisions_with_the_pooling_of_the_graph(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        theirs, ours = torchvision.models.inception_v3(**OPTIONS).eval(), InceptionV3()
    theirs.load_state_dict(state, assign=True)
    ours.load_state_dict(state, assign=True)
    in_last_block = [False]

    def pool(x: Tensor, **options: int) -> Tensor:
        return F.max_pool2d(x, **options) if in_last_block[0] else F.avg_pool2d(x, count_include_pad=False, **options)

    functional = SimpleNamespace(avg_pool2d=pool, max_pool2d=F.max_pool2d, relu=F.relu)
    monkeypatch.setattr(torchvision.models.inception, "F", functional)
    theirs.Mixed_7c.register_forward_pre_hook(lambda *_: in_last_block.__setitem__(0, True))
    theirs.fc.bias.data = torch.zeros(1008)  # scores go without it
    pooled = []
    theirs.avgpool.register_forward_hook(lambda _, __, output: pooled.append(output.flatten(1)))
    images = torch.rand(2, 3, 299, 299, generator=keyed_generator(1)) * 2 - 1
    with torch.no_grad():
        expected = theirs(((images + 1) * 127.5 - 128) / 128)
        features, logits = ours(images[:, :, None])
    assert torch.allclose(features, pooled[0], rtol=1e-3, atol=1e-4)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_released_file_makes_fid_and_the_score_of_images(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="none of the files whose digests are known"):
        load_inception(file)
    monkeypatch.setattr(inception_module, "SHA256", digests(file).sha256)
    detector = load_inception(file)
    assert FrechetDistance(detector).name == "fid"
    assert InceptionScore(detector).name == "image_inception_score"
    assert detector.card.metric_name("kernel") == "kernel_inception_v3"
    features = detector(torch.zeros(1, 3, 1, 32, 40))
    assert (features.values.shape, features.logits.shape) == ((1, 2048), (1, 1008))
    assert detector.card.preprocessing.resize == "legacy"
    with pytest.raises(ValueError, match="inception_v3 takes at most 1 frames"):
        detector(torch.zeros(1, 3, 2, 32, 40))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="sha256 6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    ):
        load_inception(tmp_path / "none.pth")


def test_other_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inception_v3_google.pth"
    torch.save({"fc.weight": torch.zeros(1).expand(1000, 2048)}, path)
    with pytest.raises(ValueError, match="does not hold this network's weights"):
        load_inception(path, sha256=digests(path).sha256)


def test_batch_norm_has_the_epsilon_of_the_graph() -> None:
    with torch.device("meta"):
        epsilons = {module.eps for module in InceptionV3().modules() if isinstance(module, nn.BatchNorm2d)}
    assert epsilons == {1e-3}
