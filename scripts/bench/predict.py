"""A sliding window over a volume, from file to file, by dtrain, by MONAI's inferer and by pytorch3dunet's predictor.

    python scripts/bench/predict.py [--rounds 7] [--sides 128 256] [--patch 64] [--overlap 0.25] [--blend gaussian]
        [--halo 8] [--f-maps 8 16 32] [--network dtrain] [--batch-size 1] [--compression gzip] [--json FILE]

All read a volume of float32 from HDF5 (chunks of 32 x 64 x 64, gzip), let one network with the same weights see each
window, and write the probabilities to HDF5; each run is a process of its own, in turn, in the other order every other
round. Two ways of overlapping, of which each program knows one, and dtrain both:

- overlap: windows overlap by `--overlap` of their sides, and their outputs are averaged by weight (`--blend`). MONAI's
  inferer as its documentation has it (SlidingWindowInferer), on a volume that h5py has read, without transforms,
  written by h5py without compression, as dtrain does by default.
- halo: windows lie side by side, are read with `--halo` voxels around them, which are cut off again. pytorch3dunet's
  StandardPredictor, which always compresses what it writes (gzip).

`--network` is whose U-Net all of them call: dtrain's and pytorch3dunet's (the same weights), or MONAI's BasicUNet.

Figures are medians over the rounds, ratios the medians of each round's ratio, in processor time of the whole process,
of all its threads; below 1, dtrain is faster. 'forward' is what the network itself took of it, 'rest' all else, from
reading to writing. 'away' is the largest difference from dtrain's probabilities (of a Gaussian,
MONAI raises what is below a thousandth, which shows at the seams), peak the process's memory.
Imports and the building of network and loaders are left out for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clock import peak_mb
from overhead import HERE, environment, machine

TIMEOUT_SECONDS = 1800.0
NAMES = {"overlap": ("MONAI", "dtrain"), "halo": ("pytorch3dunet", "dtrain")}


@dataclass
class Run:
    """One run of one program."""

    side: int
    way: str
    program: str
    cpu_s: float
    forward_s: float
    clock_s: float
    peak_mb: float
    forwards: int
    away: float = 0.0


class Clock:
    """What the calls of a function cost in processor time of the thread that makes them, which is the only one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *inputs: Any) -> Any:
        begin = time.thread_time()
        result = self.function(*inputs)
        self.seconds, self.calls = self.seconds + time.thread_time() - begin, self.calls + 1
        return result


