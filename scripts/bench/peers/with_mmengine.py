"""The same training with MMEngine's Runner, as its guides write it (tutorials/runner; distributed_training.py).

Its own: ranks, sampler, MLflow (through its Visualizer), metric, checkpoint. It has no bar, it prints lines, and no
check for NaN.
"""

import os
import sys

import torch
import torch.distributed as dist
import workload
from mmengine import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, OPTIMIZERS
from mmengine.runner import Runner
from torch import nn
from workload import MLP, ClockedSGD

OPTIMIZERS.register_module(module=ClockedSGD)


@MODELS.register_module()
class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = MLP(), nn.CrossEntropyLoss()

    def forward(self, inputs: torch.Tensor, target: torch.Tensor, mode: str) -> object:
        output = self.net(inputs)
        return {"loss": self.criterion(output, target)} if mode == "loss" else (output, target)


@METRICS.register_module()
class Accuracy(BaseMetric):
    def process(self, data_batch: object, data_samples: tuple[torch.Tensor, torch.Tensor]) -> None:
        output, target = data_samples
        self.results.append((len(target), (output.argmax(1) == target).sum().item()))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        return {"accuracy": sum(right for _, right in results) / sum(count for count, _ in results)}


def loader(dataset: str, samples: int, seed: int) -> dict[str, object]:
    return {
        "dataset": {"type": dataset, "samples": samples, "seed": seed},
        "batch_size": 32,
        "sampler": {"type": "DefaultSampler", "shuffle": seed == 0},
        "collate_fn": {"type": "default_collate"},
    }


def main(dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    DATASETS.register_module(name=dataset_name, module=getattr(workload, dataset_name))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:  # its own launcher asks for a GPU, whatever the backend
        dist.init_process_group("gloo")
    mlflow = {"type": "MLflowVisBackend", "exp_name": "overhead", "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
    config = {
        "model": {"type": "Classifier"},
        "work_dir": "work",
        "train_dataloader": loader(dataset_name, samples, 0),
        "val_dataloader": loader(dataset_name, val_samples, 1),
        "train_cfg": {"by_epoch": True, "max_epochs": 1},
        "val_cfg": {},
        "val_evaluator": {"type": "Accuracy"},
        "optim_wrapper": {"optimizer": {"type": "ClockedSGD", "lr": 0.01}},
        "default_hooks": {"logger": {"type": "LoggerHook", "interval": 50}} | ({} if full else {"checkpoint": None}),
        "visualizer": {"type": "Visualizer", "vis_backends": [mlflow] if full else []},
        "launcher": "pytorch" if ranks > 1 else "none",
        "model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None},  # else it names a GPU
        "randomness": {"seed": 0},
        "experiment_name": "overhead",
    }
    Runner.from_cfg(Config(config)).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "full" in sys.argv[4:])
