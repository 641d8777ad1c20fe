"""Pictures of validations: what is drawn pixel by pixel, from which samples, and what whole trainings leave of them."""

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Result, RunCli
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset, Subset, TensorDataset

from dtrain import create_trainer, load_config
from dtrain.config.errors import ConfigError
from dtrain.data.samplers import EvaluationShard
from dtrain.data.seeded_samples import batch_loader
from dtrain.dataloader import loader_settings
from dtrain.modelloader import Outcome
from dtrain.reporting import png_drawing, sample_panel, validation_pictures
from dtrain.reporting.classification_errors import confusion_matrix
from dtrain.reporting.number_text import short_count
from dtrain.reporting.picture_time import PictureTime
from dtrain.reporting.png_drawing import (
    ERROR,
    IGNORED,
    PALETTE,
    Key,
    Tile,
    colour_of,
    coloured,
    fitted,
    matrix,
    png,
    sheet,
)
from dtrain.reporting.sample_panel import compared
from dtrain.reporting.validation_pictures import Album, Pictures, chosen, kind_of, pair_to_draw, source_of
from dtrain.tracking.journal import Journal

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------------------------------------------------ drawing


def pixels_of(image: Any) -> np.ndarray:
    return np.asarray(image)


def has(image: Any, colour: tuple[int, int, int], least: int = 20) -> bool:
    return int((pixels_of(image) == colour).all(axis=-1).sum()) >= least


def test_the_first_colours_are_all_different_and_none_is_that_of_an_error() -> None:
    assert len({*PALETTE, ERROR, IGNORED}) == len(PALETTE) + 2
    assert colour_of(len(PALETTE)) == PALETTE[1] and colour_of(2 * len(PALETTE)) == PALETTE[2]


def test_labels_get_their_colours() -> None:
    labels, ignored = np.array([[0, 1], [40, 2]]), np.array([[False, False], [False, True]])
    assert coloured(labels, ignored).tolist() == [
        [[*PALETTE[0]], [*PALETTE[1]]],
        [[*colour_of(40)], [*IGNORED]],
    ]


def test_a_sheet_holds_its_tiles_and_the_colours_of_its_legend() -> None:
    tile = RNG.integers(0, 255, (50, 70, 3)).astype(np.uint8)
    keys = [Key(colour_of(number), f"class {number}") for number in range(20)]
    image = sheet("sample 1", [[Tile("input", tile), Tile("target", tile[:20])], [Tile("a", tile)]], keys, ["a note"])
    found = pixels_of(image)
    places = [
        (y, x)
        for y, x in np.argwhere((found == tile[0, 0]).all(axis=-1))
        if np.array_equal(found[y : y + 20, x : x + 70], tile[:20])
    ]
    assert len(places) == 3
    assert places[0][0] == places[1][0], "two tiles of a row begin at different heights"
    assert places[0][1] == places[2][1], "two tiles of a column begin at different places"
    assert all(has(image, key.colour) for key in keys)


def test_nothing_is_written_beyond_the_edge() -> None:
    keys = [Key(colour_of(number), f"class {number} with a long name") for number in range(8)]
    image = sheet("a title " * 60, [[Tile("t" * 30, np.zeros((30, 30, 3), np.uint8))]], keys, ["a note " * 90])
    edge = pixels_of(image)
    assert (edge[:, -8:] == 255).all() and (edge[-8:] == 255).all() and (edge[:, :8] == 255).all()


def test_a_text_that_does_not_fit_loses_its_middle() -> None:
    name = "a" * 100 + "-the-end.h5"
    short_name = fitted(name, 200, 14)
    assert short_name.startswith("aaa") and short_name.endswith("-end.h5") and " ... " in short_name
    assert fitted("short", 200, 14) == "short"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1234, "1.2k"), (9960, "10k"), (123456, "123k"), (3_400_000, "3.4M")]
)
def test_counts_are_short(number: int, text: str) -> None:
    assert short_count(number) == text


def test_a_matrix_is_coloured_by_the_share_of_the_row() -> None:
    image = matrix("", np.array([[10, 0], [0, 10]]), ["0", "1"])
    assert has(image, png_drawing.RIGHT, 1000) and not has(image, ERROR, 300)
    assert has(matrix("", np.array([[0, 10], [10, 0]]), ["0", "1"]), ERROR, 1000)


def test_a_png_holds_its_facts() -> None:
    data = png(sheet("t", []), {"step": "12"})
    assert Image.open(io.BytesIO(data)).text["step"] == "12"  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------------- panel


def logits(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 0)


def tiles_of(image: np.ndarray | None, target: np.ndarray, output: np.ndarray) -> list[list[Tile]]:
    return sample_panel.panel(image, target, output).rows


def reduced(tile: Tile, shape: tuple[int, ...]) -> np.ndarray:
    """A tile with one pixel for each of the plane's."""
    assert tile.pixels is not None
    times = tile.pixels.shape[0] // shape[0]
    assert tile.pixels.shape[:2] == (shape[0] * times, shape[1] * times)
    return tile.pixels[::times, ::times]


