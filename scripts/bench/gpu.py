"""Training on a GPU by dtrain and by a hand-written loop with the same settings, in turn; started by gpu.sh.

    python scripts/bench/gpu.py [--device cuda] [--scale full] [--works unet3d pidnet-s] [--steps 60] [--rounds 3]
        [--no-compile] [--no-published] [--json FILE]

UNet3D (volumes of 64 x 128 x 128, four at a time) and PIDNet-S (twelve images of 1024 x 1024) in bf16 and
channels_last, AdamW with fused kernels, with and without torch.compile. The ratio is by hand / dtrain, the median over
the rounds: 0.99 and more is promised. Beside it: for how much of ten traced steps the device has no kernel and no copy
(torch.profiler), and what dtrain's thread works more than the hand-written loop's in a step. Then UNet3D of
volumes.yaml from HDF5, with dtrain and with pytorch3dunet as published, where that package is installed.

`--device cpu --scale small` rehearses all of it without a GPU; the figures then mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from overhead import HERE, Verdict, environment, machine

LEAST_RATIO, MOST_IDLE, MOST_HOST_US = 0.99, 0.01, 150.0
TIMEOUT_SECONDS = 280.0
PUBLISHED_PATCH = (32, 64, 64)


def own_environment(device: str, folder: Path) -> dict[str, str]:
    """Of a worker."""
    env = environment(folder, 1) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if device == "cuda":
        del env["CUDA_VISIBLE_DEVICES"]  # hidden from the benchmarks of CPUs
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    return env


def run(command: list[str], device: str, folder: Path, out: Path) -> Any:
    """What a worker has found; RuntimeError, with the end of what it said, where it failed."""
    log = folder / "output"
    with log.open("wb") as output:
        env = own_environment(device, folder)
        done = subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=output, timeout=TIMEOUT_SECONDS)
    if done.returncode or not out.is_file():
        raise RuntimeError(f"exit status {done.returncode}\n{log.read_text(errors='replace')[-2000:]}")
    return json.loads(out.read_text())


def measure(wish: argparse.Namespace, work: str, way: str) -> list[dict[str, Any]]:
    """The rounds of one work."""
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as name:
        out = Path(name) / "figures.json"
        script = [sys.executable, str(HERE / "gpu_worker.py")]
        words = [work, way, wish.device, wish.scale, str(wish.steps), str(wish.rounds), str(out)]
        found: list[dict[str, Any]] = run(script + words, wish.device, Path(name), out)
        return found


def median(found: list[dict[str, Any]], program: str, key: str) -> float:
    """Over the rounds of a program."""
    return statistics.median(one[key] for one in found if one["program"] == program)


def ratios(found: list[dict[str, Any]]) -> list[float]:
    """By hand / dtrain of each round."""
    times = {(one["round"], one["program"]): one["step_ms"] for one in found}
    return [times[number, "by hand"] / times[number, "dtrain"] for number in sorted({one["round"] for one in found})]


def told(work: str, way: str, found: list[dict[str, Any]]) -> list[Verdict]:
    """Print what was found of a work, and return what is to be judged of it."""
    rounds = ratios(found)
    hand, ours = (median(found, program, "step_ms") for program in ("by hand", "dtrain"))
    more = median(found, "dtrain", "host_us") - median(found, "by hand", "host_us")
    line = f"{work}, {way}: by hand {hand:.3f} ms, dtrain {ours:.3f} ms, ratio {statistics.median(rounds):.3f}"
    print(f"{line} ({min(rounds):.3f} to {max(rounds):.3f}); dtrain's thread {more:+.0f} us per step", end="")
    verdicts = [
        Verdict(f"{work}, {way}: dtrain / by hand", 1 / statistics.median(rounds), 1 / LEAST_RATIO),
        Verdict(f"{work}, {way}: the host's more work, us", more, MOST_HOST_US),
    ]
    if all(one["idle"] is not None for one in found):
        idle = {program: median(found, program, "idle") for program in ("by hand", "dtrain")}
        print(f"; device idle by hand {idle['by hand']:.2%}, dtrain {idle['dtrain']:.2%}", end="")
        verdicts.append(Verdict(f"{work}, {way}: device idle", idle["dtrain"], MOST_IDLE))
    print(flush=True)
    return verdicts


def published(wish: argparse.Namespace) -> dict[str, float]:
    """Samples per second of a whole training step of volumes.yaml, by program; what is not installed is left out."""
    import volumes

    patch = PUBLISHED_PATCH if wish.scale == "full" else (16, 16, 16)
    part = volumes.Part("training", "training", 4 if wish.scale == "full" else 0, 100 if wish.scale == "full" else 2)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-volumes-") as name:
        volumes.write_inputs(Path(name), None, patch)
        for program in (volumes.THEIRS, volumes.OURS):
            if program == volumes.THEIRS and find_spec("pytorch3dunet") is None:
                print("pytorch3dunet is not installed here: give its wheel to see it beside dtrain (docs/gpu.md)")
                continue
            folder = Path(name) / program
            folder.mkdir()
            path, out = volumes.config_of(part, patch, Path(name), folder), folder / "figures.json"
            config = yaml.safe_load(path.read_text()) | {"device": wish.device}
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            words = [program, part.kind, str(path), str(part.count), str(out)]
            script = [sys.executable, str(HERE / "volumes_worker.py")]
            found[program] = run(script + words, wish.device, folder, out)["samples_per_s"]
            print(f"UNet3D from HDF5, {program}: {found[program]:.2f} patches per second", flush=True)
    return found


def main() -> int:
    """Measure all, and say what is promised; 1 where a measurement failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "small"], default="full", help="small: a rehearsal")
    parser.add_argument("--works", nargs="*", default=["unet3d", "pidnet-s"], choices=["unet3d", "pidnet-s"])
    parser.add_argument("--steps", type=int, default=60, help="that are timed in each round (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-published", action="store_true", help="leave pytorch3dunet out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    wish = parser.parse_args()
    began, failed = time.monotonic(), 0
    print(f"{device_text(wish.device)}; {machine()}", flush=True)
    verdicts: list[Verdict] = []
    figures: dict[str, Any] = {}
    for way in ["plain"] if wish.no_compile else ["plain", "compile"]:
        for work in wish.works:
            try:
                figures[f"{work}, {way}"] = found = measure(wish, work, way)
                verdicts += told(work, way, found)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"FAIL {work}, {way}: {error}", flush=True)
    if not wish.no_published:
        try:
            figures["published"] = published(wish)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAIL published: {error}", flush=True)
    print("what is promised: what was found, and the most that it may be", *(v.line() for v in verdicts), sep="\n")
    print(f"{time.monotonic() - began:.0f} s in all")
    if wish.json:
        data = {"machine": machine(), "device": device_text(wish.device), "figures": figures}
        wish.json.write_text(json.dumps(data | {"verdicts": [*map(asdict, verdicts)]}, indent=1) + "\n")
    return 1 if failed else 0


def device_text(device: str) -> str:
    """What computes."""
    import torch

    versions = f"torch {torch.__version__}"
    if device == "cpu":
        return f"a rehearsal on the CPU, {versions}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