def network(wish: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of a config."""
    if wish["network"] == "monai":
        features = [*wish["f_maps"], *[wish["f_maps"][-1]] * (5 - len(wish["f_maps"])), wish["f_maps"][0]]
        return {
            "name": "monai.networks.nets.BasicUNet",
            **{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "features": features},
        }
    name = "UNet3D" if wish["network"] == "dtrain" else "pytorch3dunet.unet3d.model.UNet3D"
    sizes = {"f_maps": wish["f_maps"], "num_groups": min(8, wish["f_maps"][0] // 2)}
    return {"name": name, "in_channels": 1, "out_channels": 1, "layer_order": "gcr", "final_sigmoid": True, **sizes}


def built(wish: dict[str, Any]) -> Any:
    """The network, with weights that depend on nothing but its sizes."""
    import importlib

    import torch

    section = network(wish)
    module, _, name = section.pop("name").rpartition(".")
    torch.manual_seed(0)
    return getattr(importlib.import_module(module or "dtrain.components.models.unet"), name)(**section)


def stride_of(wish: dict[str, Any]) -> int:
    """From window to window, as MONAI counts it."""
    return max(1, int(wish["patch"] * (1 - wish["overlap"])))


def by_dtrain(wish: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """The network, and what `dtrain predict` does."""
    import dtrain

    gaussian, side = wish["way"] == "overlap", wish["patch"]
    predictor: dict[str, Any] = {"patch_shape": [side] * 3, "batch_size": wish["batch_size"], "blend": wish["blend"]}
    predictor |= {"stride_shape": [stride_of(wish)] * 3} if gaussian else {"halo_shape": [wish["halo"]] * 3}
    predictor |= {"compression": wish["compression"]} if wish["compression"] else {}
    predictor["activation"] = "none" if wish["network"] == "pytorch3dunet" else "sigmoid"
    data = {"name": "LazyHDF5Dataset", "file_paths": wish["input"], "label_internal_path": None}
    config = {
        **{"model": network(wish), "loaders": {"predict": data}, "predictor": predictor, "device": "cpu"},
        "trainer": {"checkpoint_dir": wish["folder"] + "/run"},
    }
    trainer = dtrain.create_trainer(config, purpose="predict")

    def predict() -> None:
        trainer.predict(wish["weights"], output_dir=wish["folder"])

    return trainer.inference.forward.module, predict


def by_monai(wish: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """The network, and a sliding window as MONAI's documentation has it."""
    import h5py
    import torch
    from monai.inferers import SlidingWindowInferer
    from safetensors.torch import load_file

    model = built(wish).eval()
    model.load_state_dict(load_file(wish["weights"]))
    inferer = SlidingWindowInferer(
        roi_size=(wish["patch"],) * 3, sw_batch_size=wish["batch_size"], overlap=wish["overlap"], mode=wish["blend"]
    )

    def predict() -> None:
        with h5py.File(wish["input"], "r") as file:
            image = torch.from_numpy(file["raw"][...])[None, None]
        with torch.inference_mode():
            output = inferer(image, model)[0]
            output = output if wish["network"] == "pytorch3dunet" else output.sigmoid()
        with h5py.File(f"{wish['folder']}/volume_predictions.h5", "w") as file:
            file.create_dataset("predictions", data=output.numpy(), compression=wish["compression"])

    return model, predict


def by_pytorch3dunet(wish: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """The network, and what predict3dunet does."""
    from pytorch3dunet.datasets.utils import get_test_loaders
    from pytorch3dunet.unet3d.config import TorchDevice
    from pytorch3dunet.unet3d.predictor import StandardPredictor
    from safetensors.torch import load_file

    model = built({**wish, "network": "pytorch3dunet"})
    model.load_state_dict(load_file(wish["weights"]))
    slices = {"name": "SliceBuilder", "patch_shape": [wish["patch"]] * 3, "stride_shape": [wish["patch"]] * 3}
    slices |= {"halo_shape": [wish["halo"]] * 3, "skip_shape_check": True}
    transformer = {"raw": [{"name": "ToTensor", "expand_dims": True}]}
    loaders = {"dataset": "StandardHDF5Dataset", "batch_size": wish["batch_size"], "num_workers": 0}
    loaders |= {"test": {"file_paths": [wish["input"]], "slice_builder": slices, "transformer": transformer}}
    config = {"device": TorchDevice("cpu"), "loaders": loaders}
    predictor = StandardPredictor(model, wish["folder"], 1, TorchDevice("cpu"))

    def predict() -> None:
        for loader in get_test_loaders(config):
            predictor(loader)

    return model, predict


PROGRAMS: dict[str, Callable[[dict[str, Any]], tuple[Any, Callable[[], None]]]] = {
    **{"dtrain": by_dtrain, "MONAI": by_monai, "pytorch3dunet": by_pytorch3dunet}
}


def work(wish: dict[str, Any]) -> None:
    """One run in a process of its own."""
    model, predict = PROGRAMS[wish["program"]](wish)
    clock = model.forward = Clock(model.forward)
    begin = time.perf_counter(), time.process_time()
    predict()
    seconds, cpu_seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    found = {"cpu_s": cpu_seconds, "clock_s": seconds, "forward_s": clock.seconds, "forwards": clock.calls}
    Path(wish["folder"], "figures.json").write_text(json.dumps(found | {"peak_mb": peak_mb("self")}))


def write_input(path: Path, side: int) -> None:
    """Noise of 8 bits and a gradient, plane by plane: compressible as an image is."""
    import h5py

    with h5py.File(path, "w") as file:
        chunks = tuple(min(side, length) for length in (32, 64, 64))
        raw = file.create_dataset("raw", (side,) * 3, np.float32, chunks=chunks, compression="gzip")
        for low in range(0, side, chunks[0]):
            depth = min(chunks[0], side - low)
            noise = np.random.default_rng(low).normal(0, 32, (depth, side, side))
            raw[low : low + depth] = np.round(noise + np.linspace(-64, 64, side)) / 32


def largest_difference(one: Path, other: Path) -> float:
    """Between two files of predictions, read plane by plane."""
    import h5py

    with h5py.File(one) as first, h5py.File(other) as second:
        ours, theirs = first["predictions"], second["predictions"]
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        return max(float(np.abs(ours[:, z] - theirs[:, z]).max()) for z in range(ours.shape[1]))


def measure(wish: dict[str, Any], folder: Path) -> Run:
    """One program in a process and a folder of its own, in which its predictions stay."""
    folder.mkdir()
    wish = {**wish, "folder": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, "--work", json.dumps(wish)],
        **{"cwd": folder, "env": environment(folder, 1), "capture_output": True, "text": True},
        timeout=TIMEOUT_SECONDS,
    )
    if done.returncode:
        sys.exit(f"{wish['program']}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    figures = json.loads((folder / "figures.json").read_text())
    return Run(wish["side"], wish["way"], wish["program"], **figures)


def one_round(wish: dict[str, Any], number: int, folder: Path) -> Iterator[Run]:
    """Both programs of each way, in turn, and how far their probabilities are from each other."""
    for way in wish["ways"]:
        names = NAMES[way] if number % 2 == 0 else NAMES[way][::-1]
        runs = {}
        for name in names:
            where = folder / f"{number}-{way}-{name}"
            runs[name] = measure({**wish, "way": way, "program": name}, where)
        files = [folder / f"{number}-{way}-{name}" / "volume_predictions.h5" for name in NAMES[way]]
        runs[NAMES[way][0]].away = largest_difference(files[1], files[0])
        for file in files:
            file.unlink()
        yield from (runs[name] for name in NAMES[way])


def table(runs: Sequence[Run]) -> list[str]:
    """A line per side, way and program."""
    head = ("CPU s", "forward", "rest", "ratio", "least", "most", "of forward", "of rest", "clock s", "peak MB", "away")
    lines = ["".ljust(34) + "".join(name.rjust(11) for name in head)]
    for side, way in dict.fromkeys((run.side, run.way) for run in runs):
        of = {
            name: [run for run in runs if (run.side, run.way, run.program) == (side, way, name)] for name in NAMES[way]
        }
        for name, own in of.items():
            cells = [f"{statistics.median(values):.2f}" for values in parts(own)]
            pairs = list(zip(parts(of["dtrain"]), parts(of[NAMES[way][0]]), strict=True))
            ratios = [[ours / theirs for ours, theirs in zip(*pair, strict=True)] for pair in pairs]
            whole, forward, rest = ratios
            shown = (
                statistics.median(whole),
                min(whole),
                max(whole),
                statistics.median(forward),
                statistics.median(rest),
            )
            cells += [f"{value:.2f}" for value in shown] if name == "dtrain" else [""] * 5
            cells += [f"{statistics.median(run.clock_s for run in own):.2f}"]
            cells += [f"{max(run.peak_mb for run in own):.0f}", f"{max(run.away for run in own):.0e}"]
            title = f"{side}^3 {way}: {name}, {own[0].forwards} calls"
            lines.append(title.ljust(34) + "".join(cell.rjust(11) for cell in cells))
    return lines


def parts(runs: Sequence[Run]) -> tuple[list[float], list[float], list[float]]:
    """Processor time: all of it, the network's, the rest."""
    whole, forward = [run.cpu_s for run in runs], [run.forward_s for run in runs]
    return whole, forward, [run.cpu_s - run.forward_s for run in runs]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="example: python scripts/bench/predict.py --rounds 2"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each program runs (default 7)")
    parser.add_argument("--sides", type=int, nargs="+", default=[128], help="voxels per side of a volume (default 128)")
    parser.add_argument("--ways", nargs="+", choices=list(NAMES), default=list(NAMES), help="of overlapping")
    parser.add_argument("--patch", type=int, default=64, help="voxels per side of a window (default 64)")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window's side (default 0.25)")
    parser.add_argument("--blend", choices=["gaussian", "constant"], default="gaussian", help="(default gaussian)")
    parser.add_argument("--halo", type=int, default=8, help="voxels read around a window (default 8)")
    parser.add_argument("--f-maps", type=int, nargs="+", default=[8, 16, 32], help="channels (default 8 16 32)")
    parser.add_argument("--network", choices=["dtrain", "pytorch3dunet", "monai"], default="dtrain")
    parser.add_argument("--batch-size", type=int, default=1, help="windows at once (default 1)")
    parser.add_argument("--compression", choices=["gzip"], help="of dtrain's and MONAI's files (default none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures there, too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, and print what was found."""
    given = options()
    if given.work:
        work(json.loads(given.work))
        return
    sys.path.insert(0, str(HERE.parent.parent))
    wish = {key: value for key, value in vars(given).items() if key not in ("json", "work", "rounds", "sides")}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="predict-") as name:
        from safetensors.torch import save_file

        folder = Path(name)
        wish["weights"] = str(folder / "weights.safetensors")
        save_file(built(wish).state_dict(), wish["weights"])
        for side in given.sides:
            wish |= {"side": side, "input": str(folder / str(side) / "volume.h5")}
            (folder / str(side)).mkdir()
            write_input(Path(wish["input"]), side)
            for number in range(given.rounds):
                runs += one_round(wish, number, folder / str(side))
                print(f"{side}^3, round {number + 1} of {given.rounds}", file=sys.stderr)
    print(
        f"{given.rounds} rounds, windows of {given.patch}, {wish['network']}'s network of {given.f_maps}; {machine()}\n"
    )
    print("\n".join(table(runs)))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "runs": list(map(asdict, runs))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
