"""COMMIT, MAGVIT's prior: a bidirectional transformer under a conditional multivariate mask.

Yu et al.: "MAGVIT: Masked Generative Video Transformer", CVPR 2023. The transformer reads [task, class, video tokens]
and predicts every clean video token. Its input is corrupted in two ways: where the condition says something (see
`tasks.py`), a token is replaced by the condition's, elsewhere by a mask token. So a condition is refined rather than
copied: the tokenizer looks at whole clips, and the true tokens of the visible part would give the rest away.

Training and decoding hide tokens in the same way. Decoding ends when every token, those of the condition
included, has been drawn from the model once.

The paper compares with two other ways to give a condition (its table 5), which are here too: `latent` masking keeps the
known tokens and asks for the others only, as MaskGIT does; a `prefix` puts them before a fully masked sequence.

A large vocabulary is taken apart (MAGVIT-v2): a code of 18 bits is two parts of 9, whose embeddings are added up and
which have an output layer each. Masking acts on whole tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.attention import Attention
from models.priors.decoding import MaskSchedule, Noise, filtered_probabilities, mask_ratio, pick

COMMITSchedule = MaskSchedule | Literal["exp", "log"]
Masking = Literal["multivariate", "latent", "prefix"]
LossPart = Literal["reconstruct", "mask", "refine"]

# What a position of the corrupted input holds, which names the part of the loss that it belongs to. Known tokens under
# latent masking belong to none.
RECONSTRUCT, MASK, REFINE, GIVEN = 0, 1, 2, 3
LOSS_PARTS: dict[LossPart, int] = {"reconstruct": RECONSTRUCT, "mask": MASK, "refine": REFINE}

# Rows of the release's embedding beyond codes and classes: the mask, and room for prompts in a multi-task model.
MAX_PROMPTS = 15


# Codes in parts


def split_codes(codes: Tensor, groups: int, size: int) -> Tensor:
    """Take codes `[...]` apart into parts in `[0, size)`, the least significant first: `[..., groups]`."""
    powers = size ** torch.arange(groups, device=codes.device)
    return codes[..., None] // powers % size


def join_codes(parts: Tensor, size: int) -> Tensor:
    """Put parts `[..., groups]` in `[0, size)` together to codes `[...]`."""
    return (parts * size ** torch.arange(parts.shape[-1], device=parts.device)).sum(-1)


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

    One embedding holds, in this order: codes (or their parts, group by group), classes, "no class", prompts, and the
    mask as its last row. It is the output layer too. Sequences are `[prompt, class, tokens]`, or `[class, tokens]` in a
    model of a single task; under `prefix` masking the tokens of the condition stand between class and tokens.

    Token ids are those of an embedding with one row a code, whatever it is made of: codes are in `[0, K)`.

    Args:
        codebook_size: Number of video codes `K`.
        num_tokens: Video tokens `N`.
        num_classes: Classes of the data; 0 for none.
        num_prompts: Rows for task prompts: 0 makes sequences without a prompt.
        dim: Width `D`.
        depth: Layers.
        num_heads: Attention heads.
        dropout: Dropout of embeddings, attention and MLPs.
        init_std: Standard deviation of the initial weights and embeddings, which are cut at twice that.
        token_groups: Parts `G` of a code, each in `[0, V)` with `V^G = K`.
        masking: How a condition is given: to be refined (the paper's), to be kept, or before the tokens.

    Raises:
        ValueError: If the codes cannot be taken apart evenly.
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
        token_groups: int = 1,
        masking: Masking = "multivariate",
    ) -> None:
        super().__init__()
        self.part_size = round(codebook_size ** (1 / token_groups))
        if self.part_size**token_groups != codebook_size:
            raise ValueError(
                f"token_groups={token_groups} does not divide the bits of codebook_size={codebook_size}: expected V ** "
                "token_groups codes (--model.token_groups)."
            )
        self.codebook_size = codebook_size
        self.token_groups = token_groups
        self.num_tokens = num_tokens
        self.num_classes = num_classes
        self.num_prompts = num_prompts
        self.masking = masking
        self.vocabulary_size = token_groups * self.part_size + num_classes + 1 + num_prompts + 1
        self.prefix_length = 2 if num_prompts else 1
        self.token_embedding = nn.Embedding(self.vocabulary_size, dim)
        self.position_embedding = nn.Parameter(torch.empty(1, self.prefix_length + num_tokens, dim))
        if masking == "prefix":
            self.condition_position_embedding = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(COMMITBlock(dim, num_heads, dropout=dropout) for _ in range(depth))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.LayerNorm(dim, eps=1e-12))
            for _ in range(token_groups)
        )
        self.head_bias = nn.Parameter(torch.zeros(self.vocabulary_size))
        self.reset_parameters(init_std)

    @property
    def mask_id(self) -> int:
        """Token that stands for an unknown code."""
        return self.codebook_size + self.num_classes + 1 + self.num_prompts

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
        if self.masking == "prefix":
            truncated_normal(self.condition_position_embedding)

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

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids `[B, S]`, codes as the sum of their parts: `[B, S, D]`."""
        if self.token_groups == 1:
            return self.token_embedding(tokens)
        first_special = self.token_groups * self.part_size
        is_code = tokens < self.codebook_size
        parts = split_codes(tokens, self.token_groups, self.part_size)
        parts = parts + torch.arange(self.token_groups, device=tokens.device) * self.part_size  # [B, S, G] rows
        rows = torch.where(is_code[..., None], parts, (tokens - self.codebook_size + first_special)[..., None])
        embedded = self.token_embedding(rows)  # [B, S, G, D]
        return torch.where(is_code[..., None], embedded.sum(dim=2), embedded[:, :, 0])

    def forward(
        self, tokens: Tensor, label: Tensor | None = None, prompt: int = 0, condition: Tensor | None = None
    ) -> Tensor:
        """Predict the clean codes at all positions.

        Args:
            tokens: `[B, N]` int64, codes or `mask_id`.
            label: `[B]` int64 classes, or their number for "no class", which None is for all.
            prompt: Which task's; not read in a model without prompts.
            condition: `[B, N]` codes that are known and `mask_id` elsewhere, only under `prefix` masking.

        Returns:
            `[B, N, G, V]` logits of the codes' parts; `[B, N, 1, K]` for codes of one part.
        """
        x = self.embed(torch.cat([self.prefix(label, prompt, len(tokens)), tokens], dim=1))
        x = x + self.position_embedding  # [B, S, D]
        if condition is not None:
            known = (condition != self.mask_id).any(dim=0).nonzero()[:, 0]  # waits for the device: lengths differ
            before = self.embed(condition[:, known]) + self.condition_position_embedding[:, known]
            x = torch.cat([before, x], dim=1)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        x = x[:, -self.num_tokens :]  # [B, N, D]
        # Neither prefix nor mask can be predicted: logits of codes alone.
        size = self.part_size
        logits = [
            F.linear(head(x), self.token_embedding.weight[i : i + size], self.head_bias[i : i + size])
            for i, head in zip(range(0, self.token_groups * size, size), self.heads, strict=True)
        ]
        return torch.stack(logits, dim=2)

    def nll(self, logits: Tensor, codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of codes `[B, N]` under logits `[B, N, G, V]`, the sum over their parts: `[B, N]` nats.

        Args:
            logits: What `forward` returns, any floating type; computed in float32.
            codes: Clean codes.
            label_smoothing: Share of a part's target that is spread over all its values.
        """
        parts = split_codes(codes, self.token_groups, self.part_size)  # [B, N, G]
        nll = F.cross_entropy(
            logits.float().flatten(0, 2), parts.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return nll.view(parts.shape).sum(dim=2)


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


def lowest(scores: Tensor, count: Tensor) -> Tensor:
    """Which of the scores `[B, N]` are the `count` `[B]` lowest: exactly so many, whatever ties there are."""
    order = scores.argsort(dim=1, stable=True)
    is_lowest = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    return torch.empty_like(is_lowest).scatter(1, order, is_lowest)


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
    is_corrupted = lowest(scores, num_corrupted)
    replacement = condition_codes.where(is_condition, mask_id)
    kinds = torch.where(is_condition, REFINE, MASK) * is_corrupted
    return replacement.where(is_corrupted, codes), kinds


def latent_mask(
    codes: Tensor, is_condition: Tensor, scores: Tensor, num_corrupted: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """MaskGIT's masking, for comparison: known tokens are kept, and a share of the others is masked.

    In training the known tokens are the true ones, which are not there when it matters: the tokenizer has seen the rest
    of the clip. This is what COMMIT's refinement avoids (MAGVIT, section 3.2).

    Args:
        codes: `[B, N]` clean codes.
        is_condition: `[N]` or `[B, N]` bool.
        scores: `[B, N]`.
        num_corrupted: `[B]` int64 of all tokens; of the maskable ones, the same share, at least one.
        mask_id: The mask token.

    Returns:
        The corrupted tokens and what they are (`RECONSTRUCT`, `MASK` or `GIVEN`), each `[B, N]` int64.
    """
    is_condition = is_condition.expand_as(codes)
    maskable = (~is_condition).sum(dim=1)
    count = torch.minimum((num_corrupted * maskable // codes.shape[1]).clamp(min=1), maskable)
    tokens, kinds = multivariate_mask(
        codes, codes, torch.zeros_like(is_condition), scores.masked_fill(is_condition, torch.inf), count, mask_id
    )
    return tokens, kinds.masked_fill(is_condition, GIVEN)


def commit_loss(
    nll: Tensor, kinds: Tensor, trained: Sequence[LossPart] = tuple(LOSS_PARTS)
) -> tuple[Tensor, dict[LossPart, Tensor]]:
    """The parts of COMMIT's objective (MAGVIT, Eq. 5) with equal weight on each token of a clip that counts.

    Args:
        nll: `[B, N]` cross-entropy of each clean token.
        kinds: `[B, N]` what the input held there, see `multivariate_mask`.
        trained: Which parts count; all of them in the paper's method.

    Returns:
        The loss, nats per token, and what refining, masking and reconstruction contribute: they add up to it.
    """
    weight = torch.stack([kinds == LOSS_PARTS[name] for name in trained]).any(dim=0)  # [B, N]
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1) / len(nll)
    parts = {name: (nll * weight * (kinds == kind)).sum() for name, kind in LOSS_PARTS.items()}
    return (nll * weight).sum(), parts


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
        guidance_scale: Away from what is predicted without class and condition, by this much of the difference; twice
            the network calls. 0 is off, as published; a model for it is trained with condition_dropout, or on
            `unconditional` too.
        revise_rounds: Rounds in which every token is drawn once more, given all others (MeBT's revise); 0 is off, as
            published.
        revise_groups: Network calls of a round: so many random groups are drawn one after the other.
        revise_temperature: Divides the logits in these rounds.
        paste_known: Whether the known pixels replace what was generated at their place; published numbers do not.
    """

    num_steps: int = 12
    schedule: COMMITSchedule = "cosine"
    choice_temperature: float = 4.5
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 0.0
    revise_rounds: int = 0
    revise_groups: int = 4
    revise_temperature: float = 0.7
    paste_known: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("revise_rounds", 0), ("revise_groups", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least} (--model.sampling.{name}).")


@torch.no_grad()
def commit_decode(
    network: COMMIT,
    condition_codes: Tensor,
    is_condition: Tensor,
    settings: COMMITDecoding,
    noise: Noise,
    label: Tensor | None = None,
    prompt: int = 0,
    free_prompt: int | None = None,
) -> Tensor:
    """Draw a video's codes (MAGVIT, algorithm 1).

    All tokens are open at first: condition tokens where there is a condition, masks elsewhere. Each step draws every
    open token; those of the highest `log p + c Gumbel` are closed with the code just drawn, the others go back to what
    they were at first. A closed token never changes, and at the end all have been drawn, the condition's too.

    Under `latent` masking (MaskGIT's decoding) the condition's tokens are closed from the beginning. Under `prefix`
    masking there are masks only at first, and the network reads the condition besides.

    Args:
        network: The transformer.
        condition_codes: `[B, N]` codes of the padded video; not read where there is no condition.
        is_condition: `[N]` or `[B, N]` bool; `[N]` under latent masking.
        settings: Steps, schedule, temperatures and filters.
        noise: Draws of `Exp(1)`, called with a shape.
        label: `[B]` int64 classes; None is "no class".
        prompt: Which task's.
        free_prompt: The prompt for what guidance leads away from; None takes the task's.

    Returns:
        `[B, N]` int64 in `[0, K)`.
    """
    known = condition_codes.where(is_condition, network.mask_id)  # [B, N] the condition, masks elsewhere
    nothing = torch.full_like(known, network.mask_id)
    start = nothing if network.masking == "prefix" else known
    prefix = (known,) if network.masking == "prefix" else ()
    is_open = torch.ones_like(start, dtype=torch.bool)
    if network.masking == "latent":
        is_open &= ~is_condition

    num_tokens = int(is_open[0].sum()) if network.masking == "latent" else start.shape[1]

    def predict(tokens: Tensor, is_open: Tensor) -> Tensor:
        """Logits `[B, N, G, V]`."""
        logits = network(tokens, label, prompt, *prefix).float()
        if not settings.guidance_scale:
            return logits
        # Tokens that were drawn are part of the video for both; what is known of it is for one.
        hidden = is_open | is_condition if network.masking == "latent" else is_open
        free = network(
            nothing.where(hidden, tokens),
            None,
            prompt if free_prompt is None else free_prompt,
            *(nothing for _ in prefix),
        )
        return logits + settings.guidance_scale * (logits - free.float())

    def draw(logits: Tensor, temperature: float) -> Tensor:
        """Parts of codes `[B, N, G]`."""
        probabilities = filtered_probabilities(logits, temperature, settings.top_k, settings.top_p)
        return pick(probabilities, noise(probabilities.shape))[0]

    codes, may_change, num_open = start, is_open, num_tokens
    for step in range(1, settings.num_steps + 1):
        if num_open == 0:
            break
        u = step / settings.num_steps
        logits = predict(start.where(is_open, codes), is_open)
        parts = draw(logits, settings.temperature)
        codes = join_codes(parts, logits.shape[-1]).where(is_open, codes)  # [B, N]
        num_open = min(num_corrupted_tokens(settings.schedule, u, num_tokens), num_open - 1)
        if step == settings.num_steps:
            break
        confidence = logits.log_softmax(dim=-1).gather(-1, parts[..., None]).sum(dim=(2, 3))  # [B, N]
        # in logs: a temperature of 400 has no power in float32
        gumbel = -noise(confidence.shape).clamp_min(torch.finfo(torch.float32).tiny).log()
        scores = (confidence + settings.choice_temperature * (1.0 - u) * gumbel).where(is_open, torch.inf)
        is_open = lowest(scores, torch.full_like(codes[:, 0], num_open))

    for _ in range(settings.revise_rounds):
        place = noise(codes.shape).argsort(dim=1).argsort(dim=1)  # [B, N] a random order for each sample
        for group in range(settings.revise_groups):
            is_open = (place * settings.revise_groups // codes.shape[1] == group) & may_change
            logits = predict(start.where(is_open, codes), is_open)
            codes = join_codes(draw(logits, settings.revise_temperature), logits.shape[-1]).where(is_open, codes)
    return codes
