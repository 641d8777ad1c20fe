"""What a checkpoint of a sharded model costs: seconds that the loop stops, and each rank's peak memory.

    python scripts/bench/shards.py [--parameters 100000000] [--ranks 4] [--dtype bfloat16] [--momentum 0.9]

gloo ranks train a model with strategy fsdp and save it at every second step, once as shards, once gathered by rank 0
(trainer.fsdp.state_dict_type), and resume from the last checkpoint. The stall is the time from the end of such a step
to the begin of the next one, less that of a step without a checkpoint. Peaks are of resident memory from the first step
on, or from the making of the optimizer to the first step of the start that resumes; before, rank 0 holds all weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from overhead import environment, machine
from shards_parts import EVERY

TIMEOUT_SECONDS = 1800.0
# What is freed goes back to the system at once: else gathered parts of the model stay in glibc's heap as holes.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def config(form: str, wish: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A training with `wish.checkpoints` checkpoints, and more steps after the last."""
    return {
        "experiment": "shards",
        "modules": ["shards_parts"],
        "device": "cpu",
        "model": {"name": "Blocks", "parameters": wish.parameters, "dtype": wish.dtype},
        "loaders": {"name": "tensors", "global_batch_size": wish.ranks, "train": {"samples": 1000 * wish.ranks}},
        "loss": {"name": "MSELoss"},
        "optimizer": {"name": "ClockedSGD", "lr": 1e-6, "momentum": wish.momentum},
        "mlflow": {"tracking_uri": "http://127.0.0.1:9", "exit_timeout_seconds": 0, "system_metrics": False},  # nobody
        "trainer": {
            "max_steps": EVERY * wish.checkpoints + 2,
            "max_epochs": 1,
            "checkpoint_every_steps": EVERY,
            "checkpoint_dir": str(folder / f"run-{form}"),
            "keep_last": 1,
            "strategy": "fsdp",
            "fsdp": {"state_dict_type": form},
        },
    }


def measure(form: str, wish: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train and resume; what each rank noted."""
    path, found = folder / f"{form}.yaml", []
    path.write_text(yaml.safe_dump(config(form, wish, folder)))
    env = environment(folder, wish.ranks) | {"BENCH_FOLDER": str(folder), **MALLOC}
    command = [sys.executable, "-m", "dtrain", "launch", "--nproc-per-node", str(wish.ranks), str(path)]
    for more in ([], [f"trainer.max_steps={EVERY * wish.checkpoints + 3}"]):
        done = subprocess.run(
            [*command, *more], cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        if done.returncode:
            raise SystemExit(f"the training ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        found.append([json.loads((folder / f"{rank}.json").read_text()) for rank in range(wish.ranks)])
    trained, resumed = found
    return [{**one, "resumed_mb": other["loaded_mb"]} for one, other in zip(trained, resumed, strict=True)]


def told(form: str, ranks: list[dict[str, Any]]) -> str:
    """A form's figures: of all ranks, since all of them wait for the slowest."""
    plain = statistics.median(one["gaps"][str(EVERY + 1)] for one in ranks)
    steps = [step for step in ranks[0]["gaps"] if int(step) % EVERY == 0]
    stalls = [max(one["gaps"][step] for one in ranks) - plain for step in steps]
    written = [max(one[f"written_{step}_s"] for one in ranks) for step in steps]
    rows = [
        f"{form:<8} stops the loop for {', '.join(f'{seconds:.2f}' for seconds in stalls)} s; "
        f"written {', '.join(f'{seconds:.1f}' for seconds in written)} s later"
    ]
    for key, text in (("before_mb", "before"), ("peak_mb", "peak"), ("resumed_mb", "resuming")):
        rows.append(f"         {text:<9} {'  '.join(f'{one[key]:8,.0f}' for one in ranks)}  MB of ranks 0, 1, ...")
    return "\n".join(rows)


def wishes() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python scripts/bench/shards.py --parameters 50000000",
    )
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of the model (default 100000000)")
    parser.add_argument("--ranks", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD (default 0.9); 0: nothing but weights")
    parser.add_argument("--checkpoints", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser.parse_args()


def main() -> None:
    """Measure both forms, and print what was found."""
    wish, found = wishes(), {}
    size = f"{wish.parameters / 1e6:g} million parameters, {wish.dtype}"
    print(f"{size}, SGD with momentum {wish.momentum:g}, {wish.ranks} ranks; {machine()}")
    for form in ("sharded", "full"):
        with tempfile.TemporaryDirectory(prefix="shards-", dir=os.curdir) as folder:
            found[form] = measure(form, wish, Path(folder).resolve())
        print(told(form, found[form]), flush=True)
    if wish.json:
        wish.json.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
