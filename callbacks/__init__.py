"""What happens along a training: curriculum, averaged weights, the tokenizer's health, samples, throughput."""

from callbacks.curriculum import ShortToLongCurriculum
from callbacks.ema import EMA
from callbacks.health import TokenizerHealth
from callbacks.samples import SampleLogger
from callbacks.throughput import Throughput

__all__ = ["EMA", "SampleLogger", "ShortToLongCurriculum", "Throughput", "TokenizerHealth"]
