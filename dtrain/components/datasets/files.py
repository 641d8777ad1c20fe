"""Which files a config means, and what their outputs are called."""

from collections.abc import Sequence
from pathlib import Path


def found_files(
    wish: str | Sequence[str], suffixes: Sequence[str], key: str, kind: str, marks: Sequence[str] = ()
) -> list[Path]:
    """The files that a list of files, folders and patterns stands for.

    Args:
        wish: One or several: a file; a folder, which stands for the files with one of the suffixes in it; or a pattern
            with *, ? or [...], where ** stands for any folders. ~ is the home folder.
        suffixes: The endings that count in folders, in lower case.
        key: The argument's name, for messages.
        kind: What the files are, for messages.
        marks: Where a "file" is itself a folder, as a Zarr store is: it holds an entry of one of these names.

    Returns:
        Absolute paths without links; those of a folder or pattern sorted.

    Raises:
        FileNotFoundError: There is no such file, or none in a folder.
        ValueError: A file is meant twice, or the list is empty.
    """
    result: list[Path] = []
    for item in [wish] if isinstance(wish, str) else wish:
        path = Path(item).expanduser()
        if path.is_dir() and marks and _is_there(path, marks):
            found = [path]
        elif path.is_dir():
            found = sorted(file for file in path.iterdir() if _is_one(file, suffixes, marks))
            if not found:
                raise FileNotFoundError(f"{key}: no {kind} in the folder {path}; endings: {', '.join(suffixes)}")
        elif any(sign in item for sign in "*?[") and not path.exists():
            anchor = Path(path.anchor)
            found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if _is_there(file, marks))
            if not found:
                raise FileNotFoundError(f"{key}: no file fits the pattern {item}")
        elif not path.is_file():
            raise FileNotFoundError(f"{key}: there is no file or folder {path}")
        else:
            found = [path]
        result += [file.resolve() for file in found]
    if not result:
        raise ValueError(f"{key} is empty; expected files or folders")
    if (
        twice := sorted({str(path) for path in result if result.count(path) > 1})
        if len(set(result)) < len(result)
        else []
    ):
        raise ValueError(f"{key}: {', '.join(twice)} is meant more than once")
    return result


def stem_of(path: Path, suffixes: Sequence[str]) -> str:
    """The file's name without its ending, also one with two dots such as .nii.gz."""
    ending = max((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), key=len, default=path.suffix)
    return path.name[: len(path.name) - len(ending)]


def paired(
    images: Sequence[Path], labels: Sequence[Path], label_suffix: str, suffixes: Sequence[str]
) -> list[tuple[Path, Path]]:
    """Each image with the label of the same stem, in the images' order.

    Args:
        images: Files; those that are labels are left out, so that both may lie in one folder.
        labels: Files; with a suffix, those whose stem does not end with it are left out.
        label_suffix: What a label's stem has behind the image's.
        suffixes: The endings that are not part of a stem.

    Raises:
        ValueError: An image without a label, a label without an image, or two of the same stem.
    """
    labels = [path for path in labels if stem_of(path, suffixes).endswith(label_suffix)]
    known = set(labels) if label_suffix else set()
    of_labels: dict[str, Path] = {}
    of_images: dict[str, Path] = {}
    for path in labels:
        _add(of_labels, stem_of(path, suffixes).removesuffix(label_suffix), path)
    for path in images:
        if path not in known:
            _add(of_images, stem_of(path, suffixes), path)
    alone = [str(of_images[stem]) for stem in of_images.keys() - of_labels.keys()]
    without = [str(of_labels[stem]) for stem in of_labels.keys() - of_images.keys()]
    if alone or without:
        texts = [f"no label for {_told(alone)}"] * bool(alone) + [f"no image for {_told(without)}"] * bool(without)
        behind = f" and '{label_suffix}'" if label_suffix else ""
        raise ValueError(f"{'; '.join(texts)}; a label is called as its image{behind}, but for the ending")
    return [(path, of_labels[stem]) for stem, path in of_images.items()]


def _add(known: dict[str, Path], stem: str, path: Path) -> None:
    if stem in known:
        raise ValueError(f"{known[stem]} and {path} have the same stem, so that no pair can be told")
    known[stem] = path


def _told(files: list[str]) -> str:
    return ", ".join(sorted(files)[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def one_line(error: BaseException) -> str:
    """What another library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def version_of(file: Path) -> list[int]:
    """What tells one version of a file from another without reading it; nothing of a file that is not there.

    The time of its last change of any kind is in it, which no program can set: a copy with the time of the original
    (`cp -p`, `rsync -t`, an archive), put in the file's place, is of the same size and time as that may be.
    """
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def unique_names(paths: Sequence[Path], stems: Sequence[str]) -> list[str]:
    """A name for each file: its stem; with as many folders in front as tell all apart, or else with its number.

    Args:
        paths: Absolute.
        stems: The files' names without their endings.
    """
    for depth in range(min(len(path.parts) for path in paths) - 1):
        names = ["_".join((*path.parts[-1 - depth : -1], stem)) for path, stem in zip(paths, stems, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [f"{stem}_{number}" for number, stem in enumerate(stems)]


def _is_one(file: Path, suffixes: Sequence[str], marks: Sequence[str]) -> bool:
    return file.name.lower().endswith(tuple(suffixes)) and not file.name.startswith(".") and _is_there(file, marks)


def _is_there(file: Path, marks: Sequence[str]) -> bool:
    """Whether it is a file, or a folder that stands for one."""
    return any((file / mark).is_file() for mark in marks) if marks else file.is_file()
