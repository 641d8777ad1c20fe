"""Trackers that a config can name beside MLflow; each needs the package that it is called after."""

from dtrain.components.trackers.tensor_board import TensorBoard
from dtrain.components.trackers.trackio_runs import Trackio
from dtrain.components.trackers.weights_and_biases import Wandb

__all__ = ["TensorBoard", "Trackio", "Wandb"]