def test_the_error_tile_marks_exactly_the_wrong_pixels() -> None:
    target = RNG.integers(0, 4, (24, 17))
    prediction = np.where(RNG.random(target.shape) < 0.1, (target + 1) % 4, target)
    target[:3] = -100
    wrong = (prediction != target) & (target >= 0)
    image = RNG.random((1, 24, 17)).astype(np.float32)
    ((shown, truth, guess, error),) = tiles_of(image, target, logits(prediction, 4))
    assert [tile.title.split()[0] for tile in (shown, truth, guess, error)] == [
        "input", "target", "prediction", "error",
    ]  # fmt: skip
    assert np.array_equal((reduced(error, target.shape) == ERROR).all(axis=-1), wrong)
    assert np.array_equal(reduced(guess, target.shape), coloured(prediction, np.zeros_like(wrong)))
    assert np.array_equal(reduced(truth, target.shape), coloured(np.where(target < 0, 0, target), target < 0))
    share = wrong.sum() / (target >= 0).sum()
    assert error.title == f"error {share:.2%}"


def test_the_legend_names_the_classes_that_occur() -> None:
    target = np.array([[0, 2], [2, -1]])
    found = sample_panel.panel(None, target, logits(np.array([[0, 5], [2, 0]]), 6))
    assert [key.text for key in found.legend] == ["class 0", "class 2", "class 5", "ignored", "wrong"]
    image = sheet("t", found.rows, found.legend)
    assert all(has(image, key.colour) for key in found.legend)


def test_one_channel_is_its_sign() -> None:
    target = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    (view,) = compared(target[None], np.array([[[-0.1, 0.1], [-3, 3]]], dtype=np.float32))
    assert view.prediction.tolist() == [[0, 1], [0, 1]] and view.error.tolist() == [[False, False], [True, True]]


def test_several_channels_have_a_row_each() -> None:
    target = RNG.integers(0, 2, (6, 8, 8))
    target[:, 0] = 1  # of all channels: they are no classes that exclude one another
    found = sample_panel.panel(np.zeros((2, 8, 8), np.float32), target, RNG.normal(size=(6, 8, 8)))
    assert [row[1].title for row in found.rows] == [f"target, channel {number}" for number in range(4)]
    assert found.notes == ["channels 0 to 3 of 6"] and found.rows[0][0].title.startswith("input, channel 0 of 2")


def test_one_hot_targets_are_classes() -> None:
    labels = RNG.integers(0, 3, (8, 8))
    (view,) = compared(logits(labels, 3), logits(labels, 3))
    assert np.array_equal(view.target, labels) and not view.error.any()


def test_values_are_gray_in_the_targets_range_and_their_errors_red() -> None:
    target = np.linspace(0, 10, 64, dtype=np.float32).reshape(8, 8)
    output = target[None].copy()
    output[0, 3, 4] += 5
    found = sample_panel.panel(None, target, output)
    ((truth, guess, error),) = found.rows
    assert truth.title == "target [0.02, 9.98]"  # nearly the smallest and the largest
    red = reduced(error, (8, 8))
    assert (red[3, 4] == ERROR).all() and (np.delete(red.reshape(-1, 3), 28, axis=0) == 255).all()
    assert reduced(guess, (8, 8))[0, 0].tolist() == [0, 0, 0] and reduced(guess, (8, 8))[7, 7].tolist() == [255] * 3
    assert [key.text for key in found.legend] == ["no error", "largest error"]


def test_what_is_not_a_number_is_an_error_and_stops_nothing() -> None:
    target = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    output = target[None] * np.float32("nan")
    (row,) = tiles_of(output, target, output)
    assert (reduced(row[3], (4, 4)) == ERROR).all()


def test_one_wrong_pixel_of_a_large_image_is_seen() -> None:
    target = np.zeros((1100, 700), dtype=np.int64)
    prediction = target.copy()
    prediction[1001, 333] = 1
    (row,) = tiles_of(np.zeros((3, 1100, 700), np.float32), target, logits(prediction, 2))
    assert row[3].pixels is not None and max(row[3].pixels.shape) <= 512
    assert int((row[3].pixels == ERROR).all(axis=-1).sum()) == 1


