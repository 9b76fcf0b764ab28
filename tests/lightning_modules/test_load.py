"""Generators as files: bundles hold all that sampling needs, and nothing that a loader would execute."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.export import main as export
from lightning_modules import MeBTModule
from lightning_modules.generator import Condition
from lightning_modules.load import load_generator
from models.priors.decoding import ConfidenceDecoding


@pytest.fixture
def checkpoint(tokenizer_bundle: Path, tmp_path: Path) -> Path:
    """What a run of MeBT writes, as far as it is read."""
    torch.manual_seed(0)
    module = MeBTModule(
        str(tokenizer_bundle),
        num_frames=8,
        resolution=16,
        codebook_size=16,
        dim=16,
        num_heads=2,
        num_latents=4,
        blocks=["latent_enc", "latent_dec"],
        sampling=ConfidenceDecoding(num_steps=2),
    )
    module.load_tokenizer()
    content: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "global_step": 7,
        "current_model_state": {},
    }
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "step=7.ckpt")
    return tmp_path / "step=7.ckpt"


@pytest.fixture
def bundle(checkpoint: Path, tmp_path: Path) -> Path:
    export([str(checkpoint), str(tmp_path / "bundle")])
    return tmp_path / "bundle"


def video(path: Path) -> torch.Tensor:
    return load_generator(path).generate(Condition(), 8, torch.tensor([3]))


def test_a_bundle_generates_what_its_checkpoint_does_wherever_it_is_moved(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    expected = video(checkpoint)
    moved = tmp_path / "elsewhere/mine"
    moved.parent.mkdir()
    shutil.move(bundle, moved)
    module = load_generator(str(moved))
    assert torch.equal(video(moved), expected)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.tokenizer_path == str(moved / "tokenizer")


def test_a_bundle_is_safetensors_json_and_yaml_without_paths(bundle: Path, tokenizer_bundle: Path) -> None:
    names = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    one = ["config.json", "experiment.yaml", "model.safetensors", "provenance.json"]
    assert names == [*one, *(f"tokenizer/{name}" for name in one if name != "experiment.yaml")]
    for path in bundle.rglob("*"):
        if path.suffix in (".json", ".yaml"):
            assert str(tokenizer_bundle) not in path.read_text()
    provenance = json.loads((bundle / "provenance.json").read_text())
    assert (provenance["step"], provenance["weights"]) == (7, "averaged weights")


def test_a_bundle_whose_tokenizer_was_exchanged_is_refused(bundle: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = bundle / "tokenizer/model.safetensors"
    state = load_file(file)
    state["quantizer.embeddings"] += 1
    save_file(state, file)
    with pytest.raises(ValueError, match="was trained on tokenizer"):
        load_generator(bundle)


@pytest.mark.parametrize(
    "class_path", ["os.mkdir", "lightning_modules.VQGAN3DModule", "subprocess.Popen", "torch.nn.Linear"]
)
def test_a_bundle_that_asks_for_another_class_is_refused(bundle: Path, tmp_path: Path, class_path: str) -> None:
    config = {"class_path": class_path, "init_args": {"path": str(tmp_path / "nest")}}
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"asks for '{class_path}'; only generators"):
        load_generator(bundle)
    assert not (tmp_path / "nest").exists()


class Canary:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, nest: Path) -> None:
        self.nest = nest

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.nest),)


def test_a_checkpoint_with_code_in_it_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"hyper_parameters": Canary(tmp_path / "nest")}, checkpoint)
    for load in (lambda: load_generator(checkpoint), lambda: export([str(checkpoint), str(tmp_path / "out")])):
        with pytest.raises(ValueError, match="holds Python objects"):
            load()
    assert not (tmp_path / "nest").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer"])
def test_a_folder_that_is_no_bundle_is_named(bundle: Path, missing: str) -> None:
    path = bundle / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no bundle of a generator: it holds no {missing}"):
        load_generator(bundle)


def test_a_bundle_is_not_overwritten(checkpoint: Path, bundle: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        export([str(checkpoint), str(bundle)])


def test_a_checkpoint_of_no_generator_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {}, "global_step": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of a generator"):
        load_generator(tmp_path / "other.ckpt")
