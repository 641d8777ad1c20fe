"""What 10 metrics of torchmetrics cost beside the step of a UNet3D: by dtrain, by a MetricCollection, one by one.

    python scripts/bench/metrics.py [--rounds 7] [--shape 64 128 128] [--f-maps 8 16 32] [--json FILE]

A batch is one volume of random numbers, its labels are random classes. Each round times, in turn, in processor time of
this process with one thread: a training step (forward, loss, backward, AdamW), a forward in eval mode, and the update
with the output of one batch of the same 10 metrics: by dtrain's Metrics, by torchmetrics.MetricCollection (with its
compute_groups, which are found at its first batch, before), and by calling each. The states are compared after each
round: they are the same integers. Figures are medians, shares the medians of each round's share.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import HERE, machine

NAMES = (
    "Accuracy", "Precision", "Recall", "F1Score", "Specificity", "JaccardIndex", "CohenKappa", "MatthewsCorrCoef",
    "HammingDistance", "ConfusionMatrix",
)  # fmt: skip
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {  # torchmetrics' task, outputs of the network, arguments
    "4 classes": ("Multiclass", 4, {"num_classes": 4}),
    "4 classes, ignore_index": ("Multiclass", 4, {"num_classes": 4, "ignore_index": 255}),
    "19 classes, ignore_index": ("Multiclass", 19, {"num_classes": 19, "ignore_index": 255}),
    "foreground": ("Binary", 1, {}),
    "foreground, ignore_index": ("Binary", 1, {"ignore_index": 255}),
}
MOST_SHARE = 0.02


def seconds(function: Callable[[], Any]) -> float:
    """Processor time of one call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def fresh(case: str) -> dict[str, Any]:
    """The metrics of a case."""
    import torchmetrics.classification

    task, _, keys = CASES[case]
    return {name: getattr(torchmetrics.classification, task + name)(**keys) for name in NAMES}


def by_dtrain(metrics: dict[str, Any]) -> Any:
    """As a training has them."""
    from dtrain.distributed.ranks import Ranks
    from dtrain.metrics import Metrics

    cpu = torch.device("cpu")
    made = Metrics({name: lambda it=it: it for name, it in metrics.items()}, Ranks(0, 0, 1, cpu), cpu)
    made.prepare()
    return made


def batch(case: str, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, loss's target (without what is ignored) and metrics' target."""
    generator = torch.Generator().manual_seed(seed)
    outputs = CASES[case][1]
    size = (1, *shape) if outputs > 1 else (1, 1, *shape)
    labels = torch.randint(max(2, outputs), size, generator=generator)
    ignored = torch.rand(size, generator=generator) < 0.1
    target = labels.masked_fill(ignored, 255) if "ignore_index" in case else labels
    return torch.randn(1, 1, *shape, generator=generator), labels, target


def measure(case: str, shape: tuple[int, ...], f_maps: list[int], rounds: int) -> list[dict[str, float]]:
    """Seconds of each, by round."""
    from torch.nn import functional as F
    from torchmetrics import MetricCollection

    from dtrain.components.models.unet import UNet3D

    outputs = CASES[case][1]
    torch.manual_seed(0)
    model = UNet3D(1, outputs, f_maps=f_maps, num_groups=min(8, f_maps[0] // 2))
    optimizer = torch.optim.AdamW(model.parameters())
    ours, each, collected = fresh(case), fresh(case), MetricCollection(fresh(case))
    metrics, found = by_dtrain(ours), []
    for number in range(rounds + 1):  # the first one only warms up
        image, labels, target = batch(case, shape, number)

        def step(image: torch.Tensor = image, labels: torch.Tensor = labels) -> None:
            optimizer.zero_grad()
            output = model.train()(image)
            of_classes = outputs > 1
            loss = F.cross_entropy(output, labels) if of_classes else _bce(output, labels)
            loss.backward()
            optimizer.step()

        def forward(image: torch.Tensor = image) -> None:
            with torch.no_grad():
                model.eval()(image)

        with torch.no_grad():
            output = model.eval()(image)
        times = {"step": seconds(step), "forward": seconds(forward)}
        times["dtrain"] = seconds(lambda: metrics.update(output, target, number))  # noqa: B023
        times["collection"] = seconds(lambda: collected.update(output, target))  # noqa: B023
        times["each"] = seconds(lambda: [metric.update(output, target) for metric in each.values()])  # noqa: B023
        for name in NAMES:
            for state in each[name]._reductions:
                assert torch.equal(getattr(ours[name], state), getattr(each[name], state)), (name, state)
        found.append(times)
    return found[1:]


def _bce(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(output, labels.float())


def table(of_cases: dict[str, list[dict[str, float]]]) -> list[str]:
    """A line per case: milliseconds, and shares of a training step and of an evaluation's forward."""
    head = ("step ms", "forward ms", "each ms", "collection", "dtrain ms", "of a step", "most", "of a forward")
    lines = ["".ljust(28) + "".join(name.rjust(13) for name in head)]
    for case, rounds in of_cases.items():
        median = {name: statistics.median(times[name] for times in rounds) * 1e3 for name in rounds[0]}
        shares = [times["dtrain"] / times["step"] for times in rounds]
        of_forward = statistics.median(times["dtrain"] / times["forward"] for times in rounds)
        cells = [f"{median[name]:.1f}" for name in ("step", "forward", "each", "collection", "dtrain")]
        cells += [f"{statistics.median(shares):.2%}", f"{max(shares):.2%}", f"{of_forward:.2%}"]
        kept = "ok" if statistics.median(shares) <= MOST_SHARE else "MISS"
        lines.append(case.ljust(28) + "".join(cell.rjust(13) for cell in cells) + f"  {kept} <= {MOST_SHARE:.0%}")
    return lines


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each case (default 7)")
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 128, 128], help="of a volume (default 64 128 128)")
    parser.add_argument("--f-maps", type=int, nargs="+", default=[8, 16, 32], help="channels (default 8 16 32)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there, too")
    wish = parser.parse_args()
    sys.path.insert(0, str(HERE.parent.parent))
    torch.set_num_threads(1)
    found = {case: measure(case, tuple(wish.shape), wish.f_maps, wish.rounds) for case in wish.cases}
    print(f"{wish.rounds} rounds, {len(NAMES)} metrics, a batch of {wish.shape} voxels; {machine()}\n")
    print("\n".join(table(found)))
    if wish.json:
        wish.json.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
