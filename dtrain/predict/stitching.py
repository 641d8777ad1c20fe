"""Patches read ahead, predicted in batches and put together plane by plane; knows no file format, config or rank."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dtrain.predict.patches import Grid, Region

AHEAD = 2  # batches that are read while one is predicted
CHUNK_BYTES = 1 << 25  # of finished planes that are handed on at once

READING = Lock()  # files are read by one thread at a time: not every volume bears more


class Volume(Protocol):
    """What is predicted; dtrain's own datasets have a list of them, `volumes`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    channels: int
    has_label: bool

    def read(self, region: Region) -> np.ndarray:
        """The image, float32 (C, *region); what lies outside is reflected."""

    def read_label(self, region: Region) -> np.ndarray:
        """The label, (*region) or (K, *region)."""


class Run(NamedTuple):
    """Planes [begin, end) of a volume that are predicted in one go."""

    volume: int
    begin: int
    end: int


class Source(NamedTuple):
    """Where patches come from.

    Attributes:
        volumes: What is predicted.
        grids: The patches of each.
        halos: What is read around each patch, by volume.
        sample: A volume's number and a region -> what stands there.
        prepared: A sample -> as the model is to get it.
    """

    volumes: Sequence[Volume]
    grids: Sequence[Grid]
    halos: Sequence[Sequence[int]]
    sample: Callable[[int, Region], dict[str, Any]]
    prepared: Callable[[dict[str, Any]], dict[str, Any]]

    def patch(self, volume: int, index: int) -> np.ndarray:
        """One patch with its halo, (C, *spatial).

        Raises:
            ValueError: The transforms gave it another extent.
        """
        region = self.grids[volume].region(index, self.halos[volume])
        with READING:
            image = np.asarray(self.prepared(self.sample(volume, region))["image"], np.float32)
        extent = tuple(part.stop - part.start for part in region)
        if image.shape[1:] != extent:
            raise ValueError(
                f"{self.volumes[volume].path}: the transforms made a patch of {image.shape[1:]} of one of {extent}; "
                "prediction needs transforms that keep the extent"
            )
        return image


class Network(NamedTuple):
    """What turns patches into predictions.

    Attributes:
        forward: Images (N, C, *spatial) on the device -> logits (N, K, *spatial).
        activation: Logits -> predictions.
        device: Where the model is.
    """

    forward: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    device: torch.device


class StoppedError(Exception):
    """Somebody asked to stop."""


Predicted = Iterator[tuple[Run, Iterator[tuple[int, np.ndarray]]]]


def stitched(
    source: Source, runs: Iterable[Run], network: Network, batch_size: int, step: Callable[[int], None]
) -> Predicted:
    """Predict runs, one after another.

    Patches are read ahead across the borders of runs. Small images are predicted several at once; the batches of a
    volume with several patches are the same whatever part of it a run is, so its result is, too, bit for bit.

    Args:
        source: Where patches come from.
        runs: What to predict; each volume's in ascending order.
        network: What predicts.
        batch_size: Patches that the model gets at once.
        step: Called after each batch with the number of its patches; may raise `StoppedError`.

    Yields:
        Each run and its finished planes: the first one's position, and the planes, float32 (K, planes, ...). They are
        to be used before the next are asked for.
    """
    requests = _requests(source.grids, runs, batch_size)

    def images(request: list[tuple[Run, int]]) -> tuple[list[tuple[Run, int]], Tensor]:
        patches = [source.patch(run.volume, index) for run, index in request]
        batch = torch.from_numpy(np.stack(patches) if len(patches) > 1 else patches[0][np.newaxis])
        return request, batch.pin_memory() if network.device.type == "cuda" else batch

    def outputs() -> Iterator[tuple[Run, int, Tensor]]:
        for request, batch in _predicted(_ahead(images, requests), source, network):
            for (run, index), output in zip(request, batch, strict=True):
                yield run, index, output
            step(len(request))

    for run, items in groupby(outputs(), key=lambda item: item[0]):
        grid = source.grids[run.volume]
        yield run, _blended(grid, run, ((index, output) for _, index, output in items))


