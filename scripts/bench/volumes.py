"""Volumes by dtrain and by pytorch3dunet: the same files, the same config, in turn.

    python scripts/bench/volumes.py [--rounds 3] [--count 8] [--parts training] [--workers 0 2] [--patch 32 64 64]
        [--memory-mb 64] [--json FILE]

Both programs read one file of pytorch-3dunet's format (volumes.yaml), so that patches, strides, halo, transforms,
model, loss and optimizer are the same, and do their work in a process of their own, in turn:

- pipeline: training patches from HDF5 with flips, rotations, elastic deformation and noise, through their own loader
- training: the whole of it, from one optimizer step of a UNet3D to the next
- prediction: of two volumes with a halo, from reading the input to the end of the output files
- memory: the peak of a process that trains on, and of one that predicts, a volume that is read lazily

Figures are medians over the rounds, ratios the medians of each round's ratio, time by time: below 1, dtrain is faster.
'CPU' is the processor time of the process itself, 'all' that of its loader workers as well (a prediction's have ended
by then, and are left out): on a busy machine that says more than the clock on the wall.
Each process has one thread for its computations. TensorBoard is left out of pytorch3dunet; MLflow,
journal and checkpoints are part of dtrain.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import HERE, Verdict, environment, machine

THEIRS, OURS = "pytorch3dunet", "dtrain"
TIMEOUT_SECONDS = 900.0
MOST_RATIO = 1.0
MOST_OF_A_STEP = {0: 0.40, 2: 0.45}  # by the number of loader workers
MOST_MORE_MB = 20.0
LAZY_MODEL: dict[str, Any] = {"f_maps": [2, 4], "num_groups": 1}  # small: memory is what matters there

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What is measured, and how often: `count` batches, steps or patches."""

    name: str
    kind: str  # what the worker is asked for
    workers: int
    count: int
    lazy: bool = False


@dataclass
class Run:
    """One run of one program."""

    part: str
    program: str
    samples_per_s: float
    cpu_ms: float  # of the process's own processor time per sample
    all_cpu_ms: float  # with its loader workers
    peak_mb: float


def parts(count: int, workers: Sequence[int], memory: Shape | None, patch: Shape) -> list[Part]:
    """All parts; `memory` is the shape of the volume that is read lazily."""
    both = [(kind, number) for kind in ("pipeline", "training") for number in workers]
    found = [Part(f"{kind}, {number} worker(s)", kind, number, count) for kind, number in both]
    volume = twice(patch)
    found += [Part(f"prediction, {n} worker(s)", "prediction", n, 2 * patches(volume, patch)) for n in workers]
    if memory:
        found.append(Part("lazy training", "pipeline", 0, count, lazy=True))
        found.append(Part("lazy prediction", "prediction", 0, patches(memory, patch), lazy=True))
    return found


def twice(patch: Shape) -> Shape:
    """A volume on which time is measured."""
    return tuple(2 * side for side in patch)