def test_planes_go_through_the_most_foreground() -> None:
    target = np.zeros((8, 10, 12), dtype=np.int64)
    target[2, :, :] = 1
    target[:, 7, :] = 1
    rows = tiles_of(np.zeros((1, 8, 10, 12), np.float32), target, logits(target, 2))
    assert [row[0].title.split(" [")[0] for row in rows] == ["input, z 2 of 8", "input, y 7 of 10", "input, x 6 of 12"]
    shapes = [row[1].pixels.shape[:2] for row in rows if row[1].pixels is not None]
    assert [(high // 17, wide // 17) for high, wide in shapes] == [(10, 12), (8, 12), (8, 10)]  # 208 // 12 is 17


def test_planes_without_foreground_are_the_middle() -> None:
    target = np.zeros((8, 10, 12), dtype=np.int64)
    rows = tiles_of(None, target, logits(target, 2))
    assert [row[0].title for row in rows] == ["target, z 4 of 8", "target, y 5 of 10", "target, x 6 of 12"]


def test_a_smaller_output_is_brought_to_the_targets_size() -> None:
    target = np.repeat(np.repeat(np.array([[0, 1], [1, 0]]), 4, axis=0), 4, axis=1)
    (view,) = compared(target, logits(np.array([[0, 1], [1, 0]]), 2))
    assert not view.error.any()


@pytest.mark.parametrize(("target", "output"), [((4, 8, 8), (2, 8, 8)), ((8,), (2, 8, 8)), ((8, 8), (2, 8))])
def test_shapes_that_do_not_fit_are_named(target: tuple[int, ...], output: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a target of shape \(.*\) and an output of shape \(.*\)"):
        compared(np.zeros(target), np.zeros(output))


# -------------------------------------------------------------------------------------- samples, batches and the album


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("output", "target", "kind"),
    [
        (torch.zeros(4, 3), whole(4), "classes"),
        (torch.zeros(4, 3), whole(4, 1), "classes"),
        (torch.zeros(4, 3, 7), whole(4, 7), "classes"),
        (torch.zeros(4, 3), torch.zeros(4), ""),
        (torch.zeros(4, 1), whole(4, 1), ""),
        (torch.zeros(4), whole(4), ""),
        (torch.zeros(4, 3, 8, 8), whole(4, 8, 8), "dense"),
        (torch.zeros(4, 1, 8, 8, 8), torch.zeros(4, 1, 8, 8, 8), "dense"),
        (torch.zeros(4, 3, 8, 8), whole(4), ""),
        ("text", whole(4), ""),
    ],
)
def test_what_is_drawn_is_seen_by_shapes_and_types(output: Any, target: Any, kind: str) -> None:
    assert kind_of(output, target) == kind


def test_of_several_heads_the_first_with_a_picture_is_drawn_and_the_keys_pair_it() -> None:
    mask, image = torch.zeros(2, 4, 4, dtype=torch.long), torch.zeros(2, 3, 4, 4)
    output = {"features": torch.zeros(2), "mask": image, "score": torch.zeros(2)}
    target = {"score": torch.ones(2), "mask": mask, "weight": torch.ones(2)}
    drawn = pair_to_draw(SimpleNamespace(output=output, target=target))
    assert drawn[0] is image and drawn[1] is mask
    with pytest.raises(ValueError, match="several keys in common"):
        pair_to_draw(SimpleNamespace(output=output | {"mask": mask[0]}, target=target))


def test_samples_are_spread_evenly() -> None:
    assert chosen(4, 100) == [12, 37, 62, 87]
    assert chosen(4, 3) == [0, 1, 2] and chosen(1, 9) == [4] and chosen(0, 9) == []
    assert chosen([7, 2], 9) == [7, 2]
    with pytest.raises(ValueError, match="the validation data have no sample 9; possible: 0 to 8"):
        chosen([1, 9], 9)


def test_many_classes_are_those_with_the_most_errors_and_one_for_the_others() -> None:
    pairs = {(number, number): 10 for number in range(100)} | {(number, number + 1): number for number in range(90)}
    counts, names, note = confusion_matrix(pairs, 100)
    assert counts.sum() == sum(pairs.values()) and counts.shape == (30, 30)
    assert names == [*map(str, range(61, 90)), "other"]
    assert note == "the 29 classes with the most errors; the other 71 as one class"
    counts, names, note = confusion_matrix({(29, 0): 3}, 30)
    assert counts.shape == (30, 30) and counts[29, 0] == 3 and not note


def test_the_file_of_a_sample_is_found_through_subsets_and_wrappers() -> None:
    region = (slice(0, 16), slice(-4, 60))
    patches = SimpleNamespace(volumes=[SimpleNamespace(path=Path("/x/a.h5"))] * 2, places=[(1, region)] * 3)
    assert source_of(patches, 2) == "a.h5 [0:16, -4:60]"
    assert source_of(SimpleNamespace(source=patches), 0) == "a.h5 [0:16, -4:60]"
    numbered = SimpleNamespace(volumes=patches.volumes, places=[(0, region), (0, (slice(5, 6),))])
    assert source_of(Subset(numbered, [1]), 0) == "a.h5 [5:6]"  # type: ignore[arg-type]
    assert source_of(TensorDataset(torch.zeros(3)), 0) == ""


class Notes:
    """A journal and a progress that remember."""

    def __init__(self) -> None:
        self.images: list[tuple[str, str, int]] = []
        self.lines: list[str] = []

    def image(self, path: str, key: str, step: int) -> None:
        self.images.append((path, key, step))


def loader_of(dataset: Dataset, batch_size: int, rank: int = 0, ranks: int = 1) -> Any:
    options = loader_settings()
    for key in ("batch_size", "global_batch_size", "shuffle", "drop_last"):
        del options[key]
    options["pin_memory"] = False
    return batch_loader(dataset, 3, EvaluationShard(len(dataset), rank, ranks, batch_size), options)  # type: ignore[arg-type]


def validate(dataset: Dataset, model: Callable[[Any], Any], folder: Path, ranks: int = 1, **more: Any) -> Notes:
    """A validation in which ranks take turns; each has its own album."""
    notes = Notes()
    step, settings = more.pop("step", 5), more
    loaders = [loader_of(dataset, 8, rank, ranks) for rank in range(ranks)]
    albums = [Pictures(loader, folder, settings).album(step, notes, notes.lines.append) for loader in loaders]

    def forward(module: Any, batch: Any) -> Any:
        return None, {}, Outcome(batch[0], module(batch[0]), batch[1])

    for rank, (loader, album) in enumerate(zip(loaders, albums, strict=True)):
        assert album is not None
        for number, (batch, samples) in enumerate(loader.counted()):
            album.see(forward(model, batch)[2], rank + number * ranks, samples)
    seen = [album.seen() for album in albums if album]
    assert isinstance(albums[0], Album)
    albums[0].draw(seen, model, forward)  # type: ignore[arg-type]
    albums[0]._pictures.finish()
    return notes


@pytest.fixture
def labelled() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (29,), generator=generator)
    y[4] = -100
    return TensorDataset(torch.rand(29, 1, 6, 6, generator=generator), y)


def scores(x: torch.Tensor) -> torch.Tensor:
    return 5 * x.flatten(1)[:, :3].float()


def facts_of(path: Path) -> dict[str, str]:
    return Image.open(path).text  # type: ignore[attr-defined]


def test_the_confusion_matrix_counts_every_sample_once(labelled: TensorDataset, tmp_path: Path) -> None:
    notes = validate(labelled, scores, tmp_path)
    x, y = labelled.tensors
    expected = np.zeros((3, 3), dtype=int)
    for truth, guess in zip(y.tolist(), scores(x).argmax(1).tolist(), strict=True):
        if truth >= 0:
            expected[truth, guess] += 1
    folder = tmp_path / "pictures" / "step-00000005"
    assert json.loads(facts_of(folder / "confusion.png")["counts"]) == expected.tolist()
    assert expected.sum() == 28
    assert notes.lines == []
    assert notes.images == [
        ("pictures/step-00000005/confusion.png", "val/confusion", 5),
        ("pictures/step-00000005/worst.png", "val/worst", 5),
    ]


def test_the_worst_errors_come_first_and_are_all_wrong(labelled: TensorDataset, tmp_path: Path) -> None:
    validate(labelled, scores, tmp_path, worst=5)
    x, y = labelled.tensors
    loss = torch.nn.functional.cross_entropy(scores(x), y, reduction="none")
    wrong = (scores(x).argmax(1) != y) & (y >= 0)
    expected = [index for index in loss.argsort(descending=True).tolist() if wrong[index]][:5]
    assert json.loads(facts_of(tmp_path / "pictures/step-00000005/worst.png")["samples"]) == expected


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_several_ranks_draw_what_one_draws(labelled: TensorDataset, tmp_path: Path, ranks: int) -> None:
    for count in (1, ranks):  # of five ranks one has no batch
        validate(labelled, scores, tmp_path / str(count), count)
    for name in ("confusion.png", "worst.png"):
        one, several = (tmp_path / str(count) / "pictures/step-00000005" / name for count in (1, ranks))
        assert one.read_bytes() == several.read_bytes()


def test_errors_without_an_image_and_no_errors_at_all_are_drawn(tmp_path: Path) -> None:
    x = torch.eye(3).repeat(4, 1)
    y = x.argmax(1)
    validate(TensorDataset(x, y.roll(1)), lambda x: x, tmp_path / "wrong")
    notes = validate(TensorDataset(x, y), lambda x: x, tmp_path / "right")
    assert notes.lines == [] and len(notes.images) == 2
    assert json.loads(facts_of(tmp_path / "right/pictures/step-00000005/worst.png")["samples"]) == []


def test_objects_of_a_sample_are_counted_one_by_one(tmp_path: Path) -> None:
    x = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    y[:, 3] = -100
    validate(TensorDataset(x, y), lambda x: (x, x), tmp_path)
    counts = json.loads(facts_of(tmp_path / "pictures/step-00000005/confusion.png")["counts"])
    assert np.trace(counts) == np.sum(counts) == 30


def test_no_row_is_taken_for_another_sample_where_some_were_left_out(labelled: TensorDataset, tmp_path: Path) -> None:
    """The first batch has lost its sample 0, the third has rows that are not its samples; the second is whole."""
    drawer, notes = Pictures(loader_of(labelled, 8), tmp_path, {"worst": 29}), Notes()
    album = drawer.album(5, notes, notes.lines.append)
    assert album is not None
    x, y = labelled.tensors
    batches = [(x[1:8], y[1:8], 7), (x[8:16], y[8:16], 8), (x[16:24].repeat(2, 1, 1, 1), y[16:24].repeat(2), 8)]
    for number, (images, truths, samples) in enumerate(batches):
        album.see(Outcome(images, scores(images), truths), number, samples)
    album.draw([album.seen()], torch.nn.Identity(), lambda module, batch: None)
    drawer.finish()
    folder = tmp_path / "pictures" / "step-00000005"
    known = (y[8:16] >= 0) & (scores(x[8:16]).argmax(1) != y[8:16])
    assert sorted(json.loads(facts_of(folder / "worst.png")["samples"])) == (known.nonzero()[:, 0] + 8).tolist()
    counted = sum(int((truths >= 0).sum()) for _, truths, _ in batches)
    assert np.sum(json.loads(facts_of(folder / "confusion.png")["counts"])) == counted
    assert notes.lines == []


def test_a_sample_that_the_collate_function_leaves_out_is_not_drawn(tmp_path: Path) -> None:
    dataset = TensorDataset(torch.rand(6, 1, 8, 8), torch.randint(2, (6, 8, 8)))

    def without_3(samples: list[Any]) -> Any:
        kept = [sample for sample in samples if not torch.equal(sample[0], dataset[3][0])]
        return {"x": torch.stack([x for x, _ in kept]), "y": torch.stack([y for _, y in kept])} if kept else None

    loader = loader_of(dataset, 6)
    loader.dataset.collate, loader.dataset.may_leave_out, loader.dataset.tensors = without_3, True, None
    drawer, notes = Pictures(loader, tmp_path, {"samples": [2, 3]}), Notes()
    album = drawer.album(5, notes, notes.lines.append)
    assert album is not None

    def forward(module: Any, batch: Any) -> Any:
        return None, {}, Outcome(batch["x"], torch.cat([batch["x"], 1 - batch["x"]], 1), batch["y"])

    album.see(forward(None, without_3([dataset[n] for n in range(6)]))[2], 0, 5)
    album.draw([album.seen()], torch.nn.Identity(), forward)
    drawer.finish()
    assert drawn_in(tmp_path) == ["step-00000005/sample-2.png"] and notes.lines == []


def test_a_loss_without_a_number_is_the_worst(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 0], [3, 0], [2, 0], [1, 0]])
    x[2] = torch.nan
    validate(TensorDataset(x, torch.tensor([0, 1, 1, 1])), lambda x: x, tmp_path)
    assert json.loads(facts_of(tmp_path / "pictures/step-00000005/worst.png")["samples"])[0] == 2