def _requests(grids: Sequence[Grid], runs: Iterable[Run], batch_size: int) -> Iterator[list[tuple[Run, int]]]:
    """Batches of patches. Those of one volume begin at multiples of the batch size, wherever the run begins."""
    single: list[tuple[Run, int]] = []
    for run in runs:
        grid = grids[run.volume]
        if single and (len(grid) > 1 or len(single) == batch_size or grid.patch != grids[single[0][0].volume].patch):
            yield single
            single = []
        if len(grid) == 1:
            single.append((run, 0))
            continue
        needed = grid.touching(run.begin, run.end)
        for low in range(needed.start // batch_size * batch_size, needed.stop, batch_size):
            yield [(run, index) for index in range(low, min(low + batch_size, len(grid)))]
    if single:
        yield single


def _ahead(read: Callable[[Any], Any], requests: Iterator[Any]) -> Iterator[Any]:
    """Read in a thread, some requests ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="patches") as pool:
        waiting: deque[Any] = deque()
        try:
            for request in requests:
                waiting.append(pool.submit(read, request))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _predicted(batches: Iterator[Any], source: Source, network: Network) -> Iterator[tuple[Any, Tensor]]:
    """Predictions on the CPU without their halos. On a GPU one batch is computed while the last is copied and used."""
    waiting: tuple[Any, Tensor, Any] | None = None
    for request, images in batches:
        volume = request[0][0].volume
        output = _one_batch(images, source.halos[volume], network, source.volumes[volume].path)
        arrived = None
        if network.device.type == "cuda":
            output = output.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        if waiting is not None:
            yield _arrived(waiting)
        waiting = request, output, arrived
        if arrived is None:
            yield _arrived(waiting)
            waiting = None
    if waiting is not None:
        yield _arrived(waiting)


def _arrived(waiting: tuple[Any, Tensor, Any]) -> tuple[Any, Tensor]:
    request, output, arrived = waiting
    if arrived is not None:
        arrived.synchronize()
    return request, output.cpu()


@torch.inference_mode()
def _one_batch(images: Tensor, halo: Sequence[int], network: Network, path: Path) -> Tensor:
    output = network.forward(images.to(network.device, non_blocking=True))
    extent = tuple(images.shape[2:])
    if tuple(output.shape[2:]) != extent or len(output) != len(images):
        raise ValueError(
            f"{path}: the model made {tuple(output.shape)} of patches {tuple(images.shape)}; "
            f"prediction needs one of (N, K, {str(extent)[1:]}"
        )
    inner = tuple(slice(around, length - around) for around, length in zip(halo, extent, strict=True))
    return network.activation(output[(slice(None), slice(None), *inner)].float())


def _blended(grid: Grid, run: Run, outputs: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, np.ndarray]]:
    """Put patches together and hand on planes as soon as no further patch reaches them.

    What is held is as many planes as a patch has. Sums are float64: what all patches agree on comes out exactly.
    """
    buffer: Tensor | None = None
    base, needed = run.begin, grid.touching(run.begin, run.end)
    for index, output in outputs:
        if index not in needed:
            continue  # it only fills its batch
        corner = grid.corner(index)
        if buffer is None:
            planes = min(grid.patch[0], run.end - run.begin)
            dtype = torch.float64 if grid.overlaps else torch.float32
            buffer = torch.zeros((len(output), planes, *grid.shape[1:]), dtype=dtype)
        if corner[0] > base:
            yield from _finished(buffer, base, corner[0])
            _move_up(buffer, corner[0] - base)
            base = corner[0]
        _add(buffer, base, run.end, grid, index, output)
    if buffer is not None:
        yield from _finished(buffer, base, run.end)


def _add(buffer: Tensor, base: int, end: int, grid: Grid, index: int, output: Tensor) -> None:
    """Add a patch, or what lies of it in the planes from `base` to `end`, to the buffer that begins at `base`."""
    corner = grid.corner(index)
    stops = [min(start + length, extent) for start, length, extent in zip(corner, grid.patch, grid.shape, strict=True)]
    first, last = max(corner[0], base), min(stops[0], end)
    if first >= last:
        return
    inside = tuple(slice(start, stop) for start, stop in zip(corner[1:], stops[1:], strict=True))
    target = buffer[(slice(None), slice(first - base, last - base), *inside)]
    planes = slice(first - corner[0], last - corner[0])
    own = (planes, *(slice(0, stop - start) for start, stop in zip(corner[1:], stops[1:], strict=True)))
    if grid.overlaps:
        target.addcmul_(output[(slice(None), *own)], torch.from_numpy(grid.weight(index)[own]))
    else:
        target.copy_(output[(slice(None), *own)])


def _move_up(buffer: Tensor, planes: int) -> None:
    """Drop the first planes and make room for as many behind."""
    length = buffer.shape[1]
    for plane in range(length - planes):  # one by one: they may overlap where they come from
        buffer[:, plane] = buffer[:, plane + planes]
    buffer[:, max(0, length - planes) :] = 0


def _finished(buffer: Tensor, base: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    count = min(end - base, buffer.shape[1])
    chunk = max(1, CHUNK_BYTES // (4 * buffer[:, 0].numel()))
    for low in range(0, count, chunk):
        yield base + low, buffer[:, low : min(low + chunk, count)].float().numpy()
