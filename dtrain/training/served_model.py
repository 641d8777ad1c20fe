"""A run's model as MLflow serves it: `mlflow.pyfunc.load_model` calls `_load_pyfunc`, the loader that MLmodel names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dtrain.modelloader import Forward
from dtrain.training.saved_model import load_model


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "ServedModel":
    """The model of MLflow's folder `data`, which holds config.yaml and the weights.

    `model_config` may say the `device`. Default: a GPU where there is one.
    """
    (weights,) = Path(path).glob("*.safetensors")
    device = (model_config or {}).get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return ServedModel(load_model(weights, device=device))


class ServedModel:
    """Arrays in, arrays out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        device = next((each.device for each in module.parameters()), torch.device("cpu"))
        self._forward = Forward(module, device)

    def get_raw_model(self) -> torch.nn.Module:
        """The module itself, in eval mode."""
        return self.module

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """What the model gives for a batch of inputs: an array, or a dict of arrays for several inputs by name.

        A pandas.DataFrame counts as an array of its rows. The output has the model's own form, of arrays.
        """
        with torch.no_grad():
            return _arrays(self._forward.run(self.module, _tensors(data)))


def _tensors(data: Any) -> Any:
    if hasattr(data, "to_numpy"):
        data = data.to_numpy(dtype="float32")
    if isinstance(data, Mapping):
        return {str(key): _tensors(item) for key, item in data.items()}
    return data if isinstance(data, torch.Tensor) else torch.as_tensor(data)


def _arrays(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        output = output.float() if output.dtype == torch.bfloat16 else output
        return output.detach().cpu().numpy()
    if isinstance(output, Mapping):
        return {key: _arrays(item) for key, item in output.items()}
    return [_arrays(item) for item in output] if isinstance(output, list | tuple) else output
