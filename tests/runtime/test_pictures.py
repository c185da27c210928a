"""PNG files carry their settings and appear whole; the contact sheet shows every image with its label."""

import pytest
from PIL import Image

from bar_edge.runtime.pictures import columns_for, contact_sheet, read_settings, save_png

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
TILES = [Image.new("RGB", (64, 48), colour) for colour in COLOURS]


def test_settings_come_back_and_pixels_are_unchanged(tmp_path):
    settings = {"seed": 2**64 - 1, "class": "café ☕", "allocation": [2, 2, 5, 7], "class_id": None, "guidance": 5.5}
    image = Image.effect_noise((20, 10), 90).convert("RGB")
    save_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.format == "PNG"
        assert stored.tobytes() == image.tobytes()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    save_png(TILES[0], tmp_path / "a.png", {"old": 1})

    def failing(self, path, **options):
        path.write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        save_png(TILES[1], tmp_path / "a.png", {"new": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert read_settings(tmp_path / "a.png") == {"old": 1}


def colours_of(image: Image.Image) -> set:
    return {colour for _, colour in image.getcolors(2**24)}


def test_every_image_is_on_the_sheet_in_its_place():
    sheet = contact_sheet(TILES, [""] * 5, columns=2)
    assert colours_of(sheet) == {*COLOURS, (255, 255, 255)}
    half, third = sheet.width // 2, sheet.height // 3
    for i, colour in enumerate(COLOURS):
        left, top = i % 2 * half, i // 2 * third
        part = sheet.crop((left, top, left + half, top + third))
        assert colours_of(part) == {colour, (255, 255, 255)}
        assert sum(n for n, c in part.getcolors(2**24) if c == colour) == 64 * 48


@pytest.mark.parametrize("label", ["7", "golden retriever", "W" * 200, ""])
def test_a_label_stays_below_its_own_image(label):
    labelled = contact_sheet([TILES[0], TILES[1]], [label, ""], columns=2)
    bare = contact_sheet([TILES[0], TILES[1]], ["", ""], columns=2)
    assert labelled.size == bare.size
    changed = [
        (x, y)
        for x in range(bare.width)
        for y in range(bare.height)
        if labelled.getpixel((x, y)) != bare.getpixel((x, y))
    ]
    assert bool(changed) == bool(label)
    assert all(x <= bare.width // 2 and y >= 48 for x, y in changed)


@pytest.mark.parametrize(
    ("images", "per_class", "expected"),
    [(1, 1, 1), (4, 1, 2), (5, 1, 3), (12, 4, 4), (60, 6, 6), (400, 1, 10), (50, 50, 10)],
)
def test_columns_of_the_sheet(images, per_class, expected):
    assert columns_for(images, per_class) == expected
