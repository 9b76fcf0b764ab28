"""Released tokenizers of TATS: files in their layout give the official numbers, and nothing in them is executed."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.cli import main
from lightning_modules.vqgan3d import VQGAN3DModule
from models.tokenizers import VQGAN3D, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer
from models.weights import Foreign, import_tats_tokenizer, load_tokenizer, read_foreign_checkpoint

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]

ARGUMENTS = {
    "n_hiddens": 4, "downsample": (4, 8, 8), "image_channels": 3, "norm_type": "batch", "padding_type": "replicate",
    "embedding_dim": 6, "n_codes": 24, "no_random_restart": True, "restart_thres": 1.0, "sequence_length": 16,
    "resolution": 128, "data_path": "/home/somebody/ucf101", "lr": 3e-5,
}  # fmt: skip
CODES = [
    [21, 17, 4, 17, 12, 8, 21, 21, 4, 17, 15, 8, 21, 4, 4, 4, 10, 1],
    [8, 4, 0, 10, 12, 13, 12, 8, 15, 14, 5, 4, 15, 15, 22, 17, 15, 4],
]


def official_state(golden_tensor: GoldenTensor) -> dict[str, Tensor]:
    """All that a stand-alone tokenizer's file holds, by the official names; of the perceptual network a few."""
    tokenizer = VQGAN3D(
        TimeAgnosticEncoder(base_channels=4), VectorQuantizer(24, 6), TimeAgnosticDecoder(base_channels=4)
    )
    module = VQGAN3DModule(tokenizer, perceptual_weight=0, discriminator_channels=4)
    names = {
        name.removeprefix("tokenizer."): value
        for name, value in module.state_dict().items()
        if not name.startswith("tokenizer.quantizer.")
    }
    state = {name: golden_tensor(name, tuple(value.shape), 1.5).to(value.dtype) for name, value in names.items()}
    state["codebook.embeddings"] = golden_tensor("codebook.embeddings", (24, 6), 2 * 2**0.5).float()
    state["codebook.N"] = 0.7 + 0.5 * (torch.arange(24) % 3)
    state["codebook.z_avg"] = state["codebook.N"][:, None] * state["codebook.embeddings"]
    state["perceptual_model.scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    state["perceptual_model.net.slice1.0.weight"] = torch.zeros(64, 3, 3, 3)
    state["perceptual_model.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    return state


@pytest.fixture(scope="module")
def state(golden_tensor: GoldenTensor) -> dict[str, Tensor]:
    return official_state(golden_tensor)


def write(path: Path, state: dict[str, Tensor], arguments: dict[str, Any] | None = ARGUMENTS, **extra: Any) -> Path:
    """What Lightning 1.x wrote: hyper-parameters in a pickled Namespace."""
    content: dict[str, Any] = {
        "epoch": 3,
        "global_step": 29999,
        "pytorch-lightning_version": "1.3.8",
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 3e-5}]}],
        "lr_schedulers": [],
        "hparams_name": "args",
        "hyper_parameters": {} if arguments is None else {"args": argparse.Namespace(**arguments)},
    }
    torch.save(content | extra, path)
    return path


def pixels() -> Tensor:
    """The clip of the golden numbers `[2, 3, 12, 24, 16]` in [-0.5, 0.5]."""
    sizes = (2, 3, 12, 24, 16)
    b, c, t, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in sizes], indexing="ij")
    return 0.4 * torch.sin(2 * b + 1.3 * c + 0.6 * t + 0.25 * y + 0.4 * x + 0.03 * x * y + 0.05 * t * y)


def test_an_official_file_becomes_a_bundle_with_the_official_numbers(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "ucf101.ckpt", state)
    main(["import-weights", str(source), str(tmp_path / "bundle")])
    assert "24 codes of 4 x 8 x 8 pixels" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "bundle").double()
    encoded = tokenizer.encode(2 * pixels())  # the house's range is twice the official one
    assert encoded.codes.flatten(1).tolist() == CODES
    reconstruction = tokenizer.decode_native(encoded.latents)
    assert reconstruction.abs().sum().item() == pytest.approx(71136.195, rel=1e-5)
    for place, value in (((0, 0, 0, 0, 0), 2.0103279), ((1, 0, 7, 3, 9), 2.623266)):
        assert reconstruction[place].item() == pytest.approx(value, rel=5e-5)
    assert encoded.losses["commitment"].item() == pytest.approx(0.36034456, rel=5e-5)
    assert tokenizer.pixel_range == (-0.5, 0.5)


def test_a_bundle_says_where_it_comes_from_and_nothing_personal(state: dict[str, Tensor], tmp_path: Path) -> None:
    source = write(tmp_path / "ucf101.ckpt", state)
    main(["import-weights", str(source), str(tmp_path / "bundle")])
    texts = [(tmp_path / "bundle" / name).read_text() for name in ("config.json", "provenance.json")]
    provenance = json.loads(texts[1])
    expected = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    assert provenance["source_sha256"] == expected
    assert (provenance["source"], provenance["mapping_version"], provenance["step"]) == ("ucf101.ckpt", 1, 29999)
    assert "somebody" not in "".join(texts)
    config = json.loads(texts[0])["init_args"]
    assert config["encoder"]["init_args"]["norm"] == "batch"
    assert config["quantizer"]["init_args"]["restart_threshold"] == 0


