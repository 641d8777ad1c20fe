"""Pictures from arrays, drawn by Pillow: tiles on a sheet with a legend, a matrix of counts, as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from dtrain.reporting.number_text import short_count

Colour = tuple[int, int, int]
Place = tuple[float, float]

# Okabe & Ito, "Color Universal Design", 2008: distinct for colour-blind people, too; then lighter, then darker ones.
_HEX = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "cc79a7", "d55e00")
_DISTINCT = [(red, green, blue) for red, green, blue in map(bytes.fromhex, _HEX)]
PALETTE: tuple[Colour, ...] = (
    (48, 48, 48),  # class 0, mostly the background
    *_DISTINCT,
    *((round(127 + r / 2), round(127 + g / 2), round(127 + b / 2)) for r, g, b in _DISTINCT),
    *((round(r * 0.55), round(g * 0.55), round(b * 0.55)) for r, g, b in _DISTINCT),
)
ERROR: Colour = (220, 0, 80)  # no class has it
IGNORED: Colour = (225, 225, 225)
RIGHT: Colour = (0, 114, 178)
_INK, _FAINT = (30, 30, 30), (110, 110, 110)
_PAPER, _LINE = (255, 255, 255), (170, 170, 170)
_MARGIN, _GAP, _SWATCH = 16, 14, 14
_TITLE, _TEXT, _SMALL = 18, 14, 12  # sizes of fonts, in pixels
_TITLE_HEIGHT, _TEXT_HEIGHT = 24, 19  # of a line
_TOP = _MARGIN + _TITLE_HEIGHT + _GAP // 2  # where a sheet begins under its title
_LEAST_WIDTH = 420  # of a sheet, so that its title fits


class Tile(NamedTuple):
    """An image on a sheet, with lines of text above it."""

    title: str
    pixels: np.ndarray | None  # uint8 (H, W, 3); None: text alone


class Key(NamedTuple):
    """One entry of a legend."""

    colour: Colour
    text: str


def colour_of(number: int) -> Colour:
    """The colour of a class; class 0 is nearly black. From class 22 on the colours of 1 to 21 come again."""
    return PALETTE[number if number < len(PALETTE) else 1 + (number - 1) % (len(PALETTE) - 1)]


def coloured(labels: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Classes (H, W), integers from 0, as uint8 (H, W, 3); those that are ignored are light gray."""
    table = np.array([colour_of(number) for number in range(int(labels.max(initial=0)) + 1)], dtype=np.uint8)
    pixels = table[np.where(ignored, 0, labels)]
    pixels[ignored] = IGNORED
    return pixels


