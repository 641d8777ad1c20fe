"""Where a name leads: the user's modules, dtrain's components, the libraries; read from source text, not imported."""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, bad_syntax, found, shown
from dtrain.config.signatures import SOURCE, Callee, Dynamic, is_standard, module_file, spec_folders

STANDARD = "from the standard library, which a config may not name"
LIBRARIES = {  # where a section's bare names are searched, after the user's modules
    "model": (
        "dtrain.components.models", "torch.nn",
        "monai.networks.nets", "vit_pytorch.vit", "pytorch3dunet.unet3d.model", "torchvision.models",
    ),
    "loaders": (
        "dtrain.components.datasets", "dtrain.components.transforms", "torch.utils.data",
        "monai.transforms", "monai.data", "torchvision.transforms", "torchvision.datasets",
    ),
    "sampler": ("dtrain.components.samplers", "torch.utils.data"),
    "loss": ("dtrain.components.losses", "torch.nn", "torch.nn.functional", "monai.losses"),
    "metrics": (
        "dtrain.components.metrics", "torchmetrics", "torchmetrics.classification", "torchmetrics.segmentation",
        "torchmetrics.functional", "monai.metrics",
    ),
    "optimizer": ("torch.optim",),
    "lr_scheduler": ("torch.optim.lr_scheduler",),
    "trackers": ("dtrain.components.trackers",),
}  # fmt: skip
ALL_LIBRARIES = tuple(dict.fromkeys(library for libraries in LIBRARIES.values() for library in libraries))


class Found(NamedTuple):
    """What a name leads to, and where else the same bare name would have been found."""

    target: Callee | Dynamic
    also: tuple[str, ...] = ()


