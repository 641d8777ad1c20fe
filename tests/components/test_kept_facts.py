"""What is known of many files is read once, by one process, and found anew where something changed."""

import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from dtrain.components.datasets import kept_facts, volumes
from dtrain.components.datasets.folder_lock import one_at_a_time
from dtrain.components.datasets.foreground import ForegroundDraws, ForegroundSlices
from dtrain.components.datasets.hdf5 import LazyHDF5Dataset, StandardHDF5Dataset
from dtrain.components.datasets.nifti import NiftiDataset, NiftiVolume
from dtrain.components.datasets.slices import FilterSliceBuilder
from dtrain.components.datasets.tiff_stack import TiffStackDataset, TiffVolume
from dtrain.components.datasets.zarr_store import ZarrDataset
from dtrain.components.transforms import PercentileNormalizer

COUNT = 5


def write(folder: Path, number: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    with h5py.File(folder / f"{number}.h5", "w") as file:
        file["raw"] = draw.standard_normal((4, 6, 8), dtype=np.float32)
        file["label"] = (draw.random((4, 6, 8)) < 0.3).astype(np.uint8)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, where the name of each one that is opened becomes a line of `opened`."""
    monkeypatch.setattr(kept_facts, "WORTH_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(COUNT):
        write(folder, number, number)
    before = volumes.open_hdf5

    def noted(path: Path, *settings: Any) -> Any:
        with (tmp_path / "opened").open("a") as file:
            file.write(f"{path.name}\n")
        return before(path, *settings)

    monkeypatch.setattr(volumes, "open_hdf5", noted)
    return folder


def made(folder: Path, kind: Any = LazyHDF5Dataset, **changes: Any) -> list[Any]:
    """What a start finds out: every patch's place, and the files' figures."""
    builder = FilterSliceBuilder([4, 4, 4], [2, 2, 2], **({"threshold": 0.3, "slack_acceptance": 0.1} | changes))
    dataset = kind(str(folder), slice_builder=builder, transforms=[PercentileNormalizer()], global_normalization=True)
    volumes.FILES.close()
    figures = [(dict(each), each.percentile(1.0), each.percentile(99.6)) for each in dataset.stats]
    return [list(dataset.places), figures, [volume.shape for volume in dataset.volumes]]


def read(folder: Path) -> list[str]:
    """The files that were opened since the last time."""
    note = folder.parent / "opened"
    names = note.read_text().split() if note.exists() else []
    note.write_text("")
    return sorted(names)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


def test_a_later_start_opens_no_file_and_finds_the_same(opened: Path) -> None:
    expected = made(opened)
    assert {*read(opened)} == {f"{number}.h5" for number in range(COUNT)}
    assert made(opened) == expected
    assert read(opened) == []
    with h5py.File(opened / "2.h5") as file:
        values = np.asarray(file["raw"])
    figures = expected[1][2][0]
    np.testing.assert_allclose([figures["mean"], figures["std"]], [values.mean(), values.std()], rtol=1e-6)
    assert (figures["min"], figures["max"]) == (values.min(), values.max())
    np.testing.assert_allclose(expected[1][2][1:], np.percentile(values, [1, 99.6]), rtol=1e-2)
    (path,) = kept(opened)
    path.write_text("{")
    assert made(opened) == expected, "a damaged file is as none"
    assert len(read(opened)) >= COUNT
    assert made(opened, StandardHDF5Dataset)[1] == expected[1]


def test_what_changed_is_found_anew(opened: Path) -> None:
    before = made(opened)
    read(opened)
    write(opened, 3, 77)
    after = made(opened)
    assert {*read(opened)} == {"3.h5"}
    assert [one == other for one, other in zip(after[1], before[1], strict=True)] == [True, True, True, False, True]
    (opened / "new.h5").write_bytes((opened / "0.h5").read_bytes())
    assert made(opened)[1] == [*after[1], after[1][0]]
    assert {*read(opened)} == {"new.h5"}
    assert made(opened, threshold=0.35)[0] != made(opened)[0], "other settings choose other patches"


def test_a_file_of_the_same_size_and_time_in_anothers_place_is_found_anew(opened: Path) -> None:
    """As `cp -p`, `rsync -t` and archives leave it."""
    before = made(opened)
    write(opened.parent, 0, 77)
    other, path = opened.parent / "0.h5", opened / "3.h5"
    assert other.stat().st_size == path.stat().st_size
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    read(opened)
    after = made(opened)
    assert {*read(opened)} == {"3.h5"}
    with h5py.File(path) as file:
        mean = float(np.asarray(file["raw"]).mean(dtype=np.float64))
    assert after[1][3][0]["mean"] == pytest.approx(mean)
    assert after[1][3] != before[1][3]


@pytest.mark.parametrize("kind", ["link", "virtual", "external"])
def test_of_what_lies_in_another_file_nothing_is_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the file that names it changes with it."""
    monkeypatch.setattr(kept_facts, "WORTH_SECONDS", 0.0)
    (tmp_path / "files").mkdir()
    outer, inner = tmp_path / "files/outer.h5", tmp_path / "inner"

    def fill(share: float) -> None:
        draw = np.random.default_rng(0)
        image, label = draw.standard_normal((4, 6, 8)) + share, draw.random((4, 6, 8)) < share
        if kind == "external":
            inner.write_bytes(image.astype("<f4").tobytes() + label.astype("u1").tobytes())
        else:
            with h5py.File(inner, "w") as file:
                file["raw"], file["label"] = image.astype("f4"), label.astype("u1")

    fill(0.3)
    with h5py.File(outer, "w") as file:
        begin = 0
        for name, dtype in {"raw": np.dtype("f4"), "label": np.dtype("u1")}.items():
            if kind == "link":
                file[name] = h5py.ExternalLink(str(inner), name)
            elif kind == "virtual":
                layout = h5py.VirtualLayout((4, 6, 8), dtype)
                layout[:] = h5py.VirtualSource(str(inner), name, (4, 6, 8))
                file.create_virtual_dataset(name, layout)
            else:
                size = 192 * dtype.itemsize
                file.create_dataset(name, (4, 6, 8), dtype, external=[(str(inner), begin, size)])
                begin += size

    def found() -> tuple[int, float, int]:
        places, ((figures, *_),), _ = made(tmp_path / "files")
        (draws,) = ForegroundSlices([2, 2, 2]).places_of(LazyHDF5Dataset(str(outer)).volumes).parts
        assert isinstance(draws, ForegroundDraws)
        volumes.FILES.close()
        return len(places), figures["mean"], int(draws.foreground.counts.sum())

    one = found()
    fill(0.6)
    other = found()
    assert other[0] > one[0]
    assert other[1] == pytest.approx(one[1] + 0.3, abs=1e-6)
    draw = np.random.default_rng(0)
    draw.standard_normal((4, 6, 8))
    assert other[2] == (draw.random((4, 6, 8)) < 0.6).sum() > one[2]


@pytest.mark.parametrize("kind", ["hdf5", "nifti", "tiff", "zarr"])
def test_one_process_reads_a_file_that_was_replaced(kind: str, tmp_path: Path) -> None:
    """As a notebook does, whose cells make the data once more; what is open, or known of it, is of the file before."""
    path = tmp_path / {"hdf5": "a.h5", "nifti": "a.nii", "tiff": "a.tif", "zarr": "a.zarr"}[kind]

    def write_one(factor: int) -> None:
        values = np.arange(192, dtype=np.int16).reshape(4, 6, 8)
        new = tmp_path / f"new{path.suffix}"
        if kind == "hdf5":
            with h5py.File(new, "w") as file:
                file["raw"] = values * factor
        elif kind == "nifti":
            image = nibabel.Nifti1Image(values, np.eye(4))
            image.header.set_slope_inter(factor, 0)  # the numbers on the disk are the same
            image.to_filename(new)
        elif kind == "tiff":
            tifffile.imwrite(new, values * factor, photometric="minisblack", compression="zlib")
        else:
            zarr.open_group(str(new), mode="w").create_array("raw", data=values.astype(f"i{2 * factor}") * factor)
            shutil.rmtree(path, ignore_errors=True)
        new.replace(path)

    for factor in (1, 2):
        write_one(factor)
        dataset: Any = {
            "hdf5": lambda: LazyHDF5Dataset(str(path), label_internal_path=None),
            "nifti": lambda: NiftiDataset(str(path), in_memory=False),
            "tiff": lambda: TiffStackDataset(str(path)),
            "zarr": lambda: ZarrDataset(str(path), label_internal_path=None),
        }[kind]()
        assert float(dataset[0].sum()) == factor * 191 * 192 / 2


def test_where_nothing_can_be_written_beside_the_files_it_is_kept_at_home(opened: Path) -> None:
    expected = made(opened)
    (path,) = kept(opened)
    path.unlink()
    path.mkdir()  # root may write everywhere
    for _ in range(2):
        read(opened)
        assert made(opened) == expected
    assert read(opened) == []
    assert [each.name for each in (opened.parent / "cache").rglob("*.json")] == [path.name]


def test_small_data_leave_no_file(opened: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_facts, "WORTH_SECONDS", 1e9)
    made(opened)
    assert kept(opened) == []


def _start(folder: Path, barrier: Any) -> None:
    barrier.wait(200)
    made(folder)


def test_of_ranks_that_start_together_one_reads(opened: Path) -> None:
    alone = opened.parent / "alone"
    alone.mkdir()
    for number in range(COUNT):
        write(alone, number, number)
    made(alone)
    once = read(alone)
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    ranks = [fork.Process(target=_start, args=(opened, barrier)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [os.EX_OK] * 3
    assert read(opened) == once


@pytest.mark.timeout(200)
def test_who_holds_one_folder_waits_for_no_other(tmp_path: Path) -> None:
    """Of two trainings that list the same two folders in another order, each would hold what the other waits for."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    another = os.open(folders[1], os.O_RDONLY)  # a lock is its descriptor's, so this is as another process
    fcntl.flock(another, fcntl.LOCK_EX)
    with one_at_a_time(folders[0]):
        with one_at_a_time(folders[0]), one_at_a_time(folders[1]):
            pass
        mine = os.open(folders[0], os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # the first one is still held
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(mine)
    os.close(another)


@pytest.mark.parametrize("kind", ["nifti", "tiff"])
def test_of_images_with_labels_in_files_of_their_own_a_later_start_reads_no_voxel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_facts, "WORTH_SECONDS", 0.0)
    draw = np.random.default_rng(0)

    def write_one(path: Path, values: np.ndarray) -> None:
        if kind == "tiff":
            tifffile.imwrite(path, values, photometric="minisblack")
        else:
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)

    suffix, dataset = (".tif", TiffStackDataset) if kind == "tiff" else (".nii", NiftiDataset)
    (tmp_path / "labels").mkdir()
    for number in range(3):
        write_one(tmp_path / f"{number}{suffix}", draw.standard_normal((4, 6, 8)).astype(np.float32))
        write_one(tmp_path / f"labels/{number}{suffix}", (draw.random((4, 6, 8)) < 0.3).astype(np.uint8))

    def start() -> list[Any]:
        builder = FilterSliceBuilder([4, 4, 4], [2, 2, 2], threshold=0.3, slack_acceptance=0.1)
        made = dataset(
            str(tmp_path), str(tmp_path / "labels"), slice_builder=builder, transforms=[PercentileNormalizer()],
            global_normalization=True, in_memory=False,
        )  # fmt: skip
        return [list(made.places), [(dict(each), each.percentile(99.6)) for each in made.stats]]

    def refuse(*_: Any) -> Any:
        raise AssertionError("a volume is read again")

    expected = start()
    with monkeypatch.context() as patched:
        for name in ("read", "read_label"):
            patched.setattr(NiftiVolume if kind == "nifti" else TiffVolume, name, refuse)
        assert start() == expected
    write_one(tmp_path / f"labels/1{suffix}", np.ones((4, 6, 8), np.uint8))
    found = start()
    assert found[1] == expected[1] and len(found[0]) > len(expected[0]), "a new label: other patches"
