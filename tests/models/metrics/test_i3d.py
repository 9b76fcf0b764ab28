import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.metrics import Detector, load_i3d, random_i3d
from models.metrics import i3d as i3d_module
from models.metrics.files import KnownFile, digests, read_tensors
from models.metrics.i3d import I3D, MaxPool, Mixed, Unit, layouts, pad_same, shard_id, to_module_names
from models.random import keyed_generator

State = dict[str, Tensor]


def clips(count: int, frames: int, size: int) -> Tensor:
    return torch.rand(count, 3, frames, size, size, generator=keyed_generator(count, frames, size)) * 2 - 1


# The network


def test_shapes_are_those_of_the_published_table() -> None:
    with torch.device("meta"):
        network, video = I3D(), torch.empty(1, 3, 16, 224, 224)
    shapes = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: list(output.shape[1:])}))
    features, logits = network(video)
    assert shapes == {
        "Conv3d_1a_7x7": [64, 8, 112, 112],
        "MaxPool3d_2a_3x3": [64, 8, 56, 56],
        "Conv3d_2b_1x1": [64, 8, 56, 56],
        "Conv3d_2c_3x3": [192, 8, 56, 56],
        "MaxPool3d_3a_3x3": [192, 8, 28, 28],
        "Mixed_3b": [256, 8, 28, 28],
        "Mixed_3c": [480, 8, 28, 28],
        "MaxPool3d_4a_3x3": [480, 4, 14, 14],
        "Mixed_4b": [512, 4, 14, 14],
        "Mixed_4c": [512, 4, 14, 14],
        "Mixed_4d": [512, 4, 14, 14],
        "Mixed_4e": [528, 4, 14, 14],
        "Mixed_4f": [832, 4, 14, 14],
        "MaxPool3d_5a_2x2": [832, 2, 7, 7],
        "Mixed_5b": [832, 2, 7, 7],
        "Mixed_5c": [1024, 2, 7, 7],
        "logits": [400, 1, 1, 1],
    }
    assert features.shape == logits.shape == (1, 400)


@pytest.mark.parametrize(("frames", "positions"), [(9, 1), (10, 1), (16, 1), (17, 2), (32, 3), (128, 15)])
def test_logits_over_time(frames: int, positions: int) -> None:
    with torch.device("meta"):
        assert I3D().logits_over_time(torch.empty(2, 3, frames, 224, 224)).shape == (2, 400, positions)


