"""log.csv and the loss curve."""

import pytest

from numpy_llama.errors import FormatError, ResourceLimitError
from numpy_llama.training.log import HEIGHT, WIDTH, Log, curve, picture


def test_a_log_has_a_row_for_each_step_and_continues(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path, ("step", "loss", "valid_loss"))
    for step in range(1, 5):
        log.add({"step": step, "loss": 1 / step, "other": 7} | ({"valid_loss": 0.5} if step == 2 else {}))
    assert path.read_text().splitlines()[:3] == ["step,loss,valid_loss", "1,1.0,", "2,0.5,0.5"]
    assert log.series("loss")[2] == (3, 1 / 3) and log.series("valid_loss") == [(2, 0.5)]
    with path.open("a") as file:
        file.write("5,0.1")  # killed while it wrote: there is no last value
    resumed = Log(path, ("step", "loss", "valid_loss"), after=2)
    assert [row["step"] for row in resumed.rows] == ["1", "2"]
    resumed.add({"step": 3, "loss": 0.25})
    assert path.read_text().splitlines()[-1] == "3,0.25," and len(path.read_text().splitlines()) == 4
    assert Log(path, ("step", "loss"), after=0).rows == []


def test_a_log_that_a_full_disk_cannot_hold_keeps_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    Log(path, ["step", "loss"]).add({"step": 1, "loss": 0.5})
    before = path.read_bytes()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(ResourceLimitError, match=r"log.csv needs \d+ bytes"):
        Log(path, ["step", "loss"], after=1)
    assert path.read_bytes() == before


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"log.csv cannot be written"):
        Log(tmp_path / "none" / "log.csv", ("step",))


def test_a_curve_shows_both_series_between_its_bounds():
    lines = curve([(i, 5 - i / 20) for i in range(1, 61)], [(30, 3.7), (60, 2.0)]).splitlines()
    assert len(lines) == HEIGHT + 2 and all(len(line) <= WIDTH + 10 for line in lines)
    assert lines[0].startswith("  4.9500 |.") and lines[HEIGHT - 1].startswith("  2.0000 |")
    assert lines[HEIGHT - 1].rstrip()[-1] == "o"
    drawn = "".join(line[10:] for line in lines[:HEIGHT])
    assert drawn.count("o") == 2 and drawn.count(".") > 40
    assert lines[-1].split() == ["step", "1", "60"]


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)]])
def test_a_curve_of_few_or_equal_losses_is_drawn(points):
    assert curve(points).count(".") - 2 * bool(points) == len(points)


def test_a_picture_is_a_png(tmp_path):
    assert picture(tmp_path / "loss.png", [(1, 2.0), (2, 1.0)], [(2, 1.5)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
