"""Samplers that `loaders.train.sampler` and `loaders.train.batch_sampler` can name."""

from dtrain.components.samplers.balanced import Balanced
from dtrain.components.samplers.length_buckets import LengthBuckets
from dtrain.components.samplers.weighted import Weighted

__all__ = ["Balanced", "LengthBuckets", "Weighted"]