class Noisy(Dataset):
    """Images whose noise is drawn anew at each look."""

    random = True

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(1, 8, 8)
        x[:, index % 8] = 1
        return x + 0.3 * torch.randn(1, 8, 8), x[0].long()


def two_classes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((0.5 - x, x - 0.5), dim=1)


def test_dense_samples_are_those_of_the_validation_and_no_generator_is_touched(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(x)
        return {"aux": x, "out": two_classes(x)}

    notes = validate(Noisy(), model, tmp_path, samples=[3, 9])
    assert notes.lines == []
    assert [key for _, key, _ in notes.images] == ["val/sample-3", "val/sample-9"]
    assert torch.equal(seen[2], seen[0][3:4]) and torch.equal(seen[3], seen[1][1:2])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[arg-type,index]
    assert facts_of(tmp_path / "pictures/step-00000005/sample-9.png") == {"step": "5", "sample": "9"}


def test_what_has_no_picture_is_left_alone(tmp_path: Path) -> None:
    notes = validate(TensorDataset(torch.zeros(9, 4), torch.zeros(9, 1)), lambda x: x[:, :1], tmp_path)
    assert notes.lines == [] and notes.images == [] and not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("fault", ["shape", "see", "disk"])
def test_what_goes_wrong_costs_one_line(
    fault: str, labelled: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Dataset = labelled
    model: Callable[[Any], Any] = scores
    if fault == "shape":
        dataset, model = Noisy(), lambda x: x.repeat(1, 3, 1, 1)[:, None]
        text = "a target of shape (8, 8) and an output of shape (1, 3, 8, 8) do not fit together"
    elif fault == "see":
        monkeypatch.setattr(validation_pictures, "read", lambda output, target: output.no_such_thing)
        text = "no_such_thing"
    else:
        (tmp_path / "pictures").write_text("a file where the folder should be")
        text = "Not a directory"
    loader, notes = loader_of(dataset, 8), Notes()
    drawer = Pictures(loader, tmp_path, {"every_validations": 1})
    for step in (1, 2):
        album = drawer.album(step, notes, notes.lines.append)
        assert album is not None

        def forward(module: Any, batch: Any) -> Any:
            return None, {}, Outcome(batch[0], module(batch[0]), batch[1])

        for number, (batch, samples) in enumerate(loader.counted()):
            album.see(forward(model, batch)[2], number, samples)
        album.draw([album.seen()], model, forward)  # type: ignore[arg-type]
    drawer.finish()
    (line,) = notes.lines
    assert line.startswith("warning: no pictures of the validation: ") and text in line


def test_the_newest_stay_and_some_validations_may_be_left_out(labelled: TensorDataset, tmp_path: Path) -> None:
    drawer, notes = Pictures(loader_of(labelled, 8), tmp_path, {"keep_last": 2, "every_validations": 3}), Notes()
    drawn = []
    for step in range(100, 1300, 100):
        if album := drawer.album(step, notes, notes.lines.append):
            drawn.append(step)
            for number, (x, y) in enumerate(drawer.loader):
                album.see(Outcome(x, scores(x), y), number, len(x))
            album.draw([album.seen()], torch.nn.Identity(), lambda module, batch: None)
    drawer.finish()
    assert drawn == [100, 400, 700, 1000]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step-00000700", "step-00001000"]
    assert len(notes.images) == 8


class Clocks:
    """A clock and a thread's processor time that stand still until a test moves them."""

    def __init__(self) -> None:
        self.clock, self.worked = 1000.0, 0.0

    def time(self, ranks: Any = None) -> PictureTime:
        return PictureTime(ranks, lambda: self.clock, lambda: self.worked)

    def validate(self, time: PictureTime, step: int, loop: float, thread: float, is_last: bool = False) -> bool:
        """A validation whose pictures, where it has some, keep the loop and then a thread for so long."""
        if is_drawn := time.allows(step, is_last):
            with time.spent_by_loop():
                self.clock += loop

            def draw() -> None:
                self.worked += thread

            time.in_thread(draw)()
        return is_drawn


@pytest.mark.parametrize(
    ("epoch", "loop", "thread", "drawn"),
    [
        (100.0, 0.5, 1.4, [1, 2, 3, 4, 5, 6, 7]),  # 1.9 %
        (10.0, 0.1, 0.2, [1, 3, 5, 7]),  # 3 %, of two epochs 1.5 %
        (1.0, 0.04, 0.06, [1, 6]),
        (10.0, 60.0, 0.0, [1]),
    ],
)
def test_a_validation_is_drawn_where_its_pictures_take_at_most_2_percent_of_the_time_since_the_last_one(
    epoch: float, loop: float, thread: float, drawn: list[int]
) -> None:
    clocks = Clocks()
    time, found = clocks.time(), []
    for step in range(1, 8):
        clocks.clock += epoch
        if clocks.validate(time, step, loop, thread):
            found.append(step)
    assert found == drawn
    assert bool(time.left_out) == (len(drawn) < 7)
    clocks.clock += epoch
    assert clocks.validate(time, 8, loop, thread, is_last=True), "the training's last one"


def test_what_a_thread_still_draws_is_not_paid_for_and_a_failure_costs_as_well() -> None:
    clocks = Clocks()
    time = clocks.time()
    assert time.allows(1, False) and time.allows(1, False), "of one step all sets are drawn"
    work = time.in_thread(lambda: None)
    clocks.clock += 1e6
    assert not time.allows(2, False)
    work()
    assert not time.allows(2, False), "decided once for all sets"
    assert time.allows(3, False)
    with pytest.raises(ValueError), time.spent_by_loop():
        clocks.clock += 10
        raise ValueError
    clocks.clock += 400
    assert not time.allows(4, False)
    clocks.clock += 100
    assert time.allows(5, False)


def test_what_is_left_out_is_said_once_and_a_setting_of_the_users_wins(labelled: TensorDataset, tmp_path: Path) -> None:
    for every, drawn in ((None, [1, 4, 6]), (1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5])):
        clocks, notes = Clocks(), Notes()
        settings = {} if every is None else {"every_validations": every}
        drawer = Pictures(loader_of(labelled, 8), tmp_path / str(every), settings, time=clocks.time())
        found = []
        for step in range(1, 7):
            clocks.clock += 10
            if album := drawer.album(step, notes, notes.lines.append, is_last=step == 6):
                found.append(step)
                with drawer.time.spent_by_loop():
                    clocks.clock += 0.6
                for number, (x, y) in enumerate(drawer.loader):
                    album.see(Outcome(x, scores(x), y), number, len(x))
                album.draw([album.seen()], torch.nn.Identity(), lambda module, batch: None)
                drawer.finish()
        assert (
            found == drawn == [int(path.name[-8:]) for path in sorted((tmp_path / str(every) / "pictures").iterdir())]
        )
        expected = [
            "pictures take 0.6 s, and validations come every 11 s: some are left out, so that pictures take at most 2% "
            "of the time (trainer.pictures.every_validations=1 draws each)"
        ]
        assert notes.lines == (expected if every is None else [])


def test_pictures_are_drawn_beside_the_next_steps_and_of_one_validation_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_draw, threads, own = threading.Event(), [], sample_panel.panel

    def slow(*arrays: Any) -> Any:
        threads.append(threading.current_thread())
        assert may_draw.wait(300)
        return own(*arrays)

    monkeypatch.setattr(validation_pictures, "panel", slow)
    data = TensorDataset(torch.rand(6, 1, 8, 8), torch.randint(2, (6, 8, 8)))
    drawer, notes, shown = (
        Pictures(loader_of(data, 6), tmp_path, {"samples": [2], "every_validations": 1}),
        Notes(),
        torch.rand(1, 1, 8, 8),
    )

    def forward(module: Any, batch: Any) -> Any:
        return None, {}, Outcome(batch[0], torch.cat([shown, 1 - shown], 1), batch[1])

    def validate_at(step: int) -> None:
        album = drawer.album(step, notes, notes.lines.append)
        assert album is not None
        album.see(Outcome(data.tensors[0], torch.cat([data.tensors[0]] * 2, 1), data.tensors[1]), 0, 6)
        album.draw([album.seen()], torch.nn.Identity(), forward)

    before = shown.clone()
    validate_at(5)  # it returns, though nothing can be drawn
    assert drawn_in(tmp_path) == [] and notes.images == []
    shown.zero_()  # what a next step does to a tensor that a model keeps
    second = threading.Thread(target=validate_at, args=(6,))
    second.start()  # it waits for the first one's
    may_draw.set()
    second.join(300)
    drawer.finish()
    assert drawn_in(tmp_path) == ["step-00000005/sample-2.png", "step-00000006/sample-2.png"] and notes.lines == []
    assert [step for _, _, step in notes.images] == [5, 6]
    assert threading.main_thread() not in threads and len(set(threads)) == 1
    shown.copy_(before)
    validate_at(7)
    drawer.finish()
    one, other = (pixels_of(Image.open(tmp_path / f"pictures/step-0000000{step}/sample-2.png")) for step in (5, 7))
    assert np.array_equal(one[60:], other[60:])  # below the title, which names the step


def test_the_largest_channel_is_that_of_argmax() -> None:
    output = np.round(RNG.standard_normal((5, 40, 50)) * 2)
    output[RNG.random(output.shape) < 0.05] = np.nan
    assert np.array_equal(sample_panel._largest(output), output.argmax(axis=0))


def test_switched_off_there_is_no_album(labelled: TensorDataset, tmp_path: Path) -> None:
    assert Pictures(loader_of(labelled, 8), tmp_path, None).album(1, Notes(), print) is None
    assert Pictures(None, tmp_path, {}).album(1, Notes(), print) is None


# ------------------------------------------------------------------------------------------------------- the journal


def test_the_journal_holds_an_image_once_for_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "_start_sender", lambda self: None)
    for _ in range(2):  # the second one is a resumed training, which draws step 20 again
        journal = Journal(tmp_path, experiment="x", run_name="x", tracking_uri=str(tmp_path / "store"))
        journal.start({}, {})
        for step in (10, 20):
            journal.image("pictures/a.png", "val/a", step)
        journal.close()
    with pytest.raises(ValueError, match="must stay inside"):
        journal.image("../a.png", "val/a", 30)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["path"], line["key"], line["step"]) for line in lines if line["kind"] == "image"]
    assert found == [("pictures/a.png", "val/a", 10), ("pictures/a.png", "val/a", 20)]


