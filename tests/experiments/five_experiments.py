"""A tiny experiment of each of the five modules, and how to compare what came of them."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tiny_experiments import EVERY_RUN, MEBT_MODULE, TOKENIZER_MODULE, make_bundle, write_experiment

from models.weights import build, save_bundle

CONTINUOUS = {
    "class_path": "models.tokenizers.VQGAN3D",
    "init_args": {
        "encoder": {
            "class_path": "models.tokenizers.CausalEncoder",
            "init_args": {"base_channels": 4, "norm_groups": 2, "num_res_blocks": 1},
        },
        "quantizer": {"class_path": "models.tokenizers.ContinuousLatents", "init_args": {"dim": 4}},
        "decoder": {
            "class_path": "models.tokenizers.CausalDecoder",
            "init_args": {"latent_dim": 4, "base_channels": 4, "norm_groups": 2, "num_res_blocks": 1},
        },
    },
}
SMALL = {"codebook_size": 16, "dim": 16, "depth": 2, "num_heads": 2, "warmup_steps": 2, "lr": 1e-3}
MODULES: dict[str, dict[str, Any]] = {
    "tokenizer": TOKENIZER_MODULE,
    "mebt": MEBT_MODULE,
    "tats": {"class_path": "TATSModule", "init_args": {**SMALL, "num_classes": 12}},
    "commit": {
        "class_path": "COMMITModule",
        "init_args": {
            **SMALL,
            "tasks": ["class_conditional", "frame_prediction"],
            "num_classes": 12,
            "sampling": {"num_steps": 2},
        },
    },
    "walt": {
        "class_path": "WALTModule",
        "init_args": {
            "latent_dim": 4,
            "depth": 2,
            "dim": 16,
            "num_heads": 2,
            "spatiotemporal_window": [2, 2],
            "num_classes": 12,
            "frame_prediction": 0.5,
            "warmup_steps": 2,
            "lr": 1e-3,
            "statistics_clips": 4,
            "sampling": {"num_steps": 2},
        },
    },
}
CURRICULUM = {"mebt": {"schedule": "fraction", "full_length_from": 0.8}}
AVERAGED = ("tokenizer", "walt")


def write_five_experiments(folder: Path) -> None:
    """Write `<name>.yaml` for all of `MODULES`, and the two tokenizers that they are trained on."""
    make_bundle(folder / "discrete")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_bundle(folder / "continuous", build(CONTINUOUS), CONTINUOUS, {"source": "a test"})
    for name, module in MODULES.items():
        module = copy.deepcopy(module)
        data = copy.deepcopy(EVERY_RUN["data"])
        if name == "walt":
            data["init_args"]["num_frames"] = 9
        if name != "tokenizer":
            module["init_args"]["tokenizer"] = str(folder / ("continuous" if name == "walt" else "discrete"))
        write_experiment(
            folder / f"{name}.yaml",
            EVERY_RUN,
            data=data,
            model=module,
            curriculum=CURRICULUM.get(name, {"schedule": "longest"}),
            ema={"decay": 0.5 if name in AVERAGED else 0.0},
            samples={"at_validation": False},
        )


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ in a bit.

    Left out is what depends on the folder, how the data is loaded, and Lightning's counters, which also
    count how often it began.
    """
    if any(word in path for word in ("Checkpoint{", "['loops']", "['config']", "['datamodule_hyper_parameters']")):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys {one.keys() ^ other.keys()}"]
        return [line for key in one for line in differences(one[key], other[key], f"{path}[{key!r}]")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [path]
    return [] if one == other else [f"{path}: {one} and {other}"]


def last_ledger(run: Path) -> list[list[Any]]:
    """What each step was trained on: of a step that was done more than once, the last time."""
    entries = [json.loads(line) for line in (run / "ledger.0.jsonl").read_text().splitlines()]
    return list({entry[0]: entry for entry in entries}.values())
