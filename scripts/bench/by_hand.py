"""The loop that a researcher writes by hand, against which all others are measured: plain torch, DDP under torchrun.

`full` adds what others bring: MLflow, a bar (tqdm), the optimizer in the checkpoint, and a look for NaN in the loss.
"""

import os
import sys

import torch
import torch.distributed as dist
import workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from workload import MLP, ClockedSGD, accuracy

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def main(dataset_name: str, samples: int, val_samples: int, *features: str) -> None:
    """Train one epoch, validate, save the weights."""
    if RANKS > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    full = "full" in features
    if full and RANK == 0:
        import mlflow

        mlflow.set_experiment("overhead")
        mlflow.start_run()
        mlflow.log_params({"lr": 0.01, "batch_size": 32})

    dataset = getattr(workload, dataset_name)(samples, seed=0)
    sampler = DistributedSampler(dataset, seed=0) if RANKS > 1 else None
    loader = DataLoader(dataset, batch_size=32, sampler=sampler, shuffle=sampler is None)
    net = MLP()
    model = DistributedDataParallel(net) if RANKS > 1 else net
    optimizer = ClockedSGD(model.parameters(), lr=0.01)
    train(model, loader, optimizer, full)

    metric = accuracy
    if "torchmetrics" in features:
        from torchmetrics import Accuracy

        metric = Accuracy(task="multiclass", num_classes=10)
    net.eval()
    with torch.no_grad():
        inputs, target = getattr(workload, dataset_name)(val_samples, seed=1).tensors
        found = float(metric(net(inputs), target))
    if RANK == 0:
        print(f"accuracy {found:.4f}", flush=True)
        torch.save({"model": net.state_dict()} | ({"optimizer": optimizer.state_dict()} if full else {}), "by_hand.pt")
    if full and RANK == 0:
        mlflow.log_metrics({"val/accuracy": found})
        mlflow.end_run()
    if RANKS > 1:
        dist.destroy_process_group()


def train(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, full: bool) -> None:
    """One epoch."""
    batches = loader
    if full and RANK == 0:
        import mlflow
        from tqdm import tqdm

        batches = tqdm(loader)
    criterion = nn.CrossEntropyLoss()
    loss_sum = torch.zeros(())
    model.train()
    for step, (inputs, target) in enumerate(batches, 1):
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(inputs), target)
        if full and not loss.isfinite():
            raise RuntimeError(f"the loss of step {step} is {loss.item()}")
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
        if step % 50 == 0:
            if full and RANK == 0:
                batches.set_postfix(loss=loss_sum.item() / 50, refresh=False)
                mlflow.log_metrics({"train/loss": loss_sum.item() / 50}, step=step)
            elif RANK == 0:
                print(f"step {step} loss {loss_sum.item() / 50:.4f}", flush=True)
            loss_sum.zero_()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