# --------------------------------------------------------------------------------------------------- whole trainings

SEGMENTATION = '''"""Noisy balls in 2-D or 3-D, and a small network with dropout."""
import torch
from torch import nn

class Balls(torch.utils.data.Dataset):
    random = True
    def __init__(self, dims, size=12):
        self.dims, self.size = dims, size
    def __len__(self):
        return 10
    def __getitem__(self, index):
        grid = torch.stack(torch.meshgrid(*[torch.arange(self.size)] * self.dims, indexing="ij"))
        label = ((grid - 3 - index % 5) ** 2).sum(0) < 10
        return label[None] + 0.5 * torch.randn(1, *label.shape), label.long()

class Net(nn.Module):
    def __init__(self, dims, broken=False):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.body = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), conv(4, 2, 1))
        self.broken = broken
    def forward(self, x):
        return self.body(x)[:, None] if self.broken else self.body(x)

def any_loss(output, target):
    return output.square().mean()
'''
NO_MLFLOW = "raise ImportError('kept out of this test')\n"
RunSmall = Callable[..., tuple[Result, Path]]


@pytest.fixture
def run_small(run_cli: RunCli, tmp_path: Path) -> RunSmall:
    """A small segmentation through the command line, without MLflow; its result and run folder."""
    (tmp_path / "balls.py").write_text(SEGMENTATION)
    (tmp_path / "stubs/mlflow").mkdir(parents=True)
    (tmp_path / "stubs/mlflow/__init__.py").write_text(NO_MLFLOW)
    path = os.pathsep.join(filter(None, (str(tmp_path / "stubs"), str(REPOSITORY), os.environ.get("PYTHONPATH"))))

    def run(name: str, dims: int = 2, pictures: Any = True, loss: str = "CrossEntropyLoss", **model: Any) -> Any:
        config = {
            "modules": ["balls"],
            "device": "cpu",
            "model": {"name": "Net", "dims": dims, **model},
            "loaders": {"name": "Balls", "dims": dims, "batch_size": 4, "train": {}, "val": {}},
            "loss": {"name": loss},
            "optimizer": {"name": "Adam", "lr": 0.02},
            "trainer": {"max_epochs": 3, "checkpoint_dir": name, "pictures": pictures},
            "mlflow": {"exit_timeout_seconds": 0},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        done = run_cli([f"{name}.yaml"], env={"PYTHONPATH": path})
        return done, tmp_path / name

    return run


def drawn_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "pictures")) for path in folder.glob("pictures/*/*"))


