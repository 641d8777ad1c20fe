"""The same training with Lightning Fabric, as its guide writes it (fundamentals/convert, example image_classifier).

Its own: ranks, sampler, checkpoint. By hand: bar (tqdm), MLflow (its loggers write CSV, TensorBoard, W&B), and the
metric, for which its example takes torchmetrics. It has no check for NaN.
"""

import os
import sys

import torch
import workload
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from workload import MLP, ClockedSGD


def main(dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    if full and fabric.is_global_zero:
        import mlflow

        mlflow.set_experiment("overhead")
        mlflow.start_run()
        mlflow.log_params({"lr": 0.01, "batch_size": 32})
    dataset, val_dataset = getattr(workload, dataset_name)(samples, 0), getattr(workload, dataset_name)(val_samples, 1)
    loader, val_loader = fabric.setup_dataloaders(
        DataLoader(dataset, batch_size=32, shuffle=True), DataLoader(val_dataset, batch_size=32)
    )
    net = MLP()
    model, optimizer = fabric.setup(net, ClockedSGD(net.parameters(), lr=0.01))
    criterion = nn.CrossEntropyLoss()

    loss_sum = torch.zeros((), device=fabric.device)
    bar = tqdm(loader, disable=not (full and fabric.is_global_zero))
    model.train()
    for step, (inputs, target) in enumerate(bar, 1):
        optimizer.zero_grad()
        loss = criterion(model(inputs), target)
        fabric.backward(loss)
        optimizer.step()
        loss_sum += loss.detach()
        if step % 50 == 0:
            mean = loss_sum.item() / 50
            loss_sum.zero_()
            if full and fabric.is_global_zero:
                bar.set_postfix(loss=mean, refresh=False)
                mlflow.log_metrics({"train/loss": mean}, step=step)
            elif not full:
                fabric.print(f"step {step} loss {mean:.4f}")

    from torchmetrics import Accuracy

    metric = Accuracy(task="multiclass", num_classes=10).to(fabric.device)
    model.eval()
    with torch.no_grad():
        for inputs, target in val_loader:
            metric.update(model(inputs), target)
    found = metric.compute().item()
    fabric.print(f"accuracy {found:.4f}")
    if full:
        fabric.save("checkpoint.ckpt", {"model": model, "optimizer": optimizer, "step": step})
        if fabric.is_global_zero:
            mlflow.log_metrics({"val/accuracy": found}, step=step)
            mlflow.end_run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "full" in sys.argv[4:])
