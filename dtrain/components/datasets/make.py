"""python -m dtrain.components.datasets.make: writes the synthetic datasets as files.

Layout below OUTPUT, a folder for each split:

- HDF5: SPLIT/volume-0000.h5 with `raw` float32 (D, H, W) or (C, D, H, W) and `label` (D, H, W); an image has D = 1;
  rows of teeth: SPLIT/rows.h5 with `features`, `boxes`, `mask` and `label`, the rows along the first axis.
- images: SPLIT/images/0000.png, grey or RGB, and SPLIT/masks/0000.png with the classes as they are, 8 bits each.
"""

import argparse
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.components.datasets.cell_volume import CellVolume
from dtrain.components.datasets.digits_scene import DigitsScene
from dtrain.components.datasets.tooth_arch import ToothArch

KINDS: dict[str, type] = {"cell-volume": CellVolume, "digits-scene": DigitsScene, "tooth-arch": ToothArch}
SPLITS = ("train", "val", "test")
NOT_ASKED = {"split", "length", "fresh"}  # said by --split and --count; files are what they are in each epoch
EXAMPLE = """\
example:
  python -m dtrain.components.datasets.make cell-volume --output data/cells --split train val test --count 16 4 8
  python -m dtrain.components.datasets.make digits-scene --format images --output data/scenes --count 256
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: What stands behind the program's name; default: this process's own.

    Returns:
        The exit status: 0 written; 1 it could not be written; 2 the command line is wrong. Then nothing was written.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    kind, output, splits, count = (given.pop(key) for key in ("kind", "output", "split", "count"))
    form = given.pop("format", "hdf5")
    if len(count) not in (1, len(splits)) or min(count) < 1:
        parser.error(f"--count {' '.join(map(str, count))}: expected one number from 1 on, or one for each split")
    if len({*splits}) != len(splits):
        parser.error(f"--split {' '.join(splits)}: a split is named twice")
    counts = dict(zip(splits, count if len(count) > 1 else count * len(splits), strict=True))
    try:
        make(KINDS[kind], Path(output), counts, form, **given)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    except (OSError, ModuleNotFoundError) as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    print(f"wrote {', '.join(f'{number} of {split}' for split, number in counts.items())} to {output}")
    return 0


def make(kind: type, output: Path, counts: dict[str, int], form: str = "hdf5", **options: Any) -> None:
    """Writes a dataset's items as files, all splits or none. The same call writes the same bytes.

    Args:
        kind: CellVolume, DigitsScene or ToothArch.
        output: The folder below which each split gets its own.
        counts: How many items of each split.
        form: "hdf5", or "images" for DigitsScene.
        options: Arguments of `kind` for all splits.

    Raises:
        FileExistsError: A split's folder is there already.
        ValueError: `kind` refuses its arguments, or a form that does not fit it.
        ModuleNotFoundError: h5py, Pillow, or what `kind` needs, is not installed.
    """
    _refuse_existing(output, counts)
    data = {split: kind(split, length=number, **options) for split, number in counts.items()}
    write: Callable[[Any, Path], None] = _write_rows if kind is ToothArch else _write_volumes
    if form == "images":
        if kind is not DigitsScene or options.get("channels", 1) not in (1, 3):
            raise ValueError("images can be written of digits-scene with 1 or 3 channels; take --format hdf5")
        write = _write_images
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for split, dataset in data.items():
            (unfinished / split).mkdir()
            write(dataset, unfinished / split)
        _sync(unfinished)
        output.mkdir(exist_ok=True)
        _refuse_existing(output, counts)
        for split in counts:
            (unfinished / split).rename(output / split)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dtrain.components.datasets.make",
        description="Write a synthetic dataset as files: the same command writes the same bytes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for name, kind in KINDS.items():
        summary = (inspect.getdoc(kind) or "").partition("\n")[0]
        own = kinds.add_parser(
            name, help=summary, description=summary, epilog=EXAMPLE, formatter_class=parser.formatter_class
        )
        own.add_argument("--output", required=True, metavar="FOLDER", help="each split becomes a folder in it")
        own.add_argument("--split", nargs="+", default=["train"], choices=SPLITS, help="default: train")
        own.add_argument("--count", nargs="+", type=int, required=True, metavar="N", help="items, of each split or all")
        if kind is DigitsScene:
            own.add_argument("--format", choices=("hdf5", "images"), default="hdf5", help="default: hdf5")
        _add_options(own, kind)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for each argument of the dataset, with its default's type and its line of the docstring."""
    told = dict(re.findall(r"^    (\w+): ([^\n]+(?:\n {8}[^\n]+)*)", inspect.getdoc(kind) or "", re.M))
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in NOT_ASKED:
            continue
        default = parameter.default
        several = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if several else default
        text = " ".join(told[name].split()).replace("%", "%%")
        more: dict[str, Any] = {"type": type(default), "metavar": name[0].upper()}
        if isinstance(default, bool):
            more = {"action": argparse.BooleanOptionalAction}
        elif several:
            more = {"type": type(default[0]), "metavar": name[0].upper(), "nargs": "+"}
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, default=default, help=f"{text} Default: {shown}.", **more
        )


def _write_volumes(dataset: CellVolume | DigitsScene, folder: Path) -> None:
    for index in range(len(dataset)):
        image, label = (part.numpy() for part in dataset[index])
        if label.ndim == 2:
            image, label = image[:, None], label[None]
        _write_hdf5(
            folder / f"volume-{index:04d}.h5",
            raw=image[0] if len(image) == 1 else image,
            label=label.astype(np.uint16 if label.max() > 255 else np.uint8),
        )


def _write_rows(dataset: ToothArch, folder: Path) -> None:
    items = [((*inputs, label)) for inputs, label in (dataset[index] for index in range(len(dataset)))]
    names = ("features", "boxes", "mask", "label")
    columns = {name: np.stack([item[place].numpy() for item in items]) for place, name in enumerate(names)}
    _write_hdf5(folder / "rows.h5", **columns)


def _write_hdf5(file: Path, **arrays: np.ndarray) -> None:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("HDF5 files need h5py: pip install h5py") from error
    with h5py.File(file, "x") as opened:
        for name, array in arrays.items():
            opened.create_dataset(name, data=array)


def _write_images(dataset: DigitsScene, folder: Path) -> None:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PNG images need Pillow: pip install pillow") from error
    images, masks = folder / "images", folder / "masks"
    images.mkdir()
    masks.mkdir()
    for index in range(len(dataset)):
        image, label = (part.numpy() for part in dataset[index])
        bytes_ = np.round(255 * image).astype(np.uint8)
        Image.fromarray(bytes_[0] if len(bytes_) == 1 else np.moveaxis(bytes_, 0, -1)).save(images / f"{index:04d}.png")
        Image.fromarray(label.astype(np.uint8)).save(masks / f"{index:04d}.png")


def _refuse_existing(output: Path, splits: Sequence[str] | dict[str, int]) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; name a folder")
    if there := [str(output / split) for split in splits if (output / split).exists()]:
        raise FileExistsError(f"{', '.join(there)} is there already; remove it, or name another --output")


def _sync(folder: Path) -> None:
    """Has all below a folder on the disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