@pytest.mark.timeout(600)
def test_a_segmentation_is_drawn_at_each_validation_and_learns_the_same_without(run_small: RunSmall) -> None:
    done, folder = run_small("on", pictures={"samples": [1, 7], "every_validations": 1})
    assert done.rc == 0 and "warning" not in done.stdout, done.text
    steps = ("step-00000003", "step-00000006", "step-00000009")
    assert drawn_in(folder) == [f"{step}/sample-{sample}.png" for step in steps for sample in (1, 7)]
    image = Image.open(folder / "pictures/step-00000009/sample-7.png")
    assert has(image, PALETTE[0], 1000) and has(image, PALETTE[1], 1000) and has(image, ERROR)
    done, other = run_small("off", pictures=False)
    assert done.rc == 0 and not (other / "pictures").exists()
    with_pictures, without = (load_file(path / "checkpoints/last/model.safetensors") for path in (folder, other))
    assert with_pictures.keys() == without.keys()
    assert all(torch.equal(with_pictures[name], without[name]) for name in without)


@pytest.mark.timeout(600)
def test_a_volume_is_drawn_in_three_planes(run_small: RunSmall) -> None:
    done, folder = run_small("volume", dims=3, pictures={"samples": 1})
    assert done.rc == 0 and "warning" not in done.stdout, done.text
    image = Image.open(folder / "pictures/step-00000009/sample-5.png")
    assert image.height > 3 * 12 * (208 // 12) and has(image, PALETTE[1], 1000)


@pytest.mark.timeout(600)
def test_an_output_that_cannot_be_drawn_costs_one_line_and_no_training(run_small: RunSmall) -> None:
    done, folder = run_small("broken", loss="any_loss", broken=True)
    assert done.rc == 0, done.text
    assert done.stdout.count("warning: no pictures of the validation: a target of shape (12, 12) and an output") == 1
    assert json.loads((folder / "run.json").read_text())["state"] == "FINISHED"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{sample: 3}", "did you mean 'samples'?"),
        ("{samples: [0, 270]}", "the validation data have no sample 270; possible: 0 to 269"),
        ("{keep_last: 0}", "keep_last must be at least 1, found 0"),
        ("3", "expected"),
    ],
)
def test_wrong_settings_are_refused_with_their_key(tmp_path: Path, value: str, message: str) -> None:
    config = load_config(REPOSITORY / "configfiles/digits.yaml", [f"trainer.pictures={value}", "device=cpu"])
    with pytest.raises(ConfigError) as refused:
        create_trainer(config, tmp_path)
    assert "trainer.pictures" in str(refused.value) and message in str(refused.value)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_digits_on_one_and_two_ranks_and_in_mlflow(run_cli: RunCli, tmp_path: Path) -> None:
    common = [REPOSITORY / "configfiles/digits.yaml", "trainer.max_epochs=2", "optimizer.lr=0"]  # weights stay equal
    for ranks in (1, 2):
        done = run_cli(
            [*common, f"trainer.checkpoint_dir=run-{ranks}", "mlflow.tracking_uri=store"], nproc=ranks, timeout=400
        )
        assert done.rc == 0 and "warning" not in done.stdout, done.text
    one, two = tmp_path / "run-1", tmp_path / "run-2"
    names = [f"step-{step:08d}/{name}.png" for step in (10, 20) for name in ("confusion", "worst")]
    assert drawn_in(one) == drawn_in(two) == names
    for name in names:
        assert (one / "pictures" / name).read_bytes() == (two / "pictures" / name).read_bytes()
    counts = np.array(json.loads(facts_of(one / "pictures" / names[0])["counts"]))
    assert counts.sum() == 270
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    figures = next(line["values"] for line in lines if line["kind"] == "metrics" and "val/Accuracy" in line["values"])
    assert figures["val/Accuracy"] == pytest.approx(np.trace(counts) / 270)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    run_id = json.loads((one / "run.json").read_text())["run_id"]
    stored = [item.path for item in client.list_artifacts(run_id, "images")]
    full = {path.split("+timestamp")[0] for path in stored if path.endswith(".png")}
    assert full == {f"images/val~{name}+step+{step}" for name in ("confusion", "worst") for step in (0, 10, 20)}
    steps = {item.step for item in client.get_metric_history(run_id, "val/Accuracy")}
    assert steps == {10, 20}
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"].lower() == "true"
    confusion = next(
        path for path in stored if path.startswith("images/val~confusion+step+20") and path.endswith("png")
    )
    fetched = Image.open(client.download_artifacts(run_id, confusion, str(tmp_path)))
    assert np.array_equal(pixels_of(fetched), pixels_of(Image.open(one / "pictures" / names[2])))
