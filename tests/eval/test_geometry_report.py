"""The report's section on the geometry of updates, of runs written by hand."""

import csv
import math
import re

import pytest
from hand_made import COSTS, write_run

from eval.geometry import TITLES, geometry_curves, heat_maps, layer_norms
from eval.report import report
from eval.runs import read_run
from opd.errors import UserError
from opd.geometry_rows import COLUMNS, MatrixRow, read_rows, write_rows

KINDS = ["self_attn.q_proj", "mlp.down_proj"]
LOGGED = {  # by step; resumed after the fourth, and so without cosine_first
    1: {"update_norm": 0.125, "effective_rank": 40.5},
    4: {"cosine_first": 0.75},
    8: {"update_norm": 0.25, "effective_rank": 30.25, "cosine_previous": -0.5},
}


def row(step: int, name: str, norm: float) -> MatrixRow:
    return MatrixRow(step, f"student.model.{name}.weight", norm, 0.1, 0.2, 3.0, 0.4)


@pytest.fixture
def measured(tmp_path):
    """A run of eight steps, measured after the first and the last; two layers."""
    costs = {8: [1.0] * len(COSTS)}
    folder = write_run(tmp_path / "measured", [(0, 0.1, 2.0), (8, 0.5, 1.0)], costs, [])
    metrics = folder / "metrics.csv"
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    names = sorted({f"geometry/{name}" for values in LOGGED.values() for name in values})
    with metrics.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *names])
        writer.writeheader()
        writer.writerows(rows)
        for step, values in LOGGED.items():
            named = {f"geometry/{name}": value for name, value in values.items()}
            writer.writerow({"step": step, **named})
    norms = {1: [0.1, 0.2, 0.3, 0.4], 8: [1.0, 2.0, 3.0, 4.0]}
    places = [f"layers.{layer}.{kind}" for layer in (0, 1) for kind in KINDS]
    write_rows(
        folder / "geometry.csv",
        [row(t, place, n) for t in norms for place, n in zip(places, norms[t], strict=True)],
    )
    return folder


def test_a_run_knows_its_series_and_the_matrices_of_its_last_step(measured):
    run = read_run(measured)
    assert run.geometry == {
        "update_norm": [(1, 0.125), (8, 0.25)],
        "effective_rank": [(1, 40.5), (8, 30.25)],
        "cosine_first": [(4, 0.75)],
        "cosine_previous": [(8, -0.5)],
    }
    assert [(matrix.step, matrix.norm) for matrix in run.matrices] == [
        *((8, 1.0), (8, 2.0), (8, 3.0), (8, 4.0))
    ]
    assert run.benches == {}


def test_the_report_has_a_section_of_runs_that_were_measured(measured, tmp_path):
    costs = {8: [1.0] * len(COSTS)}
    plain = write_run(tmp_path / "plain", [(0, 0.1, 2.0), (8, 0.5, 1.0)], costs, [])
    report([str(plain)], str(tmp_path / "plain.html"))
    assert "Geometry" not in (tmp_path / "plain.html").read_text()
    report([str(plain), str(measured)], str(tmp_path / "both.html"))
    page = (tmp_path / "both.html").read_text()
    section = page[page.index("<h2>Geometry of the update</h2>") :]
    (cells,) = re.findall(r"<tr>(<td>.*?)</tr>", section.partition("</table>")[0])
    values = re.findall(r"<td>(.*?)</td>", cells)
    assert values == ["measured", "8", "0.25", "-", "-", "30.2", "-"]
    for picture in ("geometry of the updates", "norms of the updates by layer"):
        assert f'<img alt="{picture}' in section


def test_norms_stand_by_layer_and_kind_with_the_shortest_names_that_tell_kinds_apart():
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "wte", "h.10.mlp.c_proj"]
    layers, kinds, norms = layer_norms([row(4, name, float(i)) for i, name in enumerate(names)])
    assert layers == [0, 10]
    assert kinds == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert norms[0] == [0.0, 1.0, 2.0]
    assert [math.isnan(norm) for norm in norms[1]] == [True, True, False]
    assert norms[1][2] == 4.0


def test_a_heat_map_shows_each_matrix_with_its_number():
    rows = [row(4, f"layers.{i}.{kind}", i + 0.5) for i in range(3) for kind in KINDS]
    figure = heat_maps({"run": rows, "no layers": [row(4, "wte", 1.0)]})
    axis = figure.axes[0]
    assert axis.get_title() == "run, step 4"
    (picture,) = axis.get_images()
    assert picture.get_array().tolist() == [[0.5, 0.5], [1.5, 1.5], [2.5, 2.5]]
    assert [text.get_text() for text in axis.texts] == ["0.5", "0.5", "1.5", "1.5", "2.5", "2.5"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["q_proj", "down_proj"]


def test_curves_differ_in_colour_and_marker_and_what_was_not_measured_is_left_out():
    series = {f"run {i}": {"top_ratio": [(1, 0.5), (2, 0.25 * i)]} for i in range(3)}
    figure = geometry_curves(series)
    (axis,) = (a for a in figure.axes if a.get_title() == TITLES["top_ratio"])
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 2][:3]
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 0.25 * i] for i in range(3)]
    assert len({line.get_color() for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 3


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row(1, "layers.0.mlp.up_proj", 0.25), row(2, "layers.0.mlp.up_proj", math.nan)]
    write_rows(tmp_path / "run" / "geometry.csv", rows)
    first, second = read_rows(tmp_path / "run" / "geometry.csv")
    assert first == rows[0]
    assert math.isnan(second.norm)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["geometry.csv"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n", " line 1: not a geometry.csv: expected step,name,norm,"),
        ("", " line 1: not a geometry.csv"),
        ("COLUMNS\n1,x,1,1,1,1,1\n2,x,1,1\n", " line 3: damaged: expected a step, a name and 5"),
        ("COLUMNS\none,x,1,1,1,1,1\n", " line 2: damaged"),
        ("COLUMNS\n1,x,1,1,1,1,1,1\n", " line 2: damaged"),
        ("COLUMNS\n\n", " line 2: damaged"),
        ("\xff", ": not a geometry.csv ('utf-8' codec"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(measured, text, problem):
    written = text.replace("COLUMNS", ",".join(COLUMNS)).encode("latin-1")
    (measured / "geometry.csv").write_bytes(written)
    with pytest.raises(UserError, match=re.escape(f"geometry.csv{problem}")):
        read_run(measured)


def test_a_file_without_rows_has_no_matrices(measured):
    write_rows(measured / "geometry.csv", [])
    assert read_run(measured).matrices == []
