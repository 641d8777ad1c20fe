"""The same training with Hugging Face Accelerate, as its guides write it (usage_guides/tracking, examples/complete_*).

Its own: ranks, sampler, MLflow, checkpoint of the whole state. By hand: bar (tqdm, as in its examples) and metric. It
has no check for NaN.
"""

import sys

import torch
import workload
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from workload import MLP, ClockedSGD


def main(dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    accelerator = Accelerator(cpu=True, log_with="mlflow" if full else None)
    torch.manual_seed(0)
    if full:
        accelerator.init_trackers("overhead", config={"lr": 0.01, "batch_size": 32})
    dataset, val_dataset = getattr(workload, dataset_name)(samples, 0), getattr(workload, dataset_name)(val_samples, 1)
    criterion = nn.CrossEntropyLoss()
    model = MLP()
    model, optimizer, loader, val_loader = accelerator.prepare(
        model,
        ClockedSGD(model.parameters(), lr=0.01),
        DataLoader(dataset, batch_size=32, shuffle=True),
        DataLoader(val_dataset, batch_size=32),
    )

    loss_sum = torch.zeros((), device=accelerator.device)
    bar = tqdm(loader, disable=not (full and accelerator.is_local_main_process))
    model.train()
    for step, (inputs, target) in enumerate(bar, 1):
        optimizer.zero_grad()
        loss = criterion(model(inputs), target)
        accelerator.backward(loss)
        optimizer.step()
        loss_sum += loss.detach()
        if step % 50 == 0:
            mean = loss_sum.item() / 50
            loss_sum.zero_()
            if full:
                bar.set_postfix(loss=mean, refresh=False)
                accelerator.log({"train/loss": mean}, step=step)
            else:
                accelerator.print(f"step {step} loss {mean:.4f}")

    model.eval()
    right = torch.zeros(())
    with torch.no_grad():
        for inputs, target in val_loader:
            output, target = accelerator.gather_for_metrics((model(inputs), target))
            right += (output.argmax(1) == target).sum()
    accelerator.print(f"accuracy {right.item() / val_samples:.4f}")
    if full:
        accelerator.log({"val/accuracy": right.item() / val_samples}, step=step)
        accelerator.save_state("checkpoint")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "full" in sys.argv[4:])
