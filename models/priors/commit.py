"""COMMIT, MAGVIT's prior: a bidirectional transformer under a conditional multivariate mask.

Yu et al.: "MAGVIT: Masked Generative Video Transformer", CVPR 2023. The transformer reads [task, class, video tokens]
and predicts every clean video token. Its input is corrupted in two ways: where the condition says something (see
`tasks.py`), a token is replaced by the condition's, elsewhere by a mask token. So a condition is refined rather than
copied: the tokenizer looks at whole clips, and the true tokens of the visible part would give the rest away.

Training and decoding start from the same `multivariate_mask`. Decoding ends when every token, those of the condition
included, has been drawn from the model once.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.attention import Attention
from models.priors.decoding import MaskSchedule, Noise, filtered_probabilities, mask_ratio, pick

COMMITSchedule = MaskSchedule | Literal["exp", "log"]

# What a position of the corrupted input holds, which names the part of the loss that it belongs to.
RECONSTRUCT, MASK, REFINE = 0, 1, 2
LOSS_PARTS = {"reconstruct": RECONSTRUCT, "mask": MASK, "refine": REFINE}

# Rows of the release's embedding beyond codes and classes: the mask, and room for prompts in a multi-task model.
MAX_PROMPTS = 15


# The transformer


class COMMITBlock(nn.Module):
    """A post-norm transformer layer, as BERT's.

    Args:
        dim: Width `D`.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP as a multiple of `dim`.
        dropout: Dropout of attention weights, attention output and MLP output.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * dim, dim),
            nn.Dropout(dropout),
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`."""
        x = self.norm1(x + self.attention(x, x))
        return self.norm2(x + self.mlp(x))


class COMMIT(nn.Module):
    """Logits of all video tokens, from a corrupted sequence of them (MAGVIT, section 3.2 and table 8).

    One embedding holds, in this order: codes, classes, "no class", prompts, and the mask as its last row. It is the
    output layer too. Sequences are `[prompt, class, tokens]`, or `[class, tokens]` in a model of a single task.

    Args:
        codebook_size: Number of video codes `K`, and of classes per token.
        num_tokens: Video tokens `N`.
        num_classes: Classes of the data; 0 for none.
        num_prompts: Rows for task prompts: 0 makes sequences without a prompt.
        dim: Width `D`.
        depth: Layers.
        num_heads: Attention heads.
        dropout: Dropout of embeddings, attention and MLPs.
        init_std: Standard deviation of the initial weights and embeddings, which are cut at twice that.
    """

    def __init__(
        self,
        codebook_size: int,
        num_tokens: int,
        num_classes: int = 0,
        num_prompts: int = 0,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        dropout: float = 0.1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.num_classes = num_classes
        self.num_prompts = num_prompts
        self.vocabulary_size = codebook_size + num_classes + 1 + num_prompts + 1
        self.prefix_length = 2 if num_prompts else 1
        self.token_embedding = nn.Embedding(self.vocabulary_size, dim)
        self.position_embedding = nn.Parameter(torch.empty(1, self.prefix_length + num_tokens, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(COMMITBlock(dim, num_heads, dropout=dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.LayerNorm(dim, eps=1e-12))
        self.head_bias = nn.Parameter(torch.zeros(self.vocabulary_size))
        self.reset_parameters(init_std)

    @property
    def mask_id(self) -> int:
        """Token that stands for an unknown code."""
        return self.vocabulary_size - 1

    def reset_parameters(self, init_std: float) -> None:
        """Initialise: truncated normal weights and embeddings, zero biases, LayerNorm (1, 0)."""

        def truncated_normal(tensor: Tensor) -> None:
            nn.init.trunc_normal_(tensor, std=init_std, a=-2 * init_std, b=2 * init_std)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                truncated_normal(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        truncated_normal(self.position_embedding)

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Parameters under weight decay: the weights of Linear layers, and nothing else."""
        names = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return [parameter for name, parameter in self.named_parameters() if name in names]

    def prefix(self, label: Tensor | None, prompt: int, batch_size: int) -> Tensor:
        """Tokens before the video.

        Args:
            label: `[B]` int64 classes; None is "no class".
            prompt: Which task's; not read in a model without prompts.
            batch_size: `B`.

        Returns:
            `[B, 2]` or, without prompts, `[B, 1]` int64.
        """
        device = self.position_embedding.device
        no_class = torch.full((batch_size,), self.num_classes, device=device)
        tokens = [self.codebook_size + (no_class if label is None else label)]
        if self.num_prompts:
            tokens.insert(0, torch.full_like(no_class, self.codebook_size + self.num_classes + 1 + prompt))
        return torch.stack(tokens, dim=1)

    def forward(self, tokens: Tensor, label: Tensor | None = None, prompt: int = 0) -> Tensor:
        """Predict the clean codes at all positions.

        Args:
            tokens: `[B, N]` int64, codes or `mask_id`.
            label: `[B]` int64 classes; None is "no class".
            prompt: Which task's; not read in a model without prompts.

        Returns:
            `[B, N, K]` logits.
        """
        sequence = torch.cat([self.prefix(label, prompt, len(tokens)), tokens], dim=1)  # [B, S]
        x = self.token_embedding(sequence) + self.position_embedding  # [B, S, D]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        x = self.head(x[:, self.prefix_length :])  # [B, N, D]
        # Neither prefix nor mask can be predicted: logits of codes alone.
        return F.linear(x, self.token_embedding.weight[: self.codebook_size], self.head_bias[: self.codebook_size])


# The mask


def masked_fraction(schedule: COMMITSchedule, u: float, num_tokens: int) -> float:
    """Fraction of tokens corrupted at progress `u` in [0, 1], within [1e-6, 1]: 1 at the start, next to 0 at the end.

    The paper's names: `linear` is its uniform schedule; `exp` is `1 - 2^(-log2(N)(1 - u))`, `log` `-log2(u) / log2(N)`.
    """
    if schedule == "exp":
        fraction = 1.0 - 2.0 ** (-math.log2(num_tokens) * (1.0 - u))
    elif schedule == "log":
        fraction = -math.log2(max(u, 1e-6)) / math.log2(num_tokens)
    else:
        fraction = mask_ratio(schedule, u)
    return min(1.0, max(1e-6, fraction))


def num_corrupted_tokens(schedule: COMMITSchedule, u: float, num_tokens: int) -> int:
    """Tokens corrupted at progress `u`: the fraction of all tokens, rounded down as the release does, at least one."""
    return max(1, math.floor(masked_fraction(schedule, u, num_tokens) * num_tokens))


def multivariate_mask(
    codes: Tensor, condition_codes: Tensor, is_condition: Tensor, scores: Tensor, num_corrupted: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """COMMIT's corruption (MAGVIT, Eq. 4): the tokens of the lowest scores become condition tokens or masks.

    Args:
        codes: `[B, N]` clean codes.
        condition_codes: `[B, N]` codes of the padded video; not read where there is no condition.
        is_condition: `[N]` or `[B, N]` bool: tokens that carry a condition (the paper's `ispad` is the complement).
        scores: `[B, N]`, any order is a mask: i.i.d. uniform in training.
        num_corrupted: `[B]` int64: exactly so many tokens are corrupted, whatever ties there are.
        mask_id: The mask token.

    Returns:
        The corrupted tokens and what they are (`RECONSTRUCT`, `MASK` or `REFINE`), each `[B, N]` int64.
    """
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    is_corrupted = rank < num_corrupted[:, None]
    replacement = condition_codes.where(is_condition, mask_id)
    kinds = torch.where(is_condition, REFINE, MASK) * is_corrupted
    return replacement.where(is_corrupted, codes), kinds


def commit_loss(nll: Tensor, kinds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The three parts of COMMIT's objective (MAGVIT, Eq. 5) with equal weight on each token.

    Args:
        nll: `[B, N]` cross-entropy of each clean token.
        kinds: `[B, N]` what the input held there, see `multivariate_mask`.

    Returns:
        The loss, nats per token, and what refining, masking and reconstruction contribute: they add up to it.
    """
    parts = {name: (nll * (kinds == kind)).mean() for name, kind in LOSS_PARTS.items()}
    return nll.mean(), parts


# Decoding


@dataclass(frozen=True)
class COMMITDecoding:
    """Settings of COMMIT's decoding (MAGVIT, algorithm 1 and appendix B.3).

    Args:
        num_steps: Network calls.
        schedule: How many tokens stay open along the steps; `linear` is the paper's uniform one.
        choice_temperature: Scale of the Gumbel noise in the choice of what to keep, at the start; it falls to 0.
        temperature: Divides the logits.
        top_k: Draw from the k most likely codes; null draws from all.
        top_p: Draw from the smallest set of codes that reaches this probability; null draws from all.
        paste_known: Whether the known pixels replace what was generated at their place; published numbers do not.
    """

    num_steps: int = 12
    schedule: COMMITSchedule = "cosine"
    choice_temperature: float = 4.5
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    paste_known: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1 (--model.sampling.num_steps).")


@torch.no_grad()
def commit_decode(
    network: COMMIT,
    condition_codes: Tensor,
    is_condition: Tensor,
    settings: COMMITDecoding,
    noise: Noise,
    label: Tensor | None = None,
    prompt: int = 0,
) -> Tensor:
    """Draw a video's codes (MAGVIT, algorithm 1).

    All tokens are open at first: condition tokens where there is a condition, masks elsewhere. Each step draws every
    open token; those of the highest `log p + c Gumbel` are closed with the code just drawn, the others go back to what
    they were at first. A closed token never changes, and at the end all have been drawn, the condition's too.

    Args:
        network: The transformer.
        condition_codes: `[B, N]` codes of the padded video; not read where there is no condition.
        is_condition: `[N]` bool.
        settings: Steps, schedule, temperatures and filters.
        noise: Draws of `Exp(1)`, called with a shape.
        label: `[B]` int64 classes; None is "no class".
        prompt: Which task's.

    Returns:
        `[B, N]` int64 in `[0, K)`.
    """
    num_tokens = condition_codes.shape[1]
    start = condition_codes.where(is_condition, network.mask_id)
    tokens, is_open, num_open = start, torch.ones_like(start, dtype=torch.bool), num_tokens
    for step in range(1, settings.num_steps + 1):
        u = step / settings.num_steps
        logits = network(tokens, label, prompt).float()  # [B, N, K]
        probabilities = filtered_probabilities(logits, settings.temperature, settings.top_k, settings.top_p)
        drawn = pick(probabilities, noise(probabilities.shape))[0].where(is_open, tokens)  # [B, N]
        num_open = min(num_corrupted_tokens(settings.schedule, u, num_tokens), num_open - 1)
        if step == settings.num_steps or num_open == 0:
            break
        confidence = logits.log_softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
        # in logs: a temperature of 400 has no power in float32
        gumbel = -noise(confidence.shape).clamp_min(torch.finfo(torch.float32).tiny).log()
        scores = (confidence + settings.choice_temperature * (1.0 - u) * gumbel).where(is_open, torch.inf)
        count = torch.full((len(drawn),), num_open, device=drawn.device)
        tokens, kinds = multivariate_mask(drawn, condition_codes, is_condition, scores, count, network.mask_id)
        is_open = kinds != RECONSTRUCT
    return drawn
