"""The numbers of a run over time: log.csv, and a loss curve of characters, or of pixels with matplotlib.

    step,loss,lr,grad_norm,tokens,targets,seconds,tokens_per_second,gflops,valid_loss,...

A row is written after each step. valid_loss is empty where it was not computed. A resumed run continues the
file after the step that it begins with.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from ..checkpoint.files import write_bytes
from ..errors import FormatError, UnsupportedError, escape

WIDTH, HEIGHT = 72, 12  # of the curve in characters


class Log:
    """log.csv. `rows` has all rows as they are in the file."""

    def __init__(self, path: Path, columns: Sequence[str], after: int = 0):
        """Begin a file, or keep the rows of the first `after` steps of the file that is there."""
        self.path, self.rows = path, list[dict[str, str]]()
        if after:
            self.rows = [row for row in read_log(path) if int(row["step"]) <= after]
        self.columns = list(columns)
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(path, text.getvalue().encode())

    def add(self, values: Mapping[str, Any]) -> None:
        row = {name: _shown(values[name]) for name in self.columns if name in values}
        self.rows.append(row)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        except OSError as error:
            raise FormatError(f"{self.path} cannot be written: {error.strerror}") from None

    @property
    def last(self) -> int:
        """The step of the last row; 0 if there is none."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def series(self, column: str) -> list[tuple[int, float]]:
        """(step, value) wherever the column has a number."""
        found = ((int(row["step"]), row.get(column) or "") for row in self.rows)
        return [(step, float(value)) for step, value in found if value and math.isfinite(float(value))]


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a file. A last line that was cut off when the run was killed is left out."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path} cannot be read: {escape(error)}") from None
    return [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def curve(train: Sequence[tuple[int, float]], valid: Sequence[tuple[int, float]] = ()) -> str:
    """The losses of training (.) and validation (o) by step, drawn in characters."""
    points = [*train, *valid]
    if not points:
        return ""
    steps, losses = zip(*points, strict=True)
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, series in ((".", train), ("o", valid)):
        for step, loss in series:
            x = (step - first) * (WIDTH - 1) // max(last - first, 1)
            y = round((high - loss) / ((high - low) or 1) * (HEIGHT - 1))
            grid[y][x] = mark
    marks = {0: f"{high:.4f}", HEIGHT - 1: f"{low:.4f}"}
    lines = [f"{marks.get(y, ''):>8} |{''.join(row).rstrip()}" for y, row in enumerate(grid)]
    ends = f"{first}{last:>{WIDTH - len(str(first))}}"
    return "\n".join([*lines, f"{'':>8} +{'-' * WIDTH}", f"{'step':>8}  {ends}"])


def picture(path: Path, train: Sequence[tuple[int, float]], valid: Sequence[tuple[int, float]] = ()) -> bool:
    """The same curve as a PNG file; -> False without matplotlib, an extra."""
    try:
        from ..inspect.plots import loss_curve
    except UnsupportedError:
        return False
    image = BytesIO()
    loss_curve(train, valid).savefig(image, format="png", dpi=150)
    write_bytes(path, image.getvalue())
    return True
