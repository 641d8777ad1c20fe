"""The grid of patches: every voxel is shared whole, and slabs cover the volume once."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predicting import (
    grids,
)

from dtrain.predict.patch_grid import Grid


@given(grids(), st.sampled_from(["gaussian", "constant"]))
@settings(max_examples=60, deadline=None)
def test_the_patches_of_a_voxel_share_it_whole(sizes: Any, blend: Any) -> None:
    shape, patch, stride, _ = sizes
    grid = Grid(shape, patch, stride, blend)
    total, most = np.zeros(shape), np.zeros(shape, int)
    for index in range(len(grid)):
        weight = reduce(np.multiply.outer, grid.weights(index))
        assert (weight > 0).all()
        place = tuple(slice(at, at + side) for at, side in zip(grid.corner(index), weight.shape, strict=True))
        total[place] += weight
        most[place] += 1
    assert np.allclose(total, 1, atol=1e-14)
    assert (most.max() > 1) == grid.is_averaged


@given(grids(), st.data())
@settings(max_examples=30, deadline=None)
def test_touching_names_the_patches_of_some_planes_and_no_others(sizes: Any, data: st.DataObject) -> None:
    shape, patch, stride, _ = sizes
    grid = Grid(shape, patch, stride, "constant")
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    reaches = [index for index in range(len(grid)) if grid.corner(index)[0] < end]
    reaches = [index for index in reaches if grid.corner(index)[0] + patch[0] > begin]
    assert list(grid.touching(begin, end)) == reaches


@given(grids(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_slabs_cover_the_volume_once(sizes: Any, least: int) -> None:
    shape, patch, stride, _ = sizes
    slabs = Grid(shape, patch, stride, "constant").slabs(least)
    assert [plane for begin, end in slabs for plane in range(begin, end)] == list(range(shape[0]))
    assert len(slabs) == 1 or min(end - begin for begin, end in slabs) >= least


@given(grids())
@settings(max_examples=60, deadline=None)
def test_the_last_patch_of_a_voxel_may_have_it_alone(sizes: Any) -> None:
    shape, patch, stride, _ = sizes
    grid = Grid(shape, patch, stride, "last")
    owner, total = np.zeros(shape, int), np.zeros(shape)
    for index in range(len(grid)):
        weight = reduce(np.multiply.outer, grid.weights(index))
        place = tuple(slice(at, at + side) for at, side in zip(grid.corner(index), weight.shape, strict=True))
        total[place] += weight * index
        owner[place] = index  # what is written last stays
    assert np.array_equal(total, owner)
    assert not grid.is_averaged


def test_the_gaussian_is_the_published_one() -> None:
    weights = [Grid((32,), (16,), (8,), "gaussian").weights(index)[0] for index in range(3)]
    ratio = weights[0][11] / weights[1][3]  # voxel 11: 3.5 from the first patch's middle, 4.5 from the second's
    assert ratio == pytest.approx(np.exp(-0.5 * (3.5**2 - 4.5**2) / 2**2))
