"""Weights as files: what is written, what is read back, and that nothing foreign is ever executed."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models.weights
from models.priors.mebt import MeBT
from models.random import keyed_generator
from models.tokenizers import VQGAN3D
from models.weights import (
    build,
    load_state,
    load_tokenizer,
    official_mebt_name,
    read_checkpoint,
    save_bundle,
    state_digest,
    tokenizer_from_checkpoint,
)

CONFIG: dict[str, Any] = {
    "class_path": "models.tokenizers.VQGAN3D",
    "init_args": {
        "encoder": {"class_path": "models.tokenizers.TimeAgnosticEncoder", "init_args": {"base_channels": 2}},
        "quantizer": {"class_path": "models.tokenizers.VectorQuantizer", "init_args": {"codebook_size": 8, "dim": 4}},
        "decoder": {"class_path": "models.tokenizers.TimeAgnosticDecoder", "init_args": {"base_channels": 2}},
        "pixel_range": [-0.5, 0.5],
    },
}


@pytest.fixture
def tokenizer() -> VQGAN3D:
    torch.manual_seed(0)
    return build(CONFIG)


@pytest.fixture
def bundle(tokenizer: VQGAN3D, tmp_path: Path) -> Path:
    save_bundle(tmp_path / "bundle", tokenizer, CONFIG, {"source": "a test"})
    return tmp_path / "bundle"


def write_checkpoint(path: Path, tokenizer: VQGAN3D, **extra: Any) -> Path:
    """What Lightning writes for a VQGAN3DModule, as far as we read it."""
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    state["image_discriminator.weight"] = torch.zeros(1)
    content = {"state_dict": state, "hyper_parameters": {"tokenizer": CONFIG, "lr": 0.1}, "global_step": 12}
    torch.save(content | extra, path)
    return path


class Canary:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, nest: Path) -> None:
        self.nest = nest

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.nest),)


# Building from a configuration


def test_a_configuration_is_built_with_all_that_it_holds(tokenizer: VQGAN3D) -> None:
    assert type(tokenizer) is VQGAN3D
    assert (tokenizer.codebook_size, tokenizer.quantizer.dim, tokenizer.pixel_range) == (8, 4, (-0.5, 0.5))


@pytest.mark.parametrize(
    "class_path",
    [
        "torch.nn.Linear",  # harmless, but not ours
        "os.system",
        "subprocess.Popen",
        "modelsx.tokenizers.VQGAN3D",
        "VQGAN3D",
        "models.weights.Path",  # ours holds it, but it comes from elsewhere
        "models.weights.nn.Linear",
        "models.weights.save_bundle",  # a function that writes
        "models.tokenizers.Encoded",  # ours, but no network
        "models.tokenizers.Nothing",
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_nothing_but_our_networks_is_built(class_path: str, is_nested: bool) -> None:
    config = {"class_path": class_path, "init_args": {}}
    if is_nested:
        config = {**CONFIG, "init_args": {**CONFIG["init_args"], "encoder": config}}
    with pytest.raises(ValueError, match=f"asks for '{class_path}'; only networks of `models` are built"):
        build(config)


# Digests


def test_digest_depends_on_names_types_shapes_and_values_alone() -> None:
    state = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3)}
    digest = state_digest(state)
    assert len(digest) == 64
    assert state_digest({"b": torch.tensor(3), "a": torch.tensor([[1.0], [2.0]]).T}) == digest  # order, strides
    others = [
        {"a": torch.tensor([[1.0, 2.0]]), "c": torch.tensor(3)},
        {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor(3)},
        {"a": torch.tensor([[1.0, 2.5]]), "b": torch.tensor(3)},
        {"a": torch.tensor([[1.0, 2.0]]).double(), "b": torch.tensor(3)},
        {"a": torch.tensor([[1.0, 2.0]])},
    ]
    assert digest not in {state_digest(other) for other in others}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.uint8, torch.float64])
def test_digest_takes_every_type(dtype: torch.dtype) -> None:
    zeros, ones = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert state_digest({"a": zeros}) != state_digest({"a": ones})


def test_digest_does_not_change_with_the_device_or_gradients(tokenizer: VQGAN3D) -> None:
    before = state_digest(tokenizer.state_dict())
    assert state_digest(dict(tokenizer.named_parameters()) | dict(tokenizer.named_buffers())) == before


# Loading weights


def test_weights_that_do_not_fit_are_all_listed() -> None:
    layer = nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}
    message = r"here\.pt does not fit .*: missing bias; unexpected scale; weight is \(3, 4\), expected \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        load_state(layer, state, Path("here.pt"))


def test_nothing_is_loaded_if_not_all_fits() -> None:
    layer = nn.Linear(2, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="missing bias"):
        load_state(layer, {"weight": torch.zeros(3, 2)}, Path("here.pt"))
    assert torch.equal(layer.weight, before["weight"])


# Checkpoints


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save({"step": 3, "state": {"a": torch.arange(3)}}, tmp_path / "plain.ckpt")
    content = read_checkpoint(tmp_path / "plain.ckpt")
    assert content["step"] == 3
    assert content["state"]["a"].tolist() == [0, 1, 2]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*nowhere\.ckpt"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path) -> None:
    nest = tmp_path / "nest"
    torch.save({"state_dict": {}, "hyper_parameters": Canary(nest)}, tmp_path / "foreign.ckpt")
    for read in (read_checkpoint, load_tokenizer):
        with pytest.raises(ValueError, match=r"foreign\.ckpt holds Python objects \(posix\.mkdir\).*refused") as error:
            read(tmp_path / "foreign.ckpt")
        assert "weights_only" not in str(error.value)  # torch tells how to execute it after all
    assert not nest.exists()
    torch.load(tmp_path / "foreign.ckpt", weights_only=False)
    assert nest.exists()  # it would have sung


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.ckpt"
    torch.save({"a": torch.arange(1000)}, path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-500], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=r"damaged\.ckpt is damaged, or no checkpoint"):
        read_checkpoint(path)


def test_tokenizer_of_a_checkpoint_comes_with_its_configuration_and_origin(tokenizer: VQGAN3D, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step=12.ckpt", tokenizer)
    loaded, config, provenance = tokenizer_from_checkpoint(path)
    assert state_digest(loaded.state_dict()) == state_digest(tokenizer.state_dict())
    assert config == CONFIG
    assert provenance == {"source": "step=12.ckpt", "step": 12, "weights": "raw weights"}


def test_averaged_weights_are_taken_if_there_are_any_and_the_origin_says_so(tokenizer: VQGAN3D, tmp_path: Path) -> None:
    """Weight averaging puts the average where the weights were, and the raw weights beside it."""
    path = write_checkpoint(tmp_path / "averaged.ckpt", tokenizer, current_model_state={"tokenizer.x": torch.ones(1)})
    loaded, _, provenance = tokenizer_from_checkpoint(path)
    assert provenance["weights"] == "averaged weights"
    assert state_digest(loaded.state_dict()) == state_digest(tokenizer.state_dict())


@pytest.mark.parametrize("hyper_parameters", [{}, {"tokenizer": "weights/mine"}, None])
def test_a_checkpoint_without_a_tokenizer_is_refused(
    tokenizer: VQGAN3D, tmp_path: Path, hyper_parameters: dict | None
) -> None:
    path = write_checkpoint(tmp_path / "other.ckpt", tokenizer, hyper_parameters=hyper_parameters)
    with pytest.raises(ValueError, match=r"other\.ckpt is no tokenizer checkpoint"):
        tokenizer_from_checkpoint(path)


def test_a_checkpoint_whose_weights_do_not_fit_lists_them(tokenizer: VQGAN3D, tmp_path: Path) -> None:
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    state["tokenizer.extra"] = state.pop("tokenizer.quantizer.N")
    path = write_checkpoint(tmp_path / "wrong.ckpt", tokenizer, state_dict=state)
    with pytest.raises(ValueError, match=r"wrong\.ckpt does not fit .*missing quantizer\.N; unexpected extra"):
        load_tokenizer(path)


# Bundles


def test_a_bundle_gives_the_tokenizer_back_frozen(tokenizer: VQGAN3D, bundle: Path) -> None:
    loaded = load_tokenizer(str(bundle))
    video = torch.rand(1, 3, 8, 16, 16, generator=keyed_generator(0)) * 2 - 1
    expected = tokenizer.eval().encode(video)
    assert torch.equal(loaded.encode(video).codes, expected.codes)
    assert torch.equal(loaded.decode(expected.latents), tokenizer.decode(expected.latents))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_bundle_and_a_checkpoint_of_the_same_weights_are_one_tokenizer(
    tokenizer: VQGAN3D, bundle: Path, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "same.ckpt", tokenizer)
    one, other = (state_digest(load_tokenizer(path).state_dict()) for path in (bundle, checkpoint))
    assert one == other


def test_a_bundle_holds_weights_configuration_and_provenance(tokenizer: VQGAN3D, bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]
    assert json.loads((bundle / "config.json").read_text()) == CONFIG
    assert json.loads((bundle / "provenance.json").read_text()) == {
        "bundle_version": 1,
        "digest": state_digest(tokenizer.state_dict()),
        "source": "a test",
    }


def test_a_bundle_is_not_overwritten(tokenizer: VQGAN3D, bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(FileExistsError, match="bundle exists already"):
        save_bundle(bundle, tokenizer, CONFIG, {})
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_bundle_appears_whole_or_not_at_all(
    tokenizer: VQGAN3D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.weights, "state_digest", lambda state: 1 / 0)  # fails when half of it is written
    with pytest.raises(ZeroDivisionError):
        save_bundle(tmp_path / "weights/mine", tokenizer, CONFIG, {})
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_path_with_nothing_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_bundle_is_named(bundle: Path, missing: str) -> None:
    (bundle / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"bundle is no tokenizer bundle: it holds no {missing}"):
        load_tokenizer(bundle)


def test_a_bundle_of_another_network_is_refused(tmp_path: Path) -> None:
    config = {"class_path": "models.priors.mebt.MeBT", "init_args": {"codebook_size": 8, "num_tokens": 4, "dim": 8}}
    config["init_args"] |= {"num_heads": 2, "num_latents": 2, "blocks": ["latent_enc"]}
    save_bundle(tmp_path / "prior", build(config), config, {})
    with pytest.raises(ValueError, match=r"models\.priors\.mebt\.MeBT is no tokenizer"):
        load_tokenizer(tmp_path / "prior")


def test_a_bundle_that_asks_for_a_foreign_class_is_refused(bundle: Path, tmp_path: Path) -> None:
    config = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "nest")}}
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'os\.mkdir'; only networks of `models`"):
        load_tokenizer(bundle)
    assert not (tmp_path / "nest").exists()


def test_a_bundle_whose_weights_do_not_fit_lists_them(bundle: Path) -> None:
    state = load_file(bundle / "model.safetensors")
    state["extra"] = state.pop("quantizer.N")
    save_file(state, bundle / "model.safetensors")
    with pytest.raises(ValueError, match=r"bundle does not fit .*missing quantizer\.N; unexpected extra"):
        load_tokenizer(bundle)


# Official names


def test_official_names_of_mebt_are_one_to_one() -> None:
    with torch.device("meta"):
        network = MeBT(8, 4, dim=8, num_heads=2, num_latents=2, blocks=("latent_enc", "latent_dec"))
    names = [official_mebt_name(name) for name, _ in network.named_parameters()]
    assert len(set(names)) == len(names)
    assert {"tok_emb.weight", "pos_emb", "mask_emb", "sos_emb", "transformer.head.weight"} <= set(names)
    assert official_mebt_name("blocks.11.norm2.bias") == "transformer.blocks.11.ln2.bias"


def test_a_name_that_mebt_does_not_have_is_refused() -> None:
    with pytest.raises(KeyError, match="encoder"):
        official_mebt_name("encoder.weight")
