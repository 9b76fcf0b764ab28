"""The plan's FLOPs and bytes are those of the training step that it stands for."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from five_experiments import MODULES, write_five_experiments
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from experiments.cli import ROOT, main
from experiments.lightning_cli import parsed
from experiments.plan import make_plan


class Meter(Callback):
    """Counts the FLOPs of the last training step, and the bytes that autograd keeps in it; optimizers cost none."""

    flops = 0.0
    saved: ClassVar[dict[int, tuple[Any, int]]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        own = {t.untyped_storage()._cdata for t in (*pl_module.parameters(), *pl_module.buffers())}
        saved = Meter.saved = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = (storage, storage.nbytes())
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()
        self.hooks.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks = None

    def on_train_batch_end(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        Meter.flops = self.counter.get_total_flops()


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    write_five_experiments(folder)
    return folder


# one mask ratio, one task, no passes by chance: the plan gives means
SETTLED = {
    "tokenizer": ["--model.discriminator_start_step=0"],
    "mebt": ["--curriculum.schedule=longest"],
    "tats": [],
    "commit": ["--model.tasks=[class_conditional]"],
    "walt": ["--model.self_conditioning=0"],
}


@pytest.mark.parametrize("name", MODULES)
def test_the_plan_says_what_a_step_costs(
    name: str, five: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", f"--config={five / name}.yaml", *SETTLED[name]]
    plan = make_plan(parsed(words), gpus=1)
    if name == "mebt":  # half of the tokens masked, as the plan has it
        monkeypatch.setattr("lightning_modules.mebt.num_masked_tokens", lambda schedule, tau, count: count // 2)
    steps = 2 if name != "tokenizer" else 3  # the first one makes the codebook
    main(
        [
            *words,
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks+=test_plan.Meter",
        ]
    )
    flops = plan.training_flops + plan.tokenizer_flops
    assert flops == pytest.approx(Meter.flops, rel=0.01)
    assert plan.activation_bytes == pytest.approx(sum(size for _, size in Meter.saved.values()), rel=0.15)


def test_a_page_and_json(five: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"--config={five / 'tats.yaml'}", "--gpus=4", "--clips=1000", "--tflops=100", "--mfu=0.5"]
    main(words)
    page = capsys.readouterr().out
    assert "tats on 4 GPUs, 2 clips a step on each, 8 together" in page
    assert "sharded over 4" in page
    main([*words, "--json"])
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["step_seconds"] == pytest.approx((plan["training_flops"] + plan["tokenizer_flops"]) / 50e12)
    assert plan["gpu_hours"] == pytest.approx(plan["steps"] * plan["step_seconds"] * 4 / 3600)
    trained = sum(plan["parts"].values())
    assert plan["state_bytes"]["one"] == 16 * trained
    assert plan["token_cache_bytes"] == 1000 * plan["tokens"]  # 16 codes: a byte each
    with pytest.raises(SystemExit):
        main(["plan"])


@pytest.mark.slow
def test_sound_is_planned_as_spectrograms_of_one_channel() -> None:
    plan = make_plan(parsed(["fit", f"--config={ROOT / 'experiments/vqgan3d_stft.yaml'}"]), gpus=1)
    assert plan.tokens == 4 * 8 * 2
    assert sum(plan.parts.values()) == 37_461_187
