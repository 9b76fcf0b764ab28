"""Muon: momentum made orthogonal for matrices, Adam for everything else (K. Jordan et al., 2024).

None of the papers has it. It reaches the same loss in a fraction of Adam's steps where a run lasts minutes, and that is
what the demos use it for. torch's own takes no convolutions and computes in bfloat16, which is slow on most CPUs.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Five steps of this polynomial bring all singular values near 1, not exactly: fast, and enough for a direction.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """Muon for the groups with `orthogonal: True`, AdamW for the others.

    A matrix `W` of momentum `M` moves by `lr * sqrt(max(1, rows / columns)) * UV^T`, where `M = U S V^T`. A
    convolution's kernel counts as the matrix `[out, in * k]`.

    Args:
        params: Parameters, or groups. `lr` of an orthogonal group is Muon's, about 0.02.
        lr: Learning rate of groups without one.
        betas: Of Adam. Muon's momentum is `momentum`.
        momentum: Nesterov momentum of the orthogonal groups.
        eps: Of Adam.
        weight_decay: Decoupled: a step takes `lr * weight_decay` of the weights away.

    Raises:
        ValueError: if an orthogonal group holds what is no matrix, or a part of one: that of a sharded model.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "orthogonal": False})
        for parameter in (p for group in self.param_groups if group["orthogonal"] for p in group["params"]):
            if parameter.ndim < 2 or isinstance(parameter, DTensor):
                raise ValueError(
                    f"Muon needs whole matrices, but one is a {type(parameter).__name__} of shape "
                    f"{list(parameter.shape)}: sharded training takes --model.muon_lr=0."
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    move = self._orthogonal if group["orthogonal"] else self._adam
                    move(parameter, parameter.grad, group)
        return loss

    def _orthogonal(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
        parameter.add_(orthogonalized(ahead).view_as(parameter), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"], state["mean_square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["mean_square"].lerp_(gradient.square(), 1 - beta2)
        step = state["step"].item()  # on the CPU: nothing waits
        spread = (state["mean_square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - beta1**step))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return about `U V^T` of a matrix `U S V^T`, by Newton-Schulz steps; in bfloat16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def matrices(network: nn.Module) -> list[Tensor]:
    """Return the weights of the Linear layers and convolutions that are trained: what Muon is made for."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [m.weight for m in network.modules() if isinstance(m, layers) and m.weight.requires_grad]


def split_groups(groups: list[dict[str, Any]], orthogonal: Iterable[Tensor], lr: float) -> list[dict[str, Any]]:
    """Take these parameters out of groups into orthogonal ones beside them, with this learning rate."""
    chosen = {id(parameter) for parameter in orthogonal}
    split: list[dict[str, Any]] = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in chosen]
        outside = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        split += [{**group, "params": outside}, {**group, "params": inside, "orthogonal": True, "lr": lr}]
    return [group for group in split if group["params"]]