@pytest.mark.parametrize(
    ("arguments", "threshold"), [({"no_random_restart": False, "restart_thres": 2.0}, 2.0), ({}, 0)]
)
def test_restarts_are_those_of_the_run(
    state: dict[str, Tensor], tmp_path: Path, arguments: dict[str, Any], threshold: float
) -> None:
    tokenizer, _, _ = import_tats_tokenizer(write(tmp_path / "a.ckpt", state, ARGUMENTS | arguments))
    assert tokenizer.quantizer.restart_threshold == threshold
    assert tokenizer.quantizer.released_restart
    assert tokenizer.quantizer.initialized


def test_missing_and_unexpected_tensors_are_all_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(state) | {"encoder.extra.weight": torch.zeros(1), "codebook.N": torch.zeros(23)}
    del changed["decoder.conv_last.conv.bias"], changed["encoder.final_block.0.running_var"]
    with pytest.raises(ValueError, match="does not fit") as error:
        import_tats_tokenizer(write(tmp_path / "a.ckpt", changed))
    for text in (
        "missing decoder.conv_last.conv.bias",
        "missing encoder.final_block.0.running_var",
        "unexpected encoder.extra.weight",
        "quantizer.N is (23,), expected (24,)",
    ):
        assert text in str(error.value)
    assert not (tmp_path / "bundle").exists()


def test_factors_are_never_guessed(state: dict[str, Tensor], tmp_path: Path) -> None:
    source = write(tmp_path / "a.ckpt", state, arguments=None)
    with pytest.raises(ValueError, match=r"does not say how much it downsamples: give --downsample.* 4 8 8"):
        main(["import-weights", str(source), str(tmp_path / "bundle")])
    main(["import-weights", str(source), str(tmp_path / "bundle"), "--downsample", "2", "8", "4"])
    assert load_tokenizer(tmp_path / "bundle").downsample == (2, 8, 4)
    assert json.loads((tmp_path / "bundle/provenance.json").read_text())["downsample_from"] == "--downsample"


def test_factors_that_need_other_stages_do_not_fit(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing encoder\.conv_blocks\.3"):
        import_tats_tokenizer(write(tmp_path / "a.ckpt", state), (4, 16, 16))


def test_borders_that_the_release_mixed_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"padding_type=constant.*only `replicate` can be imported"):
        import_tats_tokenizer(write(tmp_path / "a.ckpt", state, ARGUMENTS | {"padding_type": "constant"}))
    older = {name: value for name, value in ARGUMENTS.items() if name != "padding_type"}
    assert import_tats_tokenizer(write(tmp_path / "b.ckpt", state, older))[0].encoder.conv_first.padding == "replicate"


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no tokenizer of TATS"):
        import_tats_tokenizer(write(tmp_path / "a.ckpt", {"transformer.tok_emb.weight": torch.zeros(2, 2)}))
    (tmp_path / "b.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        import_tats_tokenizer(tmp_path / "b.ckpt")
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*c\.ckpt"):
        import_tats_tokenizer(tmp_path / "c.ckpt")


# What else such files hold


@pytest.fixture
def lightning_of_old(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Modules that pickled objects name, and that do not exist any more when they are read."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.argparse_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["pytorch_lightning.utilities.argparse_utils"]
    exec("def _gpus_arg_default(x): return x\nclass ModelCheckpoint: pass", module.__dict__)
    return module


def test_objects_of_libraries_that_are_gone_are_no_obstacle(
    state: dict[str, Tensor], tmp_path: Path, lightning_of_old: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = lightning_of_old.ModelCheckpoint
    arguments = ARGUMENTS | {"gpus": lightning_of_old._gpus_arg_default, "callback": callback()}
    source = write(tmp_path / "a.ckpt", state, arguments, callbacks={callback: {"best": 1}})
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    assert import_tats_tokenizer(source)[0].downsample == (4, 8, 8)
    checkpoint = read_foreign_checkpoint(source)
    assert isinstance(checkpoint["hyper_parameters"]["args"].state["callback"], Foreign)
    assert list(checkpoint["callbacks"].values()) == [{"best": 1}]


class Canary:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.reduced = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def canaries(nest: Path) -> list[Canary]:
    return [
        Canary(os.mkdir, str(nest)),  # torch refuses the module's name
        Canary(Path.touch, nest),
        Canary(exec, f"__import__('os').mkdir({str(nest)!r})"),
        Canary(subprocess.check_call, ["touch", str(nest)]),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "state_dict"])
def test_nothing_in_a_file_is_executed(state: dict[str, Tensor], tmp_path: Path, place: str, which: int) -> None:
    nest = tmp_path / "nest"
    content = {"x": canaries(nest)[which]} | (state if place == "state_dict" else {})
    source = write(tmp_path / "a.ckpt", state, **{place: content})
    with contextlib.suppress(ValueError):  # refused, or read with something inert in its place
        import_tats_tokenizer(source)
    assert not nest.exists()
    if which == 0:
        with pytest.raises(ValueError, match=r"asks for posix\.mkdir\. That could run any code: refused"):
            read_foreign_checkpoint(source)
    torch.load(source, weights_only=False)  # or the canary would be a dead one
    assert nest.exists()


def test_what_is_no_tensor_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(state) | {"codebook.N": argparse.Namespace(a=1)}
    with pytest.raises(ValueError, match=r"no tensor among its weights: quantizer\.N\."):
        import_tats_tokenizer(write(tmp_path / "a.ckpt", changed))
    torch.save([1, 2], tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="is no Lightning checkpoint: it holds no state_dict"):
        import_tats_tokenizer(tmp_path / "b.ckpt")
