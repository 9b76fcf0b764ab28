"""Scores from a classifier's logits: the inception score, and how well a long video keeps to its class."""

import torch
from torch import Tensor

from models.metrics.detectors import Detector, DetectorCard, Features
from models.metrics.distances import card_of, check_card
from models.metrics.samples import SampleMetric


class InceptionScore(SampleMetric):
    """`exp(mean_i KL(p_i || mean_j p_j))` over the class probabilities of generated samples (Salimans et al., 2016).

    With a C3D of UCF-101 it is the one that video papers report; with Inception-v3 that of images. Splits lower the
    score: name their number beside it. Samples go to splits by index, modulo their number. Published protocols for
    videos: 2,048 samples in one split (TGANv2), 2,048 in 10 (StyleGAN-V), 4 x 10,000 in 4 (MAGVIT); for images 50,000
    in 10 (ADM).

    Args:
        detector: Whose logits come, or its card.
        splits: How many scores to average.
    """

    higher_is_better = True

    def __init__(self, detector: Detector | DetectorCard, splits: int = 1) -> None:
        if splits < 1:
            raise ValueError(f"splits={splits} must be at least 1.")
        card = card_of(detector)
        # of each split: the number of samples, the sum of p log p over samples and classes, the sum of p
        super().__init__(("generated",), card.num_classes, torch.zeros(splits, 2 + card.num_classes))
        self.card = card
        self.splits = splits

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("inception_score")

    def fold(self, state: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Add probabilities to the sums of their splits."""
        log_p = rows.log_softmax(dim=1)
        p = log_p.exp()
        terms = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(dim=1, keepdim=True), p], dim=1)
        return state.index_add(0, index % self.splits, terms)

    def update(self, features: Features, index: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Of n samples.
            index: `[n]` int64, which sample each is; a repeated index counts once. Needed for more than one split.
        """
        check_card(features, self.card)
        if index is None and self.splits > 1:
            raise ValueError(f"{self.splits} splits need the samples' indices.")
        self.add_rows("generated", features.logits, index)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over the splits, float64.

        Raises:
            ValueError: If a split has no samples.
        """
        state = self.finish("generated")[0]
        counts, sums, totals = state[:, 0], state[:, 1], state[:, 2:]
        if (counts == 0).any():
            raise ValueError(f"{int(counts.sum())} samples leave some of {self.splits} splits empty.")
        marginal = totals / counts[:, None]
        scores = (sums / counts - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
        return scores.mean(), scores.std(correction=0)


class _Coherence(SampleMetric):
    """Mean over long videos of a number for each of their pieces, compared with the first piece."""

    def __init__(self, detector: Detector | DetectorCard, pieces: int) -> None:
        if pieces < 1:
            raise ValueError(f"pieces={pieces} must be at least 1.")
        card = card_of(detector)
        super().__init__(("generated",), pieces, torch.zeros(1 + pieces))
        self.card = card

    def fold(self, state: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Count rows and add them."""
        return state + torch.cat([state.new_tensor([len(rows)]), rows.sum(dim=0)])

    def update(self, features: Features, index: Tensor | None = None) -> None:
        """Add videos.

        Args:
            features: Of the pieces of n videos: `[n * pieces, D]`, the pieces of a video together and in order, as
                `cut_windows` returns them.
            index: `[n]` int64, which video each is; a repeated index counts once. None if none repeats.
        """
        check_card(features, self.card)
        if len(features) % self.width:
            raise ValueError(f"{len(features)} features are no whole number of videos of {self.width} pieces.")
        log_p = (
            features.logits.double().log_softmax(dim=1).view(-1, self.width, self.card.num_classes)
        )  # [n, pieces, K]
        self.add_rows("generated", self.compare(log_p), index)

    def compare(self, log_p: Tensor) -> Tensor:
        """Compare each piece with the first: log probabilities `[n, pieces, K]` to numbers `[n, pieces]`."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the mean over videos for each piece `[pieces]`, float64.

        Raises:
            ValueError: If there are no videos.
        """
        count, *_ = state = self.finish("generated")[0]
        if count == 0:
            raise ValueError("There are no videos to measure the coherence of.")
        return state[1:] / count


class ClassCoherence(_Coherence):
    """Share of long videos whose piece t is given the class of piece 0 (TATS' class coherence score, CCS): 1 at t = 0.

    The paper compares pieces of 16 frames that do not overlap with the first one; its values are in a figure only. This
    is the plain reading of the score's name; no published number is set beside it.

    Args:
        detector: Whose logits come, or its card; the paper's is a C3D of UCF-101.
        pieces: Pieces of a video, of 16 frames and without overlap in the paper.
    """

    higher_is_better = True

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("class_coherence")

    def compare(self, log_p: Tensor) -> Tensor:
        """Compare the likeliest classes."""
        classes = log_p.argmax(dim=2)
        return (classes == classes[:, :1]).double()


class InceptionCoherence(_Coherence):
    """Mean over long videos of KL(p_t || p_0) between the class probabilities of pieces t and 0, nats.

    After TATS' inception coherence score (ICS), whose values are in a figure only. The direction of the divergence
    (that of the inception score: the sample first, the reference second) is our reading; no published number is set
    beside it.

    Args:
        detector: Whose logits come, or its card; the paper's is a C3D of UCF-101.
        pieces: Pieces of a video, of 16 frames and without overlap in the paper.
    """

    higher_is_better = False

    @property
    def name(self) -> str:
        """What the number may be called."""
        return self.card.metric_name("inception_coherence")

    def compare(self, log_p: Tensor) -> Tensor:
        """Compare the probabilities of all classes."""
        return (log_p.exp() * (log_p - log_p[:, :1])).sum(dim=2)
