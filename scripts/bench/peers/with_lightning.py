"""The same training with Lightning's Trainer, as its guides write it (advanced/speed: no `.item()`, every 50 steps).

Bare is its own `barebones`, which is meant for measuring. Full: its MLFlowLogger, bar, ModelCheckpoint, self.log and
torchmetrics. It has no check for NaN in each step: EarlyStopping(check_finite=True) looks at validations, and
detect_anomaly searches each operator.
"""

import logging
import os
import sys
import warnings

import pytorch_lightning as pl
import torch
import workload
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy
from workload import MLP, ClockedSGD


class Classifier(pl.LightningModule):
    def __init__(self, full: bool) -> None:
        super().__init__()
        self.net, self.criterion, self.full = MLP(), nn.CrossEntropyLoss(), full
        self.accuracy = Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, target = batch
        loss = self.criterion(self.net(inputs), target)
        if self.full:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        inputs, target = batch
        self.accuracy(self.net(inputs), target)
        if self.full:
            self.log("val/accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ClockedSGD(self.parameters(), lr=0.01)


def main(dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    warnings.filterwarnings("ignore", ".*num_workers.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    where = {"accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_epochs": 1}
    if full:
        from pytorch_lightning.callbacks import ModelCheckpoint
        from pytorch_lightning.loggers import MLFlowLogger

        logger = MLFlowLogger("overhead", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        callbacks = [ModelCheckpoint("checkpoints", monitor="val/accuracy", mode="max")]
        trainer = pl.Trainer(**where, logger=logger, callbacks=callbacks, log_every_n_steps=50, num_sanity_val_steps=0)
    else:
        trainer = pl.Trainer(**where, barebones=True)
    dataset, val_dataset = getattr(workload, dataset_name)(samples, 0), getattr(workload, dataset_name)(val_samples, 1)
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    trainer.fit(Classifier(full), loader, DataLoader(val_dataset, batch_size=32))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "full" in sys.argv[4:])
