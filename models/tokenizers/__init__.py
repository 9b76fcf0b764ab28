"""Tokenizers: between video and codes."""

from models.tokenizers.causal import CausalDecoder, CausalEncoder
from models.tokenizers.continuous import ContinuousLatents, GaussianLatents
from models.tokenizers.discriminators import PatchDiscriminator, StyleGANDiscriminator
from models.tokenizers.finite_scalar import BoundedLatents, FiniteScalarQuantizer
from models.tokenizers.gradient_vq import GradientVectorQuantizer
from models.tokenizers.lookup_free import LookupFreeQuantizer
from models.tokenizers.losses import LPIPS
from models.tokenizers.magvit import MAGVITDecoder, MAGVITEncoder
from models.tokenizers.networks import VideoDecoder, VideoEncoder
from models.tokenizers.quantizers import Encoded, Quantizer, VectorQuantizer
from models.tokenizers.time_agnostic import TimeAgnosticDecoder, TimeAgnosticEncoder
from models.tokenizers.vqgan3d import VQGAN3D

__all__ = [
    "LPIPS",
    "VQGAN3D",
    "BoundedLatents",
    "CausalDecoder",
    "CausalEncoder",
    "ContinuousLatents",
    "Encoded",
    "FiniteScalarQuantizer",
    "GaussianLatents",
    "GradientVectorQuantizer",
    "LookupFreeQuantizer",
    "MAGVITDecoder",
    "MAGVITEncoder",
    "PatchDiscriminator",
    "Quantizer",
    "StyleGANDiscriminator",
    "TimeAgnosticDecoder",
    "TimeAgnosticEncoder",
    "VectorQuantizer",
    "VideoDecoder",
    "VideoEncoder",
]
