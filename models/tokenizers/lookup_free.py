"""Lookup-free quantisation (MAGVIT-v2, section 3.1): each channel is a bit, the code is the number they write.

The entropy loss of the gradient-trained codebook, over all 2^b codes, without a table of them. With logit
a_i = 4 z_i / temperature and c in {-1, 1}^b, the softmax over -|z - c|^2 / temperature factorises:

    p(c|z) = prod_i sigmoid(c_i a_i),      H[p(.|z)] = sum_i H[sigmoid(a_i)]

The entropy of the mean over all z does not, but a mean of products of two parts is a matrix product: with the low and
the high half of the bits, P_low [n, 2^(b/2)] and P_high [n, 2^(b - b/2)], mean p = P_high^T P_low / n. For 18 bits that
is 2 x 512 numbers for each vector instead of 262,144, and exact.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.tokenizers.quantizers import Encoded, Quantizer, batch_statistics, entropy_of_mean, straight_through


class LookupFreeQuantizer(Quantizer):
    """The sign of each channel; 0 counts as negative. The first channel is the least significant bit.

    Args:
        num_bits: Number b of channels; there are 2^b codes.
        commitment_weight: Weight of the mean squared distance of z to its signs.
        entropy_weight: Weight of the entropy loss, the mean entropy of p(.|z) minus the entropy of the mean;
            0 does not compute it. MAGVIT-v2 begins with more (--model.entropy_boost).
        temperature: How sharply p(c|z) prefers the nearest code.
        entropy_group_bits: Null computes the entropy of the mean exactly. A number that divides num_bits takes the bits
            in groups of so many and adds up the groups' entropies, averaged over groups of neighbours and of every
            k-th bit: an upper bound, exact where groups are independent, for codes too many to count.
    """

    codebook_size: int
    bit_values: Tensor
    one: Tensor

    def __init__(
        self,
        num_bits: int = 18,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 0.01,
        entropy_group_bits: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_bits <= 24:
            raise ValueError(f"num_bits={num_bits}: expected 1 to 24, since the use of all 2^num_bits codes is counted")
        if entropy_group_bits is not None and (entropy_group_bits < 1 or num_bits % entropy_group_bits):
            raise ValueError(f"entropy_group_bits={entropy_group_bits} does not divide num_bits={num_bits}")
        self.dim = num_bits
        self.codebook_size = 2**num_bits
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.entropy_group_bits = entropy_group_bits
        self.register_buffer("bit_values", 2 ** torch.arange(num_bits), persistent=False)  # [b]
        self.register_buffer("one", torch.ones(()), persistent=False)  # of the latents' type

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Encoded:
        """Quantise `z` `[B, b, t, h, w]`.

        Args:
            z: any floating type; computed in float32 at least, also under autocast.
            generator: not needed: nothing is random.

        Returns:
            Latents, -1 and 1 (with the gradient of the identity), codes, `commitment` and in training `entropy`, the
            batch's `perplexity` and `usage`, and in training the two entropies in nats.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            codes = self.latents_to_codes(z)
            signs = self.codes_to_latents(codes).to(z.dtype)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, signs)}
            statistics = batch_statistics(codes, self.codebook_size, self.training)
            if self.training and self.entropy_weight > 0:
                of_each, of_all = self._entropies(rearrange(z, "b d t h w -> (b t h w) d"))
                losses["entropy"] = self.entropy_weight * (of_each - of_all)
                statistics |= {"entropy_of_each": of_each.detach(), "entropy_of_all": of_all.detach()}
            return Encoded(straight_through(z, signs), codes, losses, statistics)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Spell codes `[B, t, h, w]` as -1 and 1, `[B, b, t, h, w]`."""
        is_set = codes[..., None] // self.bit_values % 2 > 0  # [B, t, h, w, b]
        return rearrange(torch.where(is_set, self.one, -self.one), "b t h w d -> b d t h w")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """Codes `[B, t, h, w]` of the signs of latents `[B, b, t, h, w]`."""
        is_set = rearrange(latents > 0, "b d t h w -> b t h w d")
        return (is_set * self.bit_values).sum(-1)

    def _entropies(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of p(.|z), and entropy of the mean (or its bound), of vectors `[n, b]`."""
        logits = vectors * (4 / self.temperature)
        distance = logits.abs()  # both terms below stay finite and exact far from 0
        of_each = (F.softplus(-distance) + distance * torch.sigmoid(-distance)).sum(1).mean()
        p = torch.sigmoid(logits)  # [n, b], that the bit is set
        if self.entropy_group_bits is None:
            half = self.dim // 2
            low, high = joint_probabilities(p[:, :half]), joint_probabilities(p[:, half:])
            return of_each, entropy_of_mean((high.T @ low).flatten() / len(p))
        neighbours = rearrange(p, "n (g k) -> n g k", k=self.entropy_group_bits)
        strided = rearrange(p, "n (k g) -> n g k", k=self.entropy_group_bits)
        groups = torch.cat([neighbours, strided], dim=1)  # [n, 2g, k]
        return of_each, entropy_of_mean(joint_probabilities(groups).mean(0)).sum() / 2

    def extra_repr(self) -> str:
        """Name the size."""
        return f"num_bits={self.dim}, codebook_size={self.codebook_size}"


def joint_probabilities(p: Tensor) -> Tensor:
    """Probabilities `[..., 2^k]` of all numbers that k independent bits write, the first the least significant.

    Args:
        p: `[..., k]`, the probability that a bit is set.
    """
    joint = p.new_ones(*p.shape[:-1], 1)
    for i in range(p.shape[-1]):
        is_set = p[..., i : i + 1]
        joint = torch.cat([joint * (1 - is_set), joint * is_set], dim=-1)
    return joint