def locate(name: Any, modules: Sequence[str], libraries: Sequence[str], nested: bool = False) -> Found:
    """What a bare name or a full path (`package.module:Name` or `package.module.Name`) leads to.

    A bare name is searched in the user's `modules` first, then in the section's `libraries`; inside another call
    (`nested`) in those of the other sections, too. A ConfigError where there is no such name or it may not be used, a
    SyntaxError where one of the user's modules is not Python.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"expected the name of a class or a function, {found(name)}")
    parts = re.split(r"[.:]", name)
    if not all(part.isidentifier() and not part.startswith("__") for part in parts) or name.count(":") > 1:
        raise ConfigError(f"{shown(name)} is not a valid name of a class or a function")
    if len(parts) > 1:
        _check_package(name, parts, modules)
        return Found(_follow_path(name, parts))
    hits = {module: SOURCE.lookup(module, name) for module in modules}
    searched = dict.fromkeys((*libraries, *(ALL_LIBRARIES if nested else ())))
    for module in searched:
        with contextlib.suppress(SyntaxError):  # an optional library for another Python is as good as none
            hits[module] = SOURCE.search(module, name)
    targets = list(dict.fromkeys(item for item in hits.values() if isinstance(item, Callee | Dynamic)))
    if targets:
        certain = [item for item in targets if isinstance(item, Callee) or item.certain]
        first, *others = certain or targets
        return Found(first, tuple(f"{item.module}.{item.name}" for item in others))
    for module, item in hits.items():
        if isinstance(item, str) and is_standard(item):
            raise ConfigError(f"'{name}' of {module} is '{item}' {STANDARD}")
    places = [*modules, *filter(module_file, libraries)]
    others_too = " and the other sections' libraries" if nested else ""
    hint = _similar(name, [*modules, *libraries])
    raise ConfigError(f"there is no '{name}'{hint}; searched {', '.join(places)}{others_too}")


def module_mistake(name: Any) -> str:
    """What is wrong with an entry of `modules`; empty where it can be read."""
    if not isinstance(name, str):
        return f"expected the name of a module, {found(name)}"
    if is_standard(name):
        return f"'{name}' is {STANDARD}"
    try:
        if all(SOURCE.module(item) for item in (name.rpartition(".")[0] or name, name)):
            return ""
    except SyntaxError as error:
        return bad_syntax(error)
    if "/" in name or name.endswith(".py"):
        module = ".".join(part for part in Path(name).with_suffix("").parts if part not in (".", "/"))
        return f"{shown(name)} is a path; a module is named as in Python, such as {module}"
    local = [item.stem for item in Path().iterdir() if item.suffix == ".py" or item.is_dir()]
    cure = "; one that may be missing is listed under optional_modules"
    return f"there is no module {shown(name)} here or installed{did_you_mean(name, local)}{cure}"


def _similar(name: str, searched: Sequence[str]) -> str:
    """The nearest names of where it was searched; of all libraries if none of those is near."""
    if hint := did_you_mean(name, set().union(*map(SOURCE.names, searched))):
        return hint
    for library in ALL_LIBRARIES:
        if name in SOURCE.names(library):
            return f"; did you mean {library}.{name}?"
    return did_you_mean(name, set().union(*map(SOURCE.names, ALL_LIBRARIES)))


def _check_package(name: str, parts: Sequence[str], modules: Sequence[str]) -> None:
    """Refuse a full path whose package is not there or may not be used."""
    package = parts[0]
    if is_standard(package):
        raise ConfigError(f"'{name}' is {STANDARD}")
    if module_file(package) is None:
        known = [*modules, *(library.partition(".")[0] for library in ALL_LIBRARIES)]
        raise ConfigError(f"there is no package '{package}'{did_you_mean(package, known)}")
    path = f"{'.'.join(parts)}."
    if not any(path.startswith(f"{module}.") for module in modules) and not is_installed(package):
        module = name.partition(":")[0] if ":" in name else ".".join(parts[:-1])
        raise ConfigError(f"'{package}' is neither installed nor under 'modules'; add it there: modules: [{module}]")


def _follow_path(name: str, parts: Sequence[str]) -> Callee | Dynamic:
    """A full path, followed through the source text from its package on."""
    module = parts[0]
    for index, part in enumerate(parts[1:], 1):
        meaning = SOURCE.lookup(module, part)
        if meaning is None:
            raise ConfigError(f"'{module}' has no '{part}'{did_you_mean(part, SOURCE.names(module))}")
        if isinstance(meaning, str) and is_standard(meaning):
            raise ConfigError(f"'{name}' leads to '{meaning}' {STANDARD}")
        if not isinstance(meaning, str):
            rest = parts[index + 1 :]
            return Dynamic(meaning.module, ".".join([meaning.name, *rest])) if rest else meaning
        module = meaning
    raise ConfigError(f"'{name}' is a module; expected a class or a function in it")


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a top-level module was installed, also as editable, rather than merely lying in the current folder."""
    if package == __name__.partition(".")[0]:  # a checkout on PYTHONPATH is as good as installed
        return True
    origin, folders = spec_folders(package)
    homes = [folder.parent for folder in folders] or ([origin.parent] if origin else [])
    records = (record for home in homes for kind in ("*.dist-info", "*.egg-info") for record in home.glob(kind))
    if any(home.name in ("site-packages", "dist-packages") for home in homes) or any(records):
        return True
    return any(home.is_relative_to(folder) for home in homes for folder in _editable_folders())


def _editable_folders() -> Iterator[Path]:
    """Where editable installations lie: pip records it (PEP 610), older tools put the folder on the path."""
    for site in (Path(item) for item in sys.path if Path(item).name in ("site-packages", "dist-packages")):
        for record in site.glob("*.dist-info/direct_url.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
                facts = json.loads(record.read_bytes())
                if facts["dir_info"]["editable"]:
                    yield Path(unquote(urlparse(facts["url"]).path))
        for file in site.glob("*.pth"):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            yield from (Path(line) for line in lines if Path(line).is_absolute() and Path(line).is_dir())
