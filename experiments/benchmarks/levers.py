"""What each switch for speed and memory does to a training step of a small MeBT: time, and what autograd keeps.

Every lever is a line in an experiment's file: `trainer: {precision: bf16-mixed, accumulate_grad_batches: 2}`, `levers:
{recompute_blocks: true, compile_blocks: true, fused_optimizer: true}`. Measured on the device that there is.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.levers import recompute
from experiments.benchmarks.report import Measurement, seconds_of
from models.priors.mebt import PUBLISHED_STACK, MeBT
from models.random import keyed_generator


def run(quick: bool) -> list[Measurement]:
    """Measure each lever against the plain step."""
    dim, tokens, least_seconds = (32, 64, 0.05) if quick else (256, 2048, 3.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Measurement] = []
    plain: tuple[float, float] | None = None
    for name, options in (
        ("plain", {}),
        ("bf16-mixed", {"bf16": True}),
        ("gradient checkpointing", {"checkpointing": True}),
        ("torch.compile of the blocks", {"compiled": True}),
        ("fused optimizer", {"fused": True}),
        ("two accumulated halves", {"halves": True}),
    ):
        seconds, kept = measured(dim, tokens, device, least_seconds, **options)
        plain = plain or (seconds, kept)
        details = {"seconds": seconds, "kept_bytes": kept}
        rows.append(Measurement(f"{name}: step time / plain", seconds / plain[0], "x", details=details))
        rows.append(Measurement(f"{name}: kept for backward / plain", kept / plain[1], "x"))
    return rows


def measured(
    dim: int,
    tokens: int,
    device: str,
    least_seconds: float,
    bf16: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    fused: bool = False,
    halves: bool = False,
) -> tuple[float, float]:
    """Seconds of a step, and bytes that autograd keeps in it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MeBT(1024, tokens, dim, 4, 64, PUBLISHED_STACK[10:16]).to(device)
    for block in network.blocks:
        if compiled:
            block.compile(dynamic=True)
        if checkpointing:
            recompute(block)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused)
    codes = torch.randint(1024, (4, tokens), generator=keyed_generator(0)).to(device)
    order = torch.rand(4, tokens, generator=keyed_generator(1)).argsort(1).to(device)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(hooks: Any = None) -> None:
        rows = [slice(0, 2), slice(2, 4)] if halves else [slice(0, 4)]
        for part in rows:
            context, targets = order[part].tensor_split(2, dim=1)
            kept.clear()
            with torch.autocast(device, torch.bfloat16, enabled=bf16), hooks or contextlib.nullcontext():
                logits = network(codes[part], context, targets)
                loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), codes[part].gather(1, targets))
            (loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    step(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
    size = float(sum(kept.values()))
    return seconds_of(step, least_seconds), size
