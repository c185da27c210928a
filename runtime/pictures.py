"""Writing images: PNG files that carry their settings, and the labelled contact sheet."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

_MARGIN = 8
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG whose text chunk `bar-edge` holds `settings` as JSON; the file appears whole or not at all."""
    info = PngInfo()
    info.add_text("bar-edge", json.dumps(settings))
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings `save_png` wrote."""
    with Image.open(path) as image:
        settings: dict[str, Any] = json.loads(image.info["bar-edge"])
    return settings


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """All images in a grid, row by row, each with its label below."""
    width = max(image.width for image in images)
    size = max(11, width // 10)
    font = ImageFont.load_default(size)
    tile_width, tile_height = width + _MARGIN, max(image.height for image in images) + size + 2 * _MARGIN
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * tile_width + _MARGIN, rows * tile_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = _MARGIN + i % columns * tile_width, _MARGIN + i // columns * tile_height
        sheet.paste(image, (x, y))
        while label and draw.textlength(label, font=font) > width:
            label = label[:-2].rstrip("…") + "…" if len(label) > 2 else ""
        draw.text((x, y + image.height + _MARGIN // 2), label, fill=_INK, font=font)
    return sheet


def columns_for(images: int, per_class: int) -> int:
    """One row per class if a class has several images, otherwise nearly square; never wider than 10."""
    return min(10, images, per_class if per_class > 1 else math.ceil(math.sqrt(images)))
