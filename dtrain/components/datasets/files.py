"""Which files a config means, and what their outputs are called. Knows no file's inside and nothing of the engine."""

from collections.abc import Sequence
from pathlib import Path


def found_files(wish: str | Sequence[str], suffixes: Sequence[str], key: str, kind: str) -> list[Path]:
    """The files that a list of files, folders and patterns stands for.

    Args:
        wish: One or several: a file; a folder, which stands for the files with one of the suffixes in it; or a pattern
            with *, ? or [...], where ** stands for any folders. ~ is the home folder.
        suffixes: The endings that count in folders, in lower case.
        key: The argument's name, for messages.
        kind: What the files are, for messages.

    Returns:
        Absolute paths without links; those of a folder or pattern sorted.

    Raises:
        FileNotFoundError: There is no such file, or none in a folder.
        ValueError: A file is meant twice, or the list is empty.
    """
    result: list[Path] = []
    for item in [wish] if isinstance(wish, str) else wish:
        path = Path(item).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if _is_one(file, suffixes))
            if not found:
                raise FileNotFoundError(f"{key}: no {kind} in the folder {path}; endings: {', '.join(suffixes)}")
        elif any(sign in item for sign in "*?[") and not path.exists():
            anchor = Path(path.anchor)
            found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
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


def _is_one(file: Path, suffixes: Sequence[str]) -> bool:
    return file.name.lower().endswith(tuple(suffixes)) and not file.name.startswith(".") and file.is_file()
