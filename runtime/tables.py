"""Tables for people: what they are given is shown as it is, and nothing of it is cut, however narrow the terminal."""

import os
import sys

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import StyleType
from rich.table import Column, Table
from rich.text import Text

_REDIRECTED_WIDTH = 200  # columns
_TEXT_WIDTH = 12  # columns that texts may fold down to


def redirected_width() -> int | None:
    """Columns of what goes to no terminal, where nobody says how many there are; None: as many as the terminal has."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _REDIRECTED_WIDTH


class FiguresTable(Table):
    """Texts, which fold where the terminal is narrow, and numbers, which do not.

    Where that is not enough it becomes a list of its rows, a line a cell. Strings are no markup; a cell with a style is
    a `Text`.
    """

    def __init__(self, title: str, padding: tuple[int, int, int, int] = (0, 1, 0, 0)) -> None:
        super().__init__(
            title=Text(title, style="table.title"), title_justify="left", box=SIMPLE_HEAD, padding=padding,
            pad_edge=False,
        )  # fmt: skip

    def add_texts(self, *headings: str) -> None:
        """Columns of names and sentences."""
        for heading in headings:
            self.add_column(heading, overflow="fold")

    def add_numbers(self, *headings: str) -> None:
        """Columns of numbers, aligned to the right."""
        for heading in headings:
            self.add_column(heading, justify="right", no_wrap=True)

    def add_row(
        self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        """A cell for every column."""
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in renderables]
        super().add_row(*cells, style=style, end_section=end_section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._list()

    def _least_width(self) -> int:
        widths = [_width(column) if column.no_wrap else min(_width(column), _TEXT_WIDTH) for column in self.columns]
        return sum(widths) + self.padding[1] * len(widths) + len(widths) + 1  # the box: one around and between all

    def _list(self) -> RenderResult:
        yield self.title or ""
        headings = [str(column.header).replace("\n", " ") for column in self.columns]
        for row, *cells in zip(self.rows, *(column.cells for column in self.columns), strict=True):
            yield ""
            lines = Table(show_header=False, box=None, padding=(0, 1, 0, 0), pad_edge=False)
            lines.add_column(no_wrap=True)
            lines.add_column(overflow="fold")
            for heading, cell in zip(headings, cells, strict=True):
                if cell:
                    lines.add_row(heading, cell, style=row.style)
            yield lines
        yield ""


def _width(column: Column) -> int:
    """Of its widest line."""
    return max(cell_len(line) for cell in (column.header, *column.cells) for line in str(cell).split("\n"))
