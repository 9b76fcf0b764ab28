"""Released priors of MeBT: files in their layout give the official numbers, and nothing in them is executed."""

import collections
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_import_tats import official_state
from torch import Tensor

from experiments.cli import main
from lightning_modules import MeBTModule
from models.import_mebt import import_mebt
from models.priors.decoding import ConfidenceDecoding, confidence_decode, revise
from models.priors.mebt import MeBT
from models.weights import load_prior, load_tokenizer, official_mebt_name

GoldenTensor = Callable[[str, tuple[int, ...], float], Tensor]
MODES = ["latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec"]
CODES = torch.tensor([[0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 0], [7, 10, 2, 5, 8, 0, 3, 6, 9, 1, 4, 7]])
ORDER = torch.tensor([[2, 7, 0, 5, 10, 3, 8, 1, 6, 11, 4, 9], [5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7, 0]])


@pytest.fixture
def omega(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Classes with the names and the pickled state of OmegaConf's, which is not installed."""
    modules = {name: ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.listconfig")}
    modules |= {name: ModuleType(name) for name in ("omegaconf.nodes", "omegaconf.base")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for module, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode")):
        exec(f"class {name}: pass", modules[f"omegaconf.{module}"].__dict__)
    exec("class ContainerMetadata: pass\nclass Metadata: pass", modules["omegaconf.base"].__dict__)
    return modules["omegaconf"]


def node(value: Any, parent: Any = None, key: Any = None) -> Any:
    """A value as OmegaConf would pickle it: with metadata that names types, and a way back to its parent."""
    kind = {dict: "dictconfig.DictConfig", list: "listconfig.ListConfig"}.get(type(value), "nodes.AnyNode")
    module, name = kind.split(".")
    made = getattr(sys.modules[f"omegaconf.{module}"], name)()
    metadata = sys.modules["omegaconf.base"].__dict__["ContainerMetadata" if name != "AnyNode" else "Metadata"]()
    metadata.__dict__ |= {
        "ref_type": typing.Any,
        "object_type": type(value),
        "optional": True,
        "key": key,
        "resolver_cache": collections.defaultdict(dict),
    }
    made.__dict__ |= {"_metadata": metadata, "_parent": parent}
    if isinstance(value, dict):
        made.__dict__["_content"] = {key: node(item, made, key) for key, item in value.items()}
    elif isinstance(value, list):
        made.__dict__["_content"] = [node(item, made, i) for i, item in enumerate(value)]
    else:
        made.__dict__["_val"] = value
    return made


def write(path: Path, golden_tensor: GoldenTensor, codebook_size: int = 11, **changes: Any) -> Path:
    """A released prior's file, of toy size; `changes` replace entries of the transformer's settings."""
    network = MeBT(codebook_size, 12, dim=16, num_heads=2, num_latents=3, blocks=MODES)
    state = {
        official_mebt_name(name): golden_tensor(official_mebt_name(name), tuple(value.shape), 2.0).float()
        for name, value in network.state_dict().items()
    }
    state |= {f"first_stage_model.{name}": tensor for name, tensor in official_state(golden_tensor).items()}
    settings = {"n_head": 2, "n_layer": 6, "n_embd": 16, "mode": MODES, "t_prior": "gaussian2", "resid_pdrop": 0.1}
    config = node(
        {
            "transformer_config": settings | changes,
            "mask_config": {"target": "mebt.mask_sampler.MaskGen", "params": {"shape": [3, 2, 2], "budget": 12}},
            "first_stage_config": {
                "params": {"ckpt_path": "/home/somebody/vqgan_sky_128_488_epoch=12-step=29999.ckpt"}
            },
            "data": {"data_path": "/home/somebody/sky"},
        }
    )
    names = ("transformer_config", "mask_config", "first_stage_config")
    content = {
        "global_step": 2_000_000,
        "pytorch-lightning_version": "1.7.5",
        "state_dict": state,
        "optimizer_states": [{"state": {}}],
        "hyper_parameters": {name: config._content[name] for name in names} | {"ckpt_path": None, "pkeep": 1.0},
    }
    torch.save(content, path)
    return path


def forget_omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        monkeypatch.delitem(sys.modules, name)


def test_an_official_prior_gives_the_official_logits_and_codes(
    golden_tensor: GoldenTensor, omega: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "sky.ckpt", golden_tensor)
    forget_omegaconf(monkeypatch)
    network = load_prior(source)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for num_context, num_targets, place, value, total in (
        (0, 12, (0, 0, 0), -0.85184403, 257.36461),
        (5, 7, (0, 0, 0), -0.82972123, 156.08168),
        (9, 2, (0, 0, 0), -0.36359885, 51.479978),
    ):
        logits = network(CODES, ORDER[:, :num_context], ORDER[:, 12 - num_targets :])
        assert logits[place].item() == pytest.approx(value, abs=1e-5)
        assert logits.abs().sum().item() == pytest.approx(total, abs=1e-3)
    positions = torch.arange(12).expand(2, -1)
    settings = ConfidenceDecoding(num_steps=4, choice_temperature=2.0)
    drawn = confidence_decode(
        network, CODES * 0, positions[:, :0], positions, settings, lambda shape: torch.ones(*shape)
    )
    assert drawn.tolist() == [[7, 9, 4, 4, 9, 4, 4, 4, 4, 4, 4, 9]] * 2
    revised = revise(
        network,
        CODES,
        positions[:, :0],
        positions,
        lambda shape: ORDER.argsort(1).float() if len(shape) == 2 else torch.ones(*shape),
        rounds=1,
        groups=3,
        temperature=0.7,
    )
    assert revised[0].tolist() == [10, 4, 10, 10, 7, 10, 7, 10, 10, 7, 10, 7]


def test_import_weights_makes_bundles_and_a_checkpoint_that_samples(
    golden_tensor: GoldenTensor,
    omega: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "sky.ckpt", golden_tensor, codebook_size=24)
    forget_omegaconf(monkeypatch)
    made = tmp_path / "sky"
    main(["import-weights", str(source), str(made)])
    out = capsys.readouterr().out
    assert "6 blocks, clips of 12 frames at 16 x 16" in out
    assert "24 codes of 4 x 8 x 8 pixels, the name vqgan_sky_128_488_epoch=12-step=29999.ckpt and the stored" in out
    provenance = json.loads((made / "provenance.json").read_text())
    assert (provenance["step"], provenance["latent_shape"]) == (2_000_000, [3, 2, 2])
    texts = [path.read_text() for path in made.rglob("*.json")]
    assert len(texts) == 4
    assert "somebody" not in "".join(texts)
    module = MeBTModule.load_from_checkpoint(made / "prior.ckpt", weights_only=True)
    network = load_prior(made)
    for name, tensor in network.state_dict().items():
        assert torch.equal(module.network.state_dict()[name], tensor)
    assert load_tokenizer(made / "tokenizer").downsample == (4, 8, 8)
    assert module.generate_codes(12, torch.tensor([1])).shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match="is no prior: expected a network"):
        load_prior(made / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"it holds no config\.json and no model\.safetensors"):
        load_prior(tmp_path)


def test_short_lists_of_blocks_are_filled_up_as_in_the_official_code(
    golden_tensor: GoldenTensor, omega: ModuleType, tmp_path: Path
) -> None:
    network, config, _ = import_mebt(write(tmp_path / "a.ckpt", golden_tensor, mode=MODES[:4]))
    assert network.kinds == (*MODES[:4], "maskgit", "maskgit")
    assert config["init_args"]["dropout"] == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": None}, "does not say mode in its hyper-parameters, which no shape tells"),
        ({"n_head": None, "n_layer": None}, "does not say n_head, n_layer in"),
        ({"mode": ["latent_enc", "juggling"]}, "blocks of unknown kinds: juggling"),
        ({"n_layer": 7}, "does not fit its configuration: missing blocks"),
    ],
)
def test_what_cannot_be_known_is_not_guessed(
    golden_tensor: GoldenTensor, omega: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_mebt(write(tmp_path / "a.ckpt", golden_tensor, **changes))
    torch.save({"state_dict": {"transformer.tok_emb.weight": torch.zeros(2, 2)}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"is no prior of MeBT: it holds no tok_emb\.weight"):
        import_mebt(tmp_path / "b.ckpt")
