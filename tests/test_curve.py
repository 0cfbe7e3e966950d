import json
from pathlib import Path

import pytest
from matplotlib import colormaps
from matplotlib.collections import LineCollection, PathCollection

from drift.curve import CurvePoint, draw, joined, write_curve


def point(step: int, dataset: str = "sudoku", accuracy: float = 0.5, timesteps: float = 3.0) -> CurvePoint:
    low, high = max(accuracy - 0.1, 0.0), min(accuracy + 0.2, 1.0)
    return CurvePoint(dataset=dataset, step=step, accuracy=accuracy, low=low, high=high, timesteps=timesteps)


CURVE = [point(0, accuracy=0.2, timesteps=3.4), point(10), point(20, accuracy=1.0, timesteps=2.5)]


def dots_of(figure) -> list[PathCollection]:
    return [found for found in figure.axes[0].collections if isinstance(found, PathCollection)]


def test_a_point_a_step_and_the_new_one_counts():
    assert joined([], CURVE) == CURVE
    again = point(10, accuracy=0.6)
    assert joined(CURVE, [again]) == [CURVE[0], again, CURVE[2]]
    assert joined(CURVE[:1], [CURVE[2], CURVE[1]]) == CURVE


def test_sets_stay_in_order_and_apart():
    first, second = [point(10, "b"), point(10, "a")], [point(20, "b"), point(20, "a")]
    assert joined(first, second) == [first[0], second[0], first[1], second[1]]


def test_a_validation_is_a_dot_with_its_interval_coloured_by_its_step():
    figure = draw(CURVE)
    axes = figure.axes[0]
    (dots,) = dots_of(figure)
    assert dots.get_offsets().tolist() == [[3.4, 0.2], [3.0, 0.5], [2.5, 1.0]]
    colours = dots.get_facecolors().tolist()
    assert colours == colormaps["viridis_r"]([0.0, 0.5, 1.0]).tolist()
    (bars,) = [found for found in axes.collections if isinstance(found, LineCollection)]
    ends = [[tuple(end) for end in bar] for bar in bars.get_segments()]
    assert ends == [[(each.timesteps, each.low), (each.timesteps, each.high)] for each in CURVE]
    assert bars.get_colors().tolist() == colours
    (line,) = axes.lines
    assert list(line.get_xdata()) == [3.4, 3.0, 2.5]
    assert sorted(text.get_text() for text in axes.texts) == ["step 0", "step 20"]
    assert axes.get_legend() is None
    assert figure.axes[1].get_ylabel() == "step"  # the colour bar


def test_one_line_for_each_set():
    figure = draw([point(0, "a"), point(10, "a"), point(0, "b")])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 1]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    markers = [dots.get_paths()[0].vertices.tolist() for dots in dots_of(figure)]
    assert markers[0] != markers[1]


def test_the_first_validation_alone_can_be_drawn(tmp_path: Path):
    write_curve(tmp_path, CURVE[:1])
    assert [text.get_text() for text in draw(CURVE[:1]).axes[0].texts] == ["step 0"]
    assert (tmp_path / "accuracy_timesteps.png").is_file()


def test_numbers_and_plot_are_written_into_the_folder(tmp_path: Path):
    folder = tmp_path / "deep" / "run"
    write_curve(folder, CURVE)
    found = json.loads((folder / "accuracy_timesteps.json").read_text(encoding="utf-8"))
    assert found[0] == {
        "dataset": "sudoku",
        "step": 0,
        "accuracy": 0.2,
        "low": 0.1,
        "high": 0.4,
        "timesteps": 3.4,
    }
    assert [CurvePoint(**each) for each in found] == CURVE
    assert (folder / "accuracy_timesteps.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 2


def test_what_was_written_before_stays_until_the_new_is_whole(tmp_path: Path, monkeypatch):
    write_curve(tmp_path, CURVE[:1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def cut_short(self, path, **settings):
        Path(path).write_bytes(b"\x89PN")
        raise OSError("no space")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", cut_short)
    with pytest.raises(OSError, match="no space"):
        write_curve(tmp_path, CURVE)
    png = tmp_path / "accuracy_timesteps.png"
    assert png.read_bytes() == before[png]
