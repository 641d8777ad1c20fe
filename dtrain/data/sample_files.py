"""Which file a sample lies in, as far as its dataset lists them."""

from pathlib import Path
from typing import Any

from torch.utils.data import Subset

FILE_LISTS = ("samples", "imgs", "files", "paths", "image_paths", "image_files", "images")


def file_of(dataset: Any, index: int) -> str:
    """The file of a sample, where the dataset lists one for each; else ''."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    for name in FILE_LISTS:
        listed = getattr(dataset, name, None)
        if isinstance(listed, list | tuple) and len(listed) == len(dataset) and index < len(listed):
            item = listed[index][0] if isinstance(listed[index], list | tuple) and listed[index] else listed[index]
            if isinstance(item, str | Path):
                return str(item)
    return ""