def patches(shape: Shape, patch: Shape) -> int:
    """Patches of one volume in prediction: they do not overlap, but for the last ones."""
    return math.prod(-(-side // length) for side, length in zip(shape, patch, strict=True))


def write_volume(path: Path, shape: Shape, written: Shape, seed: int) -> None:
    """Smooth noise, and as label where it is high; 0 beyond the part that is written, which so needs no disk."""
    import h5py
    from scipy.ndimage import gaussian_filter

    block = tuple(map(min, shape, written))
    raw = gaussian_filter(np.random.default_rng(seed).standard_normal(block, dtype=np.float32), 2)
    where = tuple(slice(length) for length in block)
    chunks = tuple(min(32, length) for length in block)
    with h5py.File(path, "w") as file:
        for name, values in (("raw", raw / raw.std()), ("label", (raw > 0).astype(np.uint8))):
            file.create_dataset(name, tuple(shape), values.dtype, chunks=chunks, compression="gzip")[where] = values


def lazy_shape(megabytes: int, patch: Shape) -> Shape | None:
    """A volume of float32 of about so many 10^6 bytes: large planes, and at least a patch deep; None for 0."""
    planes = max(patch[0], round(megabytes * 1e6 / 4 / 512**2))
    return (planes, max(512, patch[1]), max(512, patch[2])) if megabytes else None


def write_inputs(folder: Path, memory: Shape | None, patch: Shape) -> None:
    """The volumes that both programs read, and weights for the prediction."""
    import torch

    from dtrain.components.models.unet import UNet3D

    for number in range(4):
        write_volume(folder / f"{number}.h5", twice(patch), twice(patch), number)
    if memory:
        write_volume(folder / "lazy.h5", memory, twice(patch), 4)
    template = yaml.safe_load((HERE / "volumes.yaml").read_text())["model"]
    for name, changes in (("weights", {}), ("lazy-weights", LAZY_MODEL)):
        model = UNet3D(**{key: value for key, value in (template | changes).items() if key != "name"})
        torch.save({"model_state_dict": model.state_dict()}, folder / f"{name}.pytorch")


def config_of(part: Part, patch: Shape, inputs: Path, folder: Path) -> Path:
    """The config of one run, in the run's own folder; pytorch3dunet writes into lazy inputs, so each run has a copy."""
    config: dict[str, Any] = yaml.safe_load((HERE / "volumes.yaml").read_text())
    loaders = config["loaders"]
    files = [str(inputs / f"{number}.h5") for number in range(4)]
    loaders |= {"num_workers": part.workers, "output_dir": str(folder / "predictions")}
    for phase, chosen in (("train", files[:2]), ("val", files[2:3]), ("test", files[2:])):
        loaders[phase]["file_paths"] = chosen
        stride = [side // 2 if phase == "train" else side for side in patch]
        loaders[phase]["slice_builder"] |= {"patch_shape": list(patch), "stride_shape": stride}
    if part.lazy:
        copy = folder / "lazy.h5"
        copy.write_bytes((inputs / "lazy.h5").read_bytes())
        loaders["dataset"] = "LazyHDF5Dataset"
        loaders["train" if part.kind == "pipeline" else "test"]["file_paths"] = [str(copy)]
        config["model"] |= LAZY_MODEL
        config["predictor"]["name"] = "LazyPredictor"
    config["model_path"] = str(inputs / ("lazy-weights.pytorch" if part.lazy else "weights.pytorch"))
    config["trainer"] |= {"checkpoint_dir": str(folder / "run"), "max_num_iterations": part.count + 4}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def measure(part: Part, patch: Shape, program: str, inputs: Path) -> Run:
    """Run one part of one program in a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="volumes-") as name:
        folder = Path(name)
        path, out = config_of(part, patch, inputs, folder), folder / "figures.json"
        command = [
            sys.executable,
            str(HERE / "volumes_worker.py"),
            program,
            part.kind,
            str(path),
            str(part.count),
            str(out),
        ]
        env = {**environment(folder, 1), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        with (folder / "output").open("wb") as output:
            done = subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=output, timeout=TIMEOUT_SECONDS)
        if done.returncode or not out.is_file():
            shown = (folder / "output").read_text(errors="replace")[-3000:]
            sys.exit(f"{part.name}, {program}: exit status {done.returncode}\n{shown}")
        return Run(part.name, program, **json.loads(out.read_text()))


def schedule(rounds: int, wanted: Sequence[Part]) -> Iterator[tuple[int, Part, str]]:
    """(round, part, program): in turn, and in the other order every other round; memory once."""
    for number in range(rounds):
        for part in wanted:
            if part.lazy and number:
                continue
            for program in (THEIRS, OURS) if number % 2 == 0 else (OURS, THEIRS):
                yield number, part, program


def of(runs: Sequence[Run], part: Part, program: str) -> list[Run]:
    """The runs of one part of one program, in the order of rounds."""
    return [run for run in runs if (run.part, run.program) == (part.name, program)]


def ratio(runs: Sequence[Run], part: Part, figure: str) -> float:
    """dtrain's time over pytorch3dunet's: the median of each round's ratio."""
    pairs = zip(of(runs, part, OURS), of(runs, part, THEIRS), strict=True)
    values = [getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs]
    return statistics.median(1 / value if figure == "samples_per_s" else value for value in values)


def table(runs: Sequence[Run], wanted: Sequence[Part]) -> list[str]:
    """What was measured, one line per part and program."""
    head = ("samples per s", "least", "most", "time ratio", "CPU ms", "ratio", "all CPU ms", "ratio", "peak MB")
    lines = ["".ljust(38) + "".join(name.rjust(14) for name in head)]
    for part in wanted:
        for program in (THEIRS, OURS):
            own = of(runs, part, program)
            rates = [run.samples_per_s for run in own]
            cells = [f"{value:.2f}" for value in (statistics.median(rates), min(rates), max(rates))]
            ours = program == OURS
            cells += [f"{ratio(runs, part, 'samples_per_s'):.3f}" if ours else ""]
            cells += [f"{statistics.median(run.cpu_ms for run in own):.0f}"]
            cells += [f"{ratio(runs, part, 'cpu_ms'):.3f}" if ours else ""]
            cells += [f"{statistics.median(run.all_cpu_ms for run in own):.0f}"]
            cells += [f"{ratio(runs, part, 'all_cpu_ms'):.3f}" if ours else ""]
            cells += [f"{statistics.median(run.peak_mb for run in own):.0f}"]
            lines.append(f"{part.name}: {program}".ljust(38) + "".join(cell.rjust(14) for cell in cells))
    return lines


def verdicts(runs: Sequence[Run], wanted: Sequence[Part]) -> list[Verdict]:
    """What is promised against what was found."""
    found = []
    for part in wanted:
        if not part.lazy:
            most = MOST_OF_A_STEP if part.kind == "training" else {}
            for what, figure in (("time", "samples_per_s"), ("processor time, with workers,", "all_cpu_ms")):
                text = f"{part.name}: {what} per sample / {THEIRS}"
                found.append(Verdict(text, ratio(runs, part, figure), most.get(part.workers, MOST_RATIO)))
            continue
        more_mb = of(runs, part, OURS)[0].peak_mb - of(runs, part, THEIRS)[0].peak_mb
        found.append(Verdict(f"{part.name}: peak memory, more than {THEIRS}", more_mb, MOST_MORE_MB, " MB"))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/volumes.py --rounds 2"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each program runs (default 3)")
    parser.add_argument("--count", type=int, default=8, help="batches or steps of a run (default 8)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="pipeline, training, prediction, lazy; default: all")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader workers (default 0 2)")
    parser.add_argument("--memory-mb", type=int, default=64, help="the lazy volume's size; 0: none (default 64)")
    parser.add_argument(
        "--patch", type=int, nargs=3, default=[32, 64, 64], help="voxels of a patch, multiples of 2 (default 32 64 64)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every run's figures and the verdicts there, too"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, and print what was found and what was promised."""
    wish = options()
    sys.path.insert(0, str(HERE.parent.parent))
    patch = tuple(wish.patch)
    memory = lazy_shape(wish.memory_mb, patch)
    wanted = parts(wish.count, wish.workers, memory, patch)
    if wish.parts:
        wanted = [part for part in wanted if part.name.partition(",")[0].partition(" ")[0] in wish.parts]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="volumes-inputs-") as folder:
        write_inputs(Path(folder), memory, patch)
        for number, part, program in schedule(wish.rounds, wanted):
            run = measure(part, patch, program, Path(folder))
            runs.append(run)
            where = f"round {number + 1}, {part.name}, {program}"
            print(f"{where}: {run.samples_per_s:.2f} samples per s, {run.peak_mb:.0f} MB", file=sys.stderr)
    print(
        f"{wish.rounds} rounds of {wish.count}, patches of {patch}; {machine()}; lazy volume of {wish.memory_mb} MB\n"
    )
    print("\n".join(table(runs, wanted)))
    found = verdicts(runs, wanted)
    print("\nwhat is promised: what was found, and the most that it may be")
    print("\n".join(verdict.line() for verdict in found))
    if wish.json:
        data = {"machine": machine(), "runs": list(map(asdict, runs)), "verdicts": list(map(asdict, found))}
        wish.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
