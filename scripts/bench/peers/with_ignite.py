"""The same training with PyTorch-Ignite, as its guides write it (create_supervised_trainer, idist, example cifar10).

Its own: ranks, sampler, MLflow, bar, metric, checkpoint, and TerminateOnNan, which looks at the loss.
"""

import os
import sys

import ignite.distributed as idist
import torch
import workload
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, MLflowLogger, ProgressBar, TerminateOnNan, global_step_from_engine
from ignite.metrics import Accuracy, RunningAverage
from ignite.utils import manual_seed
from torch import nn
from workload import MLP, ClockedSGD


def training(_: int, dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    manual_seed(0)
    dataset, val_dataset = getattr(workload, dataset_name)(samples, 0), getattr(workload, dataset_name)(val_samples, 1)
    loader = idist.auto_dataloader(dataset, batch_size=32 * idist.get_world_size(), shuffle=True)
    val_loader = idist.auto_dataloader(val_dataset, batch_size=32 * idist.get_world_size())
    model = idist.auto_model(MLP())
    optimizer = idist.auto_optim(ClockedSGD(model.parameters(), lr=0.01))
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss(), device=idist.device())
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()}, device=idist.device())
    mlflow = with_everything(trainer, evaluator, model, optimizer) if full else None
    if not full and idist.get_rank() == 0:
        RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(every=50),
            lambda engine: print(f"step {engine.state.iteration} loss {engine.state.metrics['loss']:.4f}", flush=True),
        )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(val_loader))
    trainer.run(loader, max_epochs=1)
    if mlflow:
        mlflow.close()


def with_everything(
    trainer: Engine, evaluator: Engine, model: nn.Module, optimizer: torch.optim.Optimizer
) -> MLflowLogger | None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
    saved = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = Checkpoint(saved, DiskSaver("checkpoints", create_dir=True, require_empty=False))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    if idist.get_rank() > 0:
        return None
    ProgressBar().attach(trainer, ["loss"])
    mlflow = MLflowLogger()
    mlflow.log_params({"lr": 0.01, "batch_size": 32})
    mlflow.attach_output_handler(trainer, Events.ITERATION_COMPLETED(every=50), tag="training", metric_names=["loss"])
    mlflow.attach_output_handler(
        evaluator,
        Events.EPOCH_COMPLETED,
        tag="validation",
        metric_names=["accuracy"],
        global_step_transform=global_step_from_engine(trainer),
    )
    return mlflow


def main(dataset_name: str, samples: int, val_samples: int, full: bool) -> None:
    with idist.Parallel(backend="gloo" if "WORLD_SIZE" in os.environ else None) as parallel:
        parallel.run(training, dataset_name, samples, val_samples, full)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "full" in sys.argv[4:])
