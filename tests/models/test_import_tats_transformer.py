"""Released transformers of TATS: files in their layout give the official numbers, and say what they are."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.cli import main
from lightning_modules import TATSModule
from lightning_modules.tats import TATSCondition
from models.import_tats import import_tats_transformer
from models.priors.autoregressive import TokenFilter, continue_codes, fill_between
from models.priors.tats import TATS
from models.tokenizers import VQGAN3D, TimeAgnosticDecoder, TimeAgnosticEncoder, VectorQuantizer
from models.weights import official_tats_name

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]
GREEDY = TokenFilter(top_k=1)


def no_noise(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(*shape)


def tokenizer_state(golden: GoldenTensor, codes: int, downsample: tuple[int, int, int], channels: int = 3) -> dict:
    """All tensors of a tokenizer by their official names, and some that only its training needs."""
    tokenizer = VQGAN3D(
        TimeAgnosticEncoder(base_channels=2, downsample=downsample, in_channels=channels),
        VectorQuantizer(codes, 4),
        TimeAgnosticDecoder(base_channels=2, downsample=downsample, out_channels=channels),
    )
    names = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("quantizer.")}
    state = {name: golden(name, tuple(value.shape), 1.5).to(value.dtype) for name, value in names.items()}
    state["codebook.embeddings"] = golden("codebook.embeddings", (codes, 4), 2.0).float()
    state |= {"codebook.N": torch.ones(codes), "codebook.z_avg": state["codebook.embeddings"].clone()}
    state["image_discriminator.model0.0.weight"] = torch.zeros(4, 3, 4, 4)
    state["perceptual_model.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    return state


def released_file(
    path: Path,
    golden: GoldenTensor,
    grid: tuple[int, int, int],
    codes: int = 13,
    condition_size: int = 0,
    condition_length: int = 1,
    n_unmasked: int = 0,
    hearing: dict[str, Tensor] | None = None,
    block_size: int | None = None,
    downsample: tuple[int, int, int] = (4, 8, 8),
    arguments: dict[str, Any] | None = None,
    **hyper_parameters: Any,
) -> Path:
    """A checkpoint of exactly the official layout with the weights of the golden numbers."""
    mask = "closed_boundaries" if n_unmasked else "causal"
    sizes = {"condition_size": condition_size, "condition_length": condition_length, "block_size": block_size}
    network = TATS(codes, grid, dim=12, depth=2, num_heads=2, mask=mask, **sizes)
    state = {}
    for name, parameter in network.named_parameters():
        official = official_tats_name(name)
        state[official] = golden(official, tuple(parameter.shape), 2.0).float()
    for i in range(2):
        # the release's formula, not ours: visible iff column <= F, column >= block - F + 1, or causal in the middle
        row, column = torch.arange(network.block_size)[:, None], torch.arange(network.block_size)[None]
        visible = column <= row
        if n_unmasked:
            last = network.block_size - n_unmasked + 1
            visible = (column <= n_unmasked) | (column >= last) | (visible & (row < last))
            visible[: n_unmasked + 1, n_unmasked + 1 : last] = False
            visible[last:, n_unmasked + 1 : last] = False
        state[f"transformer.blocks.{i}.attn.mask"] = visible.float()[None, None]
    first = tokenizer_state(golden, codes, downsample)
    state |= {f"first_stage_model.{name}": tensor for name, tensor in first.items()}
    state |= {f"cond_stage_model.{name}": tensor for name, tensor in (hearing or {}).items()}
    stored = {"n_head": 2, "resolution": 8 * grid[1], "n_unmasked": n_unmasked, "data_path": "/home/somebody/sky"}
    content = {
        "epoch": 7,
        "global_step": 329_999,
        "pytorch-lightning_version": "1.5.4",
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "callbacks": {},
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "args": argparse.Namespace(**(stored if arguments is None else arguments)),
            "ckpt_path": None,
            "ignore_keys": [],
            "first_stage_key": "video",
            "cond_stage_key": "label",
            "pkeep": 1.0,
            "sos_token": 0,
        }
        | hyper_parameters,
    }
    torch.save(content, path)
    return path


TOKENS = (7 * torch.arange(2)[:, None] + 3 * torch.arange(15)) % 13  # [2, 15]


def test_a_released_base_model_has_the_official_logits(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    """K5: fifteen frames of one token."""
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (15, 1, 1))
    released = import_tats_transformer(path, (4, 8, 8))
    logits = released.network(TOKENS)
    assert logits.sum().item() == pytest.approx(6.1328334, abs=1e-4)
    assert logits.abs().sum().item() == pytest.approx(576.8631, abs=1e-3)
    places = [(0, 0, 0), (0, 7, 5), (0, 14, 12), (1, 0, 3), (1, 8, 9), (1, 14, 1)]
    expected = [1.2472641, 1.1167164, 2.0080796, 0.46617011, 1.1526748, -0.72295514]
    assert [logits[place].item() for place in places] == pytest.approx(expected, abs=1e-5)
    cache = released.network.new_cache()
    codes = continue_codes(released.network, TOKENS[:, :1], TOKENS[:, 1:3], 12, GREEDY, no_noise, cache)
    assert codes.tolist() == [[5, 7, 8, 4, 8, 4, 7, 10, 12, 7, 4, 4], [8, 5, 5, 12, 10, 9, 12, 10, 12, 7, 4, 8]]
    assert released.settings["mask"] == "causal"
    assert (released.settings["num_frames"], released.settings["num_classes"]) == (60, 0)
    assert released.tokenizers["tokenizer"][0].downsample == (4, 8, 8)


def test_the_interpolation_is_recognised_by_its_mask(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    """K6: five frames of 1 x 3 tokens; no option says what the model is."""
    path = released_file(
        tmp_path / "a.ckpt", golden_tensor, (5, 1, 3), n_unmasked=3, downsample=(4, 16, 8), arguments={"n_head": 2}
    )
    stored = torch.load(path, weights_only=False)["state_dict"]["transformer.blocks.1.attn.mask"]
    assert stored.sum() == 135
    released = import_tats_transformer(path, (4, 16, 8), resolution=24)
    assert torch.equal(released.network.attention_mask.float(), stored[0, 0])
    assert (released.settings["mask"], released.settings["num_frames"]) == ("closed_boundaries", 20)
    assert released.settings["released"]  # to go on training as it was trained
    logits = released.network(TOKENS)
    assert logits.sum().item() == pytest.approx(0.79586349, abs=1e-4)
    assert logits.abs().sum().item() == pytest.approx(628.81812, abs=1e-3)
    assert logits[1, 14, 1].item() == pytest.approx(-2.7957304, abs=1e-5)
    start, left, right = TOKENS[:, :1], TOKENS[:, 1:4], TOKENS[:, 12:]
    codes = fill_between(released.network, start, left, right, GREEDY, no_noise, released=True).flatten(1)
    assert codes.tolist() == [[5, 5, 7, 8, 12, 8, 8, 12, 8], [7, 4, 4, 7, 10, 7, 10, 12, 7]]


def test_a_released_class_model_has_the_official_logits(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    """K7."""
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (3, 2, 2), codes=9, condition_size=4)
    released = import_tats_transformer(path, (4, 8, 8))
    codes = (7 * torch.arange(2)[:, None] + 3 * torch.arange(12)) % 9
    logits = released.network.code_logits(codes, torch.tensor([[2], [1]]))
    assert logits.sum().item() == pytest.approx(-20.012118, abs=1e-4)
    assert logits[1, 5, 6].item() == pytest.approx(-1.4021528, abs=1e-5)
    assert released.settings["num_classes"] == 4


def test_key_frames_come_from_a_longer_clip(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    options = {"n_head": 2, "resolution": 16, "sample_every_n_latent_frames": 4, "sequence_length": 64}
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (4, 2, 2), arguments=options)
    settings = import_tats_transformer(path, (4, 8, 8)).settings
    assert (settings["latent_stride"], settings["num_frames"]) == (4, 64)


def test_a_text_model_has_room_to_spare(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    path = released_file(
        tmp_path / "a.ckpt", golden_tensor, (4, 2, 2), condition_size=300, condition_length=256, block_size=272,
        cond_stage_key="text",
    )  # fmt: skip
    settings = import_tats_transformer(path, (4, 8, 8)).settings
    assert (settings["text_length"], settings["text_vocabulary"], settings["num_classes"]) == (256, 300, 0)
    assert (settings["block_size"], settings["num_frames"]) == (272, 16)


def test_a_model_that_hears_brings_two_tokenizers(
    golden_tensor: GoldenTensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hearing = tokenizer_state(golden_tensor, 11, (4, 16, 8), channels=1)
    path = released_file(
        tmp_path / "a.ckpt", golden_tensor, (4, 2, 2), condition_size=11, condition_length=4 * 4 * 2, hearing=hearing,
        cond_stage_key="stft",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"hears: give what a code of its sound covers.*--audio_downsample"):
        import_tats_transformer(path, (4, 8, 8))
    folder = tmp_path / "drums"
    words = ["import-weights", str(path), str(folder), "--downsample", "4", "8", "8"]
    main([*words, "--audio_downsample", "4", "16", "8"])
    assert "sound, clips of 16 frames at 16 x 16" in capsys.readouterr().out
    module = TATSModule.load_from_checkpoint(folder / "prior.ckpt", weights_only=True)
    audio = torch.zeros(1, 1, 16, 64, 16)
    assert module.condition_of(TATSCondition(audio=audio), 1).shape == (1, 32)


def test_a_released_file_becomes_what_sample_takes(
    golden_tensor: GoldenTensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (4, 4, 4), condition_size=4)
    main(["import-weights", str(path), "weights/ucf", "--downsample", "4", "8", "8"])
    texts = Path("weights/ucf/tokenizer/provenance.json").read_text()
    assert "somebody" not in texts
    flags = {"dim": 12, "depth": 2, "num_heads": 2, "codebook_size": 13, "num_classes": 4, "block_size": 64}
    words = [f"--model.{name}={value}" for name, value in flags.items()]
    common = ["--data=MovingShapesDataModule", "--data.num_frames=16", "--data.resolution=32", "--model=TATSModule"]
    place = ["--model.tokenizer=weights/ucf/tokenizer", "--ckpt_path=weights/ucf/prior.ckpt", "--out=made"]
    main(["sample", *common, *words, *place, "--num_samples=1", "--trainer.accelerator=cpu", "--label=3"])
    assert Path("made/seed=000000.mp4").is_file()
    with pytest.raises(FileExistsError, match="exists already"):
        main(["import-weights", str(path), "weights/ucf", "--downsample", "4", "8", "8"])


def test_what_no_shape_tells_is_asked_for(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (4, 2, 2), arguments={})
    with pytest.raises(ValueError, match=r"how much its tokenizer downsamples: give --downsample, .*4 8 8"):
        import_tats_transformer(path)
    with pytest.raises(ValueError, match="does not say its resolution, and no shape tells: give --resolution"):
        import_tats_transformer(path, (4, 8, 8))
    with pytest.raises(ValueError, match="does not say its num_heads"):
        import_tats_transformer(path, (4, 8, 8), resolution=16)
    assert import_tats_transformer(path, (4, 8, 8), resolution=16, num_heads=2).network.num_frames == 4


def test_masks_and_weights_that_do_not_fit_are_refused(golden_tensor: GoldenTensor, tmp_path: Path) -> None:
    path = released_file(tmp_path / "a.ckpt", golden_tensor, (5, 2, 2), n_unmasked=4)
    content = torch.load(path, weights_only=False)
    content["state_dict"]["transformer.blocks.1.attn.mask"][0, 0, 9, 3] = 0
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="masks that are neither causal nor those of the interpolation"):
        import_tats_transformer(tmp_path / "b.ckpt", (4, 8, 8))
    content = torch.load(path, weights_only=False)
    del content["state_dict"]["transformer.blocks.0.ln1.bias"]
    torch.save(content, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="does not fit its configuration: missing"):
        import_tats_transformer(tmp_path / "c.ckpt", (4, 8, 8))
    with pytest.raises(ValueError, match="has 20 positions, too few for a latent frame of 32 x 32"):
        import_tats_transformer(path, (4, 8, 8), resolution=256)