def test_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = I3D()
    kinds = [type(module) for module in network.modules()]
    assert [kinds.count(kind) for kind in (nn.Conv3d, nn.BatchNorm3d, MaxPool, Mixed)] == [58, 57, 13, 9]
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264
    assert sum(buffer.numel() for buffer in network.buffers() if buffer.ndim) == 14_560
    assert len([name for name in network.state_dict() if "num_batches" not in name]) == 287
    assert len(network.state_dict()) == 344


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (3, 2), (2, 2), (1, 1), (1, 2)])
def test_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    """Against its definition, in one dimension: output i sees inputs `i stride - front ... + kernel`."""
    x = torch.randn(size, generator=keyed_generator(size))
    outputs = math.ceil(size / stride)
    total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
    expected = [
        sum(float(x[j]) for k in range(kernel) if 0 <= (j := i * stride - total // 2 + k) < size)
        for i in range(outputs)
    ]
    for axis in range(3):
        kernels = [1, 1, 1]
        strides = [1, 1, 1]
        kernels[axis], strides[axis] = kernel, stride
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = size
        padded = pad_same(x.view(shape), tuple(kernels), tuple(strides))
        result = F.conv3d(padded, torch.ones(1, 1, *kernels), stride=tuple(strides))
        assert result.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_unit_normalises_between_convolution_and_relu() -> None:
    unit = Unit(2, 3, (1, 1, 1), eps=0.5).eval()
    unit.bn.running_mean = torch.tensor([0.1, 0.2, 0.3])
    unit.bn.running_var = torch.tensor([1.0, 2.0, 3.0])
    unit.bn.bias.data = torch.tensor([0.5, -0.1, 0.0])
    x = torch.randn(1, 2, 2, 2, 2, generator=keyed_generator(0))
    y = torch.einsum("bithw,oi->bothw", x, unit.conv3d.weight[:, :, 0, 0, 0])
    rows = (slice(None), None, None, None)
    y = (y - unit.bn.running_mean[rows]) / (unit.bn.running_var[rows] + 0.5).sqrt() + unit.bn.bias[rows]
    assert torch.allclose(unit(x), y.clamp(min=0), atol=1e-5)


def test_epsilon_changes_outputs_and_clips_do_not_see_each_other(detector: Detector) -> None:
    x = clips(3, 9, 32)
    other = I3D(eps=1e-1)
    other.load_state_dict(detector.network.state_dict())
    with torch.no_grad():
        logits, _ = detector.network(x)
        alone, _ = detector.network(x[1:2])
        assert torch.allclose(alone[0], logits[1], atol=1e-5)
        assert torch.equal(detector.network(x)[0], logits)  # no dropout
        assert not torch.allclose(other(x)[0], logits, atol=1e-3)


# The detector of random weights


def test_random_detector_is_always_the_same_and_leaves_the_global_generator_alone(detector: Detector) -> None:
    before = torch.get_rng_state()
    again = random_i3d()
    assert torch.equal(torch.get_rng_state(), before)
    x = clips(2, 16, 32)
    features = detector(x)
    assert torch.equal(features.values, again(x).values)
    assert features.card == again.card == detector.card
    assert features.values.shape == (2, 400)
    assert 0.01 < float(features.values.std()) < 10
    assert random_i3d(1).card != detector.card


def test_random_detector_needs_nine_frames(detector: Detector) -> None:
    with pytest.raises(ValueError, match="random_i3d needs at least 9 frames; the clips have 8"):
        detector(clips(1, 8, 32))


# Files


def random_state() -> State:
    generator = keyed_generator(7)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in I3D().state_dict().items() if tensor.ndim}
    state = {}
    for name, shape in shapes.items():
        if name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("bn.weight"):
            state[name] = torch.ones(shape)
        else:
            scale = (2 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


def tensorflow_layout(state: State) -> State:
    statistics = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    result = {}
    for ours, theirs, _ in layouts():
        prefix = f"RGB/inception_i3d/{theirs}"
        result[f"{prefix}/conv_3d/w"] = state[f"{ours}.conv3d.weight"].permute(2, 3, 4, 1, 0).contiguous()
        if ours == "logits":
            result[f"{prefix}/conv_3d/b"] = state["logits.conv3d.bias"]
            continue
        for kind, name in statistics.items():
            result[f"{prefix}/batch_norm/{name}"] = state[f"{ours}.bn.{kind}"].view(1, 1, 1, 1, -1)
    return result


def lower_case_layout(state: State) -> State:
    result = {}
    for ours, _, theirs in layouts():
        for name, tensor in state.items():
            if name.startswith(f"{ours}."):
                result[name.replace(f"{ours}.", f"{theirs}.").replace(".bn.", ".batch3d.")] = tensor
    return result


def with_counters(state: State) -> State:
    means = [name for name in state if name.endswith("running_mean")]
    return state | {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}


class Node(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def save_torchscript(state: State, path: Path) -> None:
    """Write an archive whose modules and parameters have these names, and whose code does nothing."""
    root = Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node: nn.Module = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = node.get_submodule(parent)
        node.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # deprecated, but the published file is one
        torch.jit.trace(root, torch.zeros(1)).save(str(path))


def save_npz(state: State, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})


FILES: dict[str, tuple[Callable[[State], State], Callable[[State, Path], None]]] = {
    "i3d_pretrained_400.pt": (with_counters, lambda s, p: torch.save(s, p)),
    "i3d_torchscript.pt": (lower_case_layout, save_torchscript),
    "variables.npz": (tensorflow_layout, save_npz),
    "variables.safetensors": (tensorflow_layout, lambda s, p: save_file(s, p)),
}


@pytest.fixture(scope="module")
def files(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("i3d")
    for name, (layout, save) in FILES.items():
        save(layout(state), folder / name)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_weights(files: Path, state: State, name: str) -> None:
    digest = digests(files / name).sha256
    detector = load_i3d(files / name, sha256=digest)
    loaded = detector.network.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert len(loaded) == 344
    assert detector.card.weights == digest
    assert detector.card.metric_name("frechet") == "fvd"  # an unknown file goes by the reference's pipeline
    assert not detector.training


def test_official_numbers_of_entries(state: State) -> None:
    assert len(tensorflow_layout(state)) == 230
    assert sum(tensor.numel() for tensor in tensorflow_layout(state).values()) == 12_704_544
    assert len(lower_case_layout(state)) == len(state) == 287
    assert len(with_counters(state)) == 344
    assert "RGB/inception_i3d/Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w" in tensorflow_layout(state)
    assert {"mixed_3b.branch_1.1.batch3d.running_var", "conv3d_0c_1x1.conv3d.bias"} <= lower_case_layout(state).keys()


def test_block_5b_is_found_with_and_without_the_slip_of_the_release(state: State) -> None:
    variables = {
        name.replace("Mixed_5b/Branch_2/Conv3d_0a_3x3", "Mixed_5b/Branch_2/Conv3d_0b_3x3"): tensor
        for name, tensor in tensorflow_layout(state).items()
    }
    converted = to_module_names(variables)
    assert converted.keys() == state.keys()
    assert torch.equal(converted["Mixed_5b.b2b.conv3d.weight"], state["Mixed_5b.b2b.conv3d.weight"])


def test_converted_there_and_back_is_the_identity(state: State) -> None:
    variables = tensorflow_layout(state)
    again = tensorflow_layout(to_module_names({f"{name}:0": tensor for name, tensor in variables.items()}))
    assert all(torch.equal(again[name], tensor) for name, tensor in variables.items())


@pytest.mark.parametrize("profile", ["tf", "videogpt", "stylegan_v"])
def test_profile_sets_epsilon_divisor_and_name(files: Path, profile: str) -> None:
    path = files / "variables.safetensors"
    detector = load_i3d(path, profile, sha256=digests(path).sha256)
    expected = i3d_module.PROFILES[profile]
    epsilons = {module.eps for module in detector.network.modules() if isinstance(module, nn.BatchNorm3d)}
    assert epsilons == {expected.eps}
    assert detector.card.ddof == expected.ddof
    assert detector.card.preprocessing == expected.preprocessing
    suffix = "" if profile == "tf" else f"_{profile}"
    assert detector.card.metric_name("frechet") == f"fvd{suffix}"
    assert detector.card.metric_name("kernel") == f"kvd{suffix}"
    assert detector.card.metric_name("reconstruction_frechet") == f"rfvd{suffix}"
    assert detector.card.metric_name("inception_score") == f"inception_score_i3d{suffix or '_tf'}"


@pytest.mark.parametrize(("profile", "kind"), [("stylegan_v", "sha256"), ("videogpt", "git")])
def test_known_file_comes_with_its_own_profile(
    files: Path, monkeypatch: pytest.MonkeyPatch, profile: str, kind: str
) -> None:
    path = files / "i3d_torchscript.pt"
    known = {getattr(digests(path), kind): KnownFile("a known file", profile=profile)}
    monkeypatch.setattr(i3d_module, "KNOWN", known)
    assert load_i3d(path).card.metric_name("frechet") == f"fvd_{profile}"
    assert load_i3d(path, "tf").card.metric_name("frechet") == "fvd"


def test_weights_from_imagenet_are_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They load without an error into the same network."""
    path = files / "i3d_pretrained_400.pt"
    found = digests(path)
    rgb_imagenet = i3d_module.KNOWN["73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a"]
    monkeypatch.setattr(i3d_module, "KNOWN", {found.git: rgb_imagenet})
    with pytest.raises(ValueError, match=r"is rgb_imagenet.pt of pytorch-i3d: its weights began from ImageNet"):
        load_i3d(path)
    card = load_i3d(path, sha256=found.sha256).card  # asked for by its digest
    assert card.name == "i3d_imagenet"
    assert card.metric_name("frechet") == "frechet_i3d_imagenet"


def test_both_wrong_files_are_known_and_all_right_ones() -> None:
    refused = {digest for digest, entry in i3d_module.KNOWN.items() if entry.refused}
    assert refused == {"73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a", "2a7c22e23e6c74f50a0166ce61110bccd2ab48bb"}
    profiles = {entry.profile for entry in i3d_module.KNOWN.values() if not entry.refused}
    assert profiles == set(i3d_module.PROFILES)


def test_shard_id_is_that_of_the_values_written_in_the_order_of_their_names(tmp_path: Path) -> None:
    shard = tmp_path / "model.ckpt.data-00000-of-00001"
    variables = {
        name: torch.randn(2, 3, generator=keyed_generator(i)) for i, name in enumerate(("b/w", "b/beta", "a/w"))
    }
    shard.write_bytes(b"".join(variables[name].numpy().tobytes() for name in ("a/w", "b/beta", "b/w")))
    assert shard_id(variables) == digests(shard).git


def test_variables_in_another_container_are_known_by_their_shard(
    files: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = tensorflow_layout(state)
    assert sum(tensor.nbytes for tensor in variables.values()) == 50_818_176
    monkeypatch.setattr(i3d_module, "KNOWN", {shard_id(variables): KnownFile("DeepMind's", profile="tf")})
    assert load_i3d(files / "variables.safetensors").card.metric_name("frechet") == "fvd"


@pytest.mark.parametrize("name", ["i3d_torchscript.pt", "variables.safetensors"])
def test_unknown_file_is_refused_unless_its_digest_is_given(files: Path, name: str) -> None:
    path = files / name
    with pytest.raises(ValueError, match=f"say so with sha256={digests(path).sha256}"):
        load_i3d(path)
    with pytest.raises(ValueError, match="is another file than expected: its sha256 is"):
        load_i3d(path, sha256="0" * 64)


def test_digest_is_checked_before_the_file_is_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3d_module, "read_tensors", lambda path: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match="none of the files"):
        load_i3d(files / "i3d_torchscript.pt")


def test_missing_weights_say_where_they_are_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_i3d(tmp_path / "none.pt")
    message = str(error.value)
    assert str(tmp_path / "none.pt") in message
    assert "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2" in message
    assert "a867b87ac3a9097d200598b1d48a1b890d8ec744" in message
    assert "random_i3d works; its numbers are no FVD" in message


def test_other_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="no profile 'magvit' of I3D; expected one of tf, videogpt, stylegan_v"):
        load_i3d("none.pt", profile="magvit")


def broken(state: State, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "broken.pt"
    torch.save(state, path)
    return path, digests(path).sha256


def test_names_and_shapes_must_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in I3D().state_dict().items() if tensor.ndim}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    classes = state | {"logits.conv3d.weight": torch.zeros(1).expand(600, 1024, 1, 1, 1)}
    path, digest = broken(classes, tmp_path)
    with pytest.raises(ValueError, match=r"logits.conv3d.weight is \(600, 1024, 1, 1, 1\), expected \(400, 1024"):
        load_i3d(path, sha256=digest)
    del state["Mixed_3b.b0.bn.bias"]
    path, digest = broken(state | {"end_points.weight": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"end_points\.weight is unknown; no Mixed_3b.b0.bn.bias"):
        load_i3d(path, sha256=digest)


def test_torchscript_is_read_without_its_code(tmp_path: Path) -> None:
    """Replace the code by nonsense: what is read does not change, for nobody looks at it."""
    path, other = tmp_path / "whole.pt", tmp_path / "other.pt"
    save_torchscript({"a.weight": torch.arange(6.0).view(2, 3).T, "a.b.bias": torch.tensor([7])}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"this is no code" if "/code/" in name else source.read(name))
    for file in (path, other):
        tensors = {name: tensor for name, tensor in read_tensors(file).items() if name.startswith("a.")}
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            "a.weight": [[0, 3], [1, 4], [2, 5]],
            "a.b.bias": [7],
        }


def test_torchscript_with_foreign_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("foreign/code/__torch__.py", b"")
        archive.writestr("foreign/data.pkl", b"cposix\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"posix\.system has no place among a network's parameters"):
        read_tensors(path)


def test_state_dict_with_foreign_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(1), "loader": Path("/")}, path)
    with pytest.raises(ValueError, match="holds no tensors that can be read safely"):
        read_tensors(path)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="is no state dict"):
        read_tensors(path)


def test_git_blob_id_is_gits(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert digests(tmp_path / "hello").git == "ce013625030ba8dba906f756967f9e9ca394464a"