def gray(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (H, W) or (H, W, 3) as uint8 (H, W, 3): black at `low`, white at `high`; NaN is black."""
    share = np.nan_to_num((values - low) / max(high - low, 1e-12), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    share = share[..., None].repeat(3, axis=-1) if share.ndim == 2 else share
    return np.round(255 * share).astype(np.uint8)


def reddened(values: np.ndarray, high: float) -> np.ndarray:
    """Values (H, W) from 0 as uint8 (H, W, 3): white at 0, the colour of errors at `high` and for NaN."""
    share = np.nan_to_num(values / max(high, 1e-12), nan=1.0, posinf=1.0).clip(0, 1)[..., None]
    return np.round(255 + share * (np.array(ERROR) - 255)).astype(np.uint8)


def extent(values: np.ndarray) -> tuple[float, float]:
    """Black and white: nearly the smallest and the largest number, so that one outlier does not darken all."""
    few = values.reshape(-1)[:: max(1, values.size // 100_000)]
    few = few[np.isfinite(few)]
    if not len(few):
        return 0.0, 1.0
    low, high = np.percentile(few, (0.2, 99.8))
    return float(low), float(high)


def sheet(title: str, rows: Sequence[Sequence[Tile]], legend: Sequence[Key] = (), notes: Sequence[str] = ()) -> Any:
    """A PIL image, RGB: tiles in rows and columns under a title of one line, over a legend and notes."""
    widths = [max(_tile_size(tile)[0] for tile in column if tile) for column in zip_longest(*rows)]
    heights = [max(_tile_size(tile)[1] for tile in row) for row in rows]
    inner_width = max(sum(widths) + _GAP * (len(widths) - 1), _LEAST_WIDTH - 2 * _MARGIN)
    keys = _flowed(legend, inner_width)
    lines = _TEXT_HEIGHT * (len(keys) + len(notes)) + (_GAP if keys or notes else 0)
    height = _TOP + sum(heights) + _GAP * max(0, len(heights) - 1) + lines + _MARGIN
    paper = _Paper(inner_width + 2 * _MARGIN, height, title)
    y = _TOP
    for row, row_height in zip(rows, heights, strict=True):
        x = _MARGIN
        for tile, column_width in zip(row, widths, strict=False):
            paper.put_tile(tile, x, y)
            x += column_width + _GAP
        y += row_height + _GAP
    paper.put_below(y, keys, notes)
    return paper.image


def matrix(title: str, counts: np.ndarray, names: Sequence[str], notes: Sequence[str] = ()) -> Any:
    """A PIL image, RGB: cells coloured by their share of the row, and how much of each row is right.

    `counts` are (K, K) integers; rows are the truth, columns the predictions. `names` are short.
    """
    cell, size = (46, _TEXT) if len(names) <= 12 else (34, 11)
    left = _MARGIN + 2 * _TEXT_HEIGHT + round(max(_width(name, _SMALL) for name in names))
    top = _TOP + 2 * _TEXT_HEIGHT
    side = cell * len(names)
    width = max(left + side + 2 * _GAP + 100 + _MARGIN, _LEAST_WIDTH)
    paper = _Paper(width, top + side + _GAP + _TEXT_HEIGHT * (1 + len(notes)) + _MARGIN, title)
    paper.write((left + side / 2, top - 1.5 * _TEXT_HEIGHT), "predicted", ink=_FAINT, anchor="mm")
    paper.write_upright("true", (_MARGIN + _TEXT_HEIGHT // 2, top + side // 2))
    for row, name in enumerate(names):
        total, middle = int(counts[row].sum()), (row + 0.5) * cell
        paper.write((left - 8, top + middle), name, _SMALL, anchor="rm")
        paper.write((left + middle, top - _TEXT_HEIGHT / 2), name, _SMALL, anchor="mm")
        for column in range(len(names)):
            box = (left + column * cell, top + row * cell, left + (column + 1) * cell, top + (row + 1) * cell)
            paper.put_count(box, size, int(counts[row, column]), total, row == column)
        right = f"{counts[row, row] / total:.0%} of {short_count(total)}" if total else "none"
        paper.write((left + side + _GAP, top + middle), right, _SMALL, _FAINT, "lm")
    keys = [(_MARGIN, Key(RIGHT, "right")), (_MARGIN + 80, Key(ERROR, "wrong; full colour: all of the row"))]
    paper.put_below(top + side + _GAP, [keys], notes)
    return paper.image


def curve(title: str, x: Sequence[float], y: Sequence[float], marked: int | None, labels: tuple[str, str]) -> Any:
    """A PIL image, RGB: a line over a logarithmic x axis, one of its points marked; `labels` are those of both axes."""
    width, height, left, top = 640, 360, _MARGIN + 70, _TOP
    paper = _Paper(left + width + _MARGIN, top + height + 2 * _TEXT_HEIGHT + _MARGIN, title)
    across = np.log10(np.asarray(x, dtype=float))
    up = np.asarray(y, dtype=float)
    highest, lowest = float(np.percentile(up, 95)) if len(up) else 1.0, float(up.min(initial=np.inf))
    span = max(highest - lowest, 1e-12) * 1.1
    points = [
        (left + float(a - across[0]) / max(float(across[-1] - across[0]), 1e-12) * width,
         top + height * (1 - (min(float(b), lowest + span) - lowest) / span))
        for a, b in zip(across, up, strict=True)
    ]  # fmt: skip
    paper.put_line((left, top, left + width, top + height), points, points[marked] if marked is not None else None)
    for exponent in range(math.ceil(across[0]), math.floor(across[-1]) + 1) if len(across) else ():
        at = left + (exponent - float(across[0])) / max(float(across[-1] - across[0]), 1e-12) * width
        paper.write((at, top + height + 4), f"1e{exponent}", _SMALL, _FAINT, "ma")
    for value in (lowest, lowest + span / 2, lowest + span):
        paper.write((left - 6, top + height * (1 - (value - lowest) / span)), f"{value:.3g}", _SMALL, _FAINT, "rm")
    paper.write((left + width / 2, top + height + 4 + _TEXT_HEIGHT), labels[0], ink=_FAINT, anchor="ma")
    paper.write_upright(labels[1], (_MARGIN + _TEXT_HEIGHT // 2, top + height // 2))
    return paper.image


def png(image: Any, facts: Mapping[str, str]) -> bytes:
    """The image as a PNG file, with facts in it as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, text in facts.items():
        info.add_text(key, text)
    image.save(buffer, "PNG", pnginfo=info, compress_level=3)  # twice as fast as the usual 6
    return buffer.getvalue()


def fitted(text: str, width: float, size: int) -> str:
    """The text, its middle left out where it is wider than so many pixels."""
    if _width(text, size) <= width:
        return text
    kept = len(text)
    while kept > 8 and _width(shortened := f"{text[: kept // 2]} ... {text[len(text) - kept // 2 :]}", size) > width:
        kept -= 2
    return shortened


class _Paper:
    """A white image under a title, and what is put on it."""

    def __init__(self, width: float, height: float, title: str = "") -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (round(width), round(height)), _PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._inner_width = width - 2 * _MARGIN
        if title:
            self.write((_MARGIN, _MARGIN), fitted(title, self._inner_width, _TITLE), _TITLE)

    def write(
        self, place: tuple[float, float], text: str, size: int = _TEXT, ink: Colour = _INK, anchor: str = "la"
    ) -> None:
        self._draw.text(place, text, fill=ink, font=_font(size), anchor=anchor)

    def write_upright(self, text: str, middle: tuple[int, int]) -> None:
        """A text turned by 90 degrees, which Pillow draws only by way of an image of its own."""
        own = _Paper(_width(text, _TEXT) + 2, _TEXT_HEIGHT)
        own.write((1, 0), text, ink=_FAINT)
        turned = own.image.rotate(90, expand=True)
        self.image.paste(turned, (middle[0] - turned.width // 2, middle[1] - turned.height // 2))

    def put_tile(self, tile: Tile, x: int, y: int) -> None:
        """A tile in a thin frame, which lies outside of its pixels, under its title."""
        from PIL import Image

        for line in tile.title.split("\n"):
            self.write((x, y), line)
            y += _TEXT_HEIGHT
        if tile.pixels is not None:
            y += 4
            height, width = tile.pixels.shape[:2]
            self._draw.rectangle((x, y, x + width + 1, y + height + 1), outline=_LINE)
            self.image.paste(Image.fromarray(np.ascontiguousarray(tile.pixels)), (x + 1, y + 1))

    def put_line(self, box: tuple[float, float, float, float], points: Sequence[Place], marked: Place | None) -> None:
        """A line in a frame, and a dot on it."""
        self._draw.rectangle(box, outline=_LINE)
        self._draw.line(points, fill=RIGHT, width=2)
        if marked is not None:
            x, y = marked
            self._draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=ERROR)

    def put_count(self, box: tuple[int, int, int, int], size: int, count: int, total: int, right: bool) -> None:
        """A cell of a matrix, coloured by the count's share of the row's total."""
        share = count / total if total else 0.0
        # Even one in a thousand shows: a wrong cell's colour begins at a sixth.
        strength = 0.0 if not count else share if right else 1 / 6 + share * 5 / 6
        red, green, blue = (round(255 + strength * (part - 255)) for part in (RIGHT if right else ERROR))
        self._draw.rectangle(box, fill=(red, green, blue), outline=(215, 215, 215))
        if count:
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            self.write(middle, short_count(count), size, _PAPER if strength > 0.5 else _INK, "mm")

    def put_below(self, y: float, keys: Sequence[Sequence[tuple[float, Key]]], notes: Sequence[str]) -> None:
        """The legend's lines, and the notes under them."""
        for line in keys:
            for x, key in line:
                self._draw.rectangle((x, y + 1, x + _SWATCH, y + 1 + _SWATCH), fill=key.colour, outline=_LINE)
                self.write((x + _SWATCH + 6, y), key.text)
            y += _TEXT_HEIGHT
        for note in notes:
            self.write((_MARGIN, y), fitted(note, self._inner_width, _TEXT), ink=_FAINT)
            y += _TEXT_HEIGHT


def prepare() -> None:
    """Import what draws, so that a thread that draws imports nothing."""
    from PIL import Image, ImageDraw, PngImagePlugin  # noqa: F401

    Image.preinit()
    _font(_TEXT)


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(text: str, size: int) -> float:
    return max((_font(size).getlength(line) for line in text.split("\n")), default=0.0)


def _tile_size(tile: Tile) -> tuple[int, int]:
    height, width = (0, 0) if tile.pixels is None else (tile.pixels.shape[0] + 2, tile.pixels.shape[1] + 2)
    lines = tile.title.split("\n")
    return max(width, round(_width(tile.title, _TEXT) + 0.5)), _TEXT_HEIGHT * len(lines) + 4 + height


def _flowed(legend: Sequence[Key], width: float) -> list[list[tuple[float, Key]]]:
    """A legend in lines, with where each entry begins."""
    lines: list[list[tuple[float, Key]]] = []
    x = width + 1.0
    for key in legend:
        needs = _SWATCH + 6 + _width(key.text, _TEXT)
        if x + needs > width:
            lines.append([])
            x = 0.0
        lines[-1].append((_MARGIN + x, key))
        x += needs + 18
    return lines
