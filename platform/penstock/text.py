"""Tables, numbers and errors as a terminal shows them, and as JSON has them."""

import math
from collections.abc import Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[str] | None = None) -> str:
    """Aligned columns, two spaces apart, with a rule below the header; `right` names the right-aligned ones."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(width) if name in (right or ()) else cell.ljust(width)
                   for name, cell, width in zip(header, cells, widths, strict=True)]  # fmt: skip
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def plain(value: Any) -> Any:
    """A JSON value of a table's cell: None for NaN, infinities and NA."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if str(value) in ("<NA>", "NaT") else str(value)


def whole(value: Any) -> Any:
    """A column of whole numbers with gaps is a column of floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: Any) -> str:
    """As short as it goes; empty for what is missing."""
    found = whole(plain(value))
    return "" if found is None else f"{found:g}" if isinstance(found, float) else str(found)


def figure(value: Any, decimals: int) -> str:
    """With so many decimals; `-` for what is missing."""
    found = plain(value)
    return "-" if found is None else f"{found:.{decimals}f}"


def last_line(error: BaseException) -> str:
    """What an error says in the end; an error from another process brings that one's traceback before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
