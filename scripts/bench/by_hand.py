"""The loop that a researcher writes by hand, against which dtrain is measured: plain torch, DDP under torchrun."""

import os
import sys

import torch
import torch.distributed as dist
import workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from workload import MLP, ClockedSGD, accuracy


def main(dataset_name: str, samples: int, val_samples: int, with_torchmetrics: bool) -> None:
    """Train one epoch, validate, save the weights."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)

    dataset = getattr(workload, dataset_name)(samples, seed=0)
    sampler = DistributedSampler(dataset, seed=0) if ranks > 1 else None
    loader = DataLoader(dataset, batch_size=32, sampler=sampler, shuffle=sampler is None)
    net = MLP()
    model = DistributedDataParallel(net) if ranks > 1 else net
    criterion = nn.CrossEntropyLoss()
    optimizer = ClockedSGD(model.parameters(), lr=0.01)

    loss_sum = torch.zeros(())
    if sampler is not None:
        sampler.set_epoch(0)
    model.train()
    for step, (inputs, target) in enumerate(loader, 1):
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(inputs), target)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
        if step % 50 == 0:
            if rank == 0:
                print(f"step {step} loss {loss_sum.item() / 50:.4f}", flush=True)
            loss_sum.zero_()

    if with_torchmetrics:
        from torchmetrics import Accuracy

        metric = Accuracy(task="multiclass", num_classes=10)
    else:
        metric = accuracy
    net.eval()
    with torch.no_grad():
        inputs, target = getattr(workload, dataset_name)(val_samples, seed=1).tensors
        if rank == 0:
            print(f"accuracy {float(metric(net(inputs), target)):.4f}", flush=True)
            torch.save(net.state_dict(), "by_hand.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "torchmetrics" in sys.argv[4:])
