"""Patches read ahead, predicted in batches and put together plane by plane."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtrain.predict.inference import Inference
from dtrain.predict.patch_grid import Grid
from dtrain.predict.source import Source

AHEAD = 2  # batches that are read while one is predicted
CHUNK_BYTES = 1 << 25  # of finished planes that are handed on at once
CACHED = 1 << 16  # values that are weighed at once, so that what is between lies in a cache


class Run(NamedTuple):
    """Planes [begin, end) of a volume that are predicted in one go."""

    volume: int
    begin: int
    end: int


Patch = tuple[Run, int]  # for which run, and the patch's index in the volume's grid


def stitched(
    source: Source, runs: Iterable[Run], inference: Inference, batch_size: int
) -> Iterator[tuple[Run, Iterator[tuple[int, np.ndarray]]]]:
    """Predict runs, one after another: what the model gives, logits as a rule, before any activation.

    Patches are read ahead across the borders of runs, which are each volume's in ascending order. Small images are
    predicted several at once; the batches of a volume with several patches are the same whatever part of it a run is,
    so its result is, too, bit for bit. After each batch, the inference may raise `StoppedError`.

    Yields:
        Each run and its finished planes: the first one's position, and the planes, float32 (K, planes, ...). They are
        to be used before the next are asked for.
    """
    on_gpu = inference.forward.device.type == "cuda"

    def images(request: list[Patch]) -> tuple[list[Patch], Tensor]:
        patches = [source.patch(run.volume, index) for run, index in request]
        batch = torch.from_numpy(np.stack(patches) if len(patches) > 1 else patches[0][np.newaxis])
        return request, batch.pin_memory() if on_gpu else batch

    def outputs() -> Iterator[tuple[Run, int, Tensor]]:
        batches = _read_ahead(images, _requests(source.grids, runs, batch_size))
        started = ((request, *_predicted(batch, request, source, inference)) for request, batch in batches)
        for request, output, copied in _delayed(started, int(on_gpu)):  # a GPU computes while the last batch is used
            if copied is not None:
                copied.synchronize()
            for (run, index), prediction in zip(request, output, strict=True):
                yield run, index, prediction
            inference.advance(len(request))

    for run, items in groupby(outputs(), key=lambda item: item[0]):
        grid = source.grids[run.volume]
        yield run, _blended(grid, run, ((index, prediction) for _, index, prediction in items))


def _requests(grids: Sequence[Grid], runs: Iterable[Run], batch_size: int) -> Iterator[list[Patch]]:
    """Batches of patches. Those of one volume begin at multiples of the batch size, wherever the run begins."""
    single: list[Patch] = []  # volumes of one patch each, of the same shape
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


def _read_ahead(read: Callable[[Any], Any], requests: Iterator[Any]) -> Iterator[Any]:
    """What `read` makes of each request, in a thread that is some requests ahead."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="patches")
    try:
        for future in _delayed((pool.submit(read, request) for request in requests), AHEAD):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _delayed(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The same items, each only after `count` more have been taken."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


@torch.no_grad()  # not inference_mode: in the middle of a training a model may keep a tensor for its next step
def _predicted(images: Tensor, request: list[Patch], source: Source, inference: Inference) -> tuple[Tensor, Any]:
    """A batch's logits on the CPU without their halos; from a GPU they have arrived at the event beside them."""
    volume = request[0][0].volume
    output = source.deep(inference.output(source.flat(images)))
    extent = tuple(images.shape[2:])
    if tuple(output.shape[2:]) != extent or len(output) != len(images):
        shapes = f"the model returned {tuple(output.shape)} for patches {tuple(images.shape)}"
        raise ValueError(f"{source.volumes[volume].path}: {shapes}; prediction needs (N, K, {str(extent)[1:]}")
    inner = tuple(slice(halo, length - halo) for halo, length in zip(source.halos[volume], extent, strict=True))
    output = output[(slice(None), slice(None), *inner)].float()
    if output.device.type != "cuda":
        return output.cpu(), None
    output = output.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return output, copied


def _blended(grid: Grid, run: Run, outputs: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, np.ndarray]]:
    """Put patches together and hand on planes as soon as no further patch reaches them.

    What is held is as many planes as a patch has. Sums are float64: what all patches agree on comes out exactly.
    """
    buffer: Tensor | None = None
    base, needed = run.begin, grid.touching(run.begin, run.end)
    for index, output in outputs:
        if index not in needed:
            continue  # it only fills its batch
        first_plane = grid.corner(index)[0]
        if buffer is None:
            planes = min(grid.patch[0], run.end - run.begin)
            dtype = torch.float64 if grid.is_averaged else torch.float32
            buffer = torch.zeros((len(output), planes, *grid.shape[1:]), dtype=dtype)
        if first_plane > base:
            yield from _finished(buffer, base, first_plane)
            _move_up(buffer, first_plane - base)
            base = first_plane
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
    across = list(zip(corner[1:], stops[1:], strict=True))  # the axes after the first, on which nothing is cut off
    in_buffer = (slice(first - base, last - base), *(slice(start, stop) for start, stop in across))
    in_patch = (slice(first - corner[0], last - corner[0]), *(slice(0, stop - start) for start, stop in across))
    target, added = buffer[(slice(None), *in_buffer)], output[(slice(None), *in_patch)]
    if not grid.is_averaged:
        target.copy_(added)
        return
    along, *others = grid.weights(index)
    of_plane = torch.from_numpy(reduce(np.multiply.outer, others, np.ones(())))
    of_planes = torch.from_numpy(along).reshape(-1, *(1 for _ in others))[in_patch[0]]
    step = max(1, CACHED // added[:, 0].numel())
    for low in range(0, last - first, step):
        planes = slice(low, low + step)
        target[:, planes].addcmul_(added[:, planes] * of_plane, of_planes[planes])


def _move_up(buffer: Tensor, planes: int) -> None:
    """Drop the first planes and add as many empty ones behind."""
    length = buffer.shape[1]
    for plane in range(length - planes):  # one by one: they may overlap where they come from
        buffer[:, plane] = buffer[:, plane + planes]
    buffer[:, max(0, length - planes) :] = 0


def _finished(buffer: Tensor, base: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    count = min(end - base, buffer.shape[1])
    chunk = max(1, CHUNK_BYTES // (4 * buffer[:, 0].numel()))
    for low in range(0, count, chunk):
        yield base + low, buffer[:, low : min(low + chunk, count)].float().numpy()
