"""OPD beside RL: what agrees with the paper is judged by rows written by hand."""

import json

import pytest

from eval.demo import opd
from eval.results import command, findings
from eval.results.command import _analyze, by_seed, mean_over_seeds, paper_table, read_tables
from eval.results.findings import Answer, answered, interpolated, verdict
from opd.errors import UserError


def spectrum(run, step, *values):
    names = ("spectral_norm", "spectral_ratio", "effective_rank", "top_ratio")
    return {"run": run, "step": step, **dict(zip(names, values, strict=True))}


def as_the_paper_says():
    """Rows in which everything is as in the paper."""
    windows = {"mlp": (0.1, 0.4, 0.7, 0.4, 0.1), "attention": (0.1, 0.4, 0.5, 0.4, 0.1)}
    matrices = (6, 9, 9, 9, 6)
    return {
        "spectra": [
            spectrum("opd", 30, 0.2, 0.9, 90.0, 0.99),  # is not the last
            spectrum("opd", 60, 0.11, 0.4, 70.0, 0.9),
            spectrum("rl", 60, 0.09, 0.3, 90.0, 0.8),
        ],
        "scaling": [
            {"run": run, "a": a, "norm": a * norm, "accuracy": 0.4 + a * gain}
            for run, norm, gain in [("opd", 2.0, 0.5), ("rl", 4.0, 0.5)]
            for a in (0.0, 0.5, 1.0)
        ],
        "embeddings": [
            {"run": run, "weights": weights, "accuracy": accuracy, "cosine": cosine}
            for run, cosine in [("opd", 0.97), ("rl", 0.93)]
            for weights, accuracy in [("as trained", 0.9), ("with the base's embedding", 0.89)]
        ],
        "windows": [
            {"run": run, "group": group, "centre": centre, "accuracy": accuracy, "matrices": size}
            for run in ("opd", "rl")
            for group, values in windows.items()
            for centre, (accuracy, size) in enumerate(zip(values, matrices, strict=True))
        ],
        "subspaces": [
            {"run": run, "part": part, "percent": percent, "accuracy": accuracy, "norm": norm}
            for run, tail in [("opd", 0.1), ("rl", 0.2)]
            for part, percent, accuracy, norm in [
                ("all", 100, 0.9, 1.0),
                ("top", 10, 0.89, 1.0),
                ("bottom", 50, 0.4, tail),
            ]
        ],
        "lock_in": [
            {"run": run, "step": step, "cosine_mean": value}
            for run, early in [("opd", 0.6), ("rl", 0.4)]
            for step, value in [(6, early), (60, 1.0)]
        ],
        "planes": [
            {"run": run, "step": step, "matrix": "m", "explained": value}
            for run, value in [("opd", 0.95), ("rl", 0.8)]
            for step in (6, 60)
        ],
        "norm_matching": [
            {"run": "opd", "step": step, "b": b, "accuracy": accuracy}
            for step in (6, 12)
            for b, accuracy in [(0.0, 0.5), (0.8, 0.8), (1.0, 0.8), (1.6, 0.6)]
        ],
    }


def exchanged(found):
    """OPD's rows are RL's, and the other way round."""
    other = {"opd": "rl", "rl": "opd"}
    return {name: [{**r, "run": other[r["run"]]} for r in rows] for name, rows in found.items()}


def test_everything_holds_where_it_is_as_the_paper_says():
    for finding, answers in answered({0: as_the_paper_says()}):
        assert answers[0].holds is True, finding.says


def test_what_compares_both_does_not_hold_where_they_are_exchanged():
    found = exchanged(as_the_paper_says())
    found["norm_matching"] = as_the_paper_says()["norm_matching"]  # is of OPD alone
    holds = {finding.says: of[0].holds for finding, of in answered({0: found})}
    assert [says for says, value in holds.items() if value] == [
        "The base's embedding in the trained model changes next to nothing",
        "Updates of MLP are worth more than those of attention",
        "The middle layers are worth most",
        "A tenth of the rank recovers 95% of the gain, of both",
        "An early update with the final norm has 80% of the score",
        "More than the final norm makes it worse",
    ]


def changed(table, where, **values):
    found = as_the_paper_says()
    for row in found[table]:
        if where.items() <= row.items():
            row.update(values)
    return found


@pytest.mark.parametrize(
    ("ask", "table", "where", "accuracy"),
    [
        (findings.embedding_swap, "embeddings", {"weights": "as trained", "run": "rl"}, 0.8),
        (findings.mlp_over_attention, "windows", {"group": "mlp", "run": "rl"}, 0.2),
        (findings.middle_windows, "windows", {"centre": 3, "run": "rl"}, 0.8),
        (findings.middle_windows, "windows", {"centre": 1, "run": "rl"}, 0.8),
        (findings.top_tenth_recovers, "subspaces", {"part": "top", "run": "opd"}, 0.87),
        (findings.early_with_final_norm, "norm_matching", {"b": 1.0, "step": 6}, 0.7),
        (findings.early_with_final_norm, "norm_matching", {"b": 0.0, "step": 6}, 0.85),
        (findings.worse_beyond, "norm_matching", {"b": 1.6, "step": 6}, 0.81),
    ],
)
def test_what_is_said_of_both_does_not_hold_where_one_does_otherwise(ask, table, where, accuracy):
    assert ask(as_the_paper_says()).holds is True
    assert ask(changed(table, where, accuracy=accuracy)).holds is False


def test_what_cannot_be_said_is_not_said():
    found = as_the_paper_says()
    no_prompts = [{k: v for k, v in row.items() if k != "cosine"} for row in found["embeddings"]]
    assert findings.nearer_to_the_base({**found, "embeddings": no_prompts}).holds is None
    two_whole = [row for row in found["windows"] if row["centre"] != 1]
    assert findings.middle_windows({**found, "windows": two_whole}).holds is None
    no_gain = [{**row, "accuracy": 0.4} for row in found["subspaces"]]
    assert findings.top_tenth_recovers({**found, "subspaces": no_gain}).holds is None


def test_gains_are_compared_at_the_smaller_norm():
    """To norm 2, OPD rises from 0.4 to 0.9 and RL to 0.65, both evenly: means of ten points."""
    answer = findings.gain_per_norm(as_the_paper_says())
    assert answer.numbers == "mean up to norm 2: RL 0.537, OPD 0.675"


@pytest.mark.parametrize(("x", "y"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (1.5, 1.5)])
def test_curves_are_read_between_their_points_and_held_beyond(x, y):
    assert interpolated([(1, 1), (3, 3)], x) == y


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([True, True], "yes (2 of 2)"),
        ([True, False], "mixed (1 of 2)"),
        ([False, None], "no (0 of 1)"),
        ([None], "cannot be said"),
    ],
)
def test_a_verdict_counts_the_seeds_that_can_tell(holds, said):
    assert verdict({seed: Answer(of, "") for seed, of in enumerate(holds)}) == said


def test_means_are_of_what_is_about_the_same():
    def row(run, a, accuracy):
        return {"run": run, "step": 3, "a": a, "accuracy": accuracy}

    seeds = [
        [row("opd", 0.0, 0.1), row("opd", 1.0, 0.5), row("rl", 1.0, 0.2)],
        [row("rl", 1.0, 0.4), row("opd", 0.0, 0.3), row("opd", 1.0, 0.7)],
    ]
    assert mean_over_seeds(seeds) == [
        row("opd", 0.0, pytest.approx(0.2)),
        row("opd", 1.0, pytest.approx(0.6)),
        row("rl", 1.0, pytest.approx(0.3)),
    ]


def test_a_mean_is_of_the_seeds_that_have_a_number():
    seeds = [[{"run": "rl", "cosine_2": 0.5}], [{"run": "rl"}], [{"run": "rl", "cosine_2": 0.7}]]
    assert mean_over_seeds(seeds) == [{"run": "rl", "cosine_2": pytest.approx(0.6)}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], [["--config", "study/controls", "--seeds", "[0]"]]),
        (["--study", "mine.yaml"], []),
        (["--study", "mine.yaml", "--accelerators", "more.yaml"], [["--config", "more.yaml"]]),
    ],
)
def test_accelerators_are_run_too(tmp_path, monkeypatch, options, said):
    commands = []
    monkeypatch.setattr(command, "opd", lambda *words, **_: commands.append(list(words)))
    monkeypatch.setattr(command, "by_seed", lambda _: {})
    monkeypatch.setattr(command, "results", lambda *_: {"results.md": "done"})
    assert command.main([*options, "--output", str(tmp_path)]) == 0
    own = options[1] if options else "study/results"
    first, *others = [words[: words.index("--output")] for words in commands]
    assert first == ["study", "--config", own]
    assert others == [["study", *words] for words in said]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "nope"], "--tasks nope: no such task"),
        (["--limit", "0"], "limit 0 must be at least 1"),
        (["--samples", "many"], "--samples many: is no whole number"),
        (["--include_path", "nowhere"], "--include_path nowhere: is no folder"),
    ],
)
def test_what_cannot_score_is_said_before_anything_is_trained(options, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "opd", None)
    assert command.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.results: error: ")
    assert said in line


def test_a_command_that_fails_ends_with_its_code(capfd):
    with pytest.raises(SystemExit) as ended:
        opd("study", "--config", "nope.yaml")
    assert ended.value.code == 2
    assert "opd study: error: --config nope.yaml: there is no such file" in capfd.readouterr().err


def test_what_is_written_has_findings_and_accelerators(tmp_path, monkeypatch):
    page = {"analysis.html": "<h1>x</h1><h2>Norms</h2>rest", "analysis.md": "x", "spectra.csv": "x"}
    seen = {}
    monkeypatch.setattr(command, "contents", lambda chosen, *rest: seen.update(of=chosen) or page)
    for folder in ("study", "accelerators"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.md").write_text(f"table of {folder}")
        (tmp_path / folder / "results.png").write_bytes(b"PNG")
    found = {seed: as_the_paper_says() for seed in (0, 3)}
    files = command.results(found, tmp_path)
    assert seen["of"][:2] == ["spectra", "layers"]
    assert files.keys() == {"results.md", "results.html", "analysis.md", "spectra.csv"}
    text, html = files["results.md"], files["results.html"]
    assert "Means over seeds 0, 3;" in text
    assert text.count("yes (2 of 2)") == len(findings.FINDINGS)
    assert text.index("Table 1 of the paper") < text.index("## Accelerators\n\ntable of accel")
    assert html.index("Table 1") < html.index("<h2>Accuracy") < html.index("<h2>Accelerators")
    assert html.index("<h2>Accelerators") < html.index("<h2>Norms</h2>rest")
    assert html.count("<img") == 2


def test_table_1_has_means_and_ranges_of_the_last_updates():
    one, other = as_the_paper_says(), as_the_paper_says()
    other["spectra"][1]["spectral_norm"] = 0.15
    header, rows = paper_table({0: one, 1: other})
    assert header[1:3] == ["RL", "OPD"]
    assert rows[0][1:3] == ["0.09 (0.09 to 0.09)", "0.13 (0.11 to 0.15)"]


def study(folder, *trials):
    for method, rate, seed in trials:
        (folder / f"{method}_lr{rate}_seed{seed}").mkdir(parents=True)
    named = [{"trial": {"method": m, "learning_rate": r, "seed": s}} for m, r, s in trials]
    (folder / "results.json").write_text(json.dumps({"trials": named}))
    return folder


def test_a_study_is_one_run_of_each_for_every_seed(tmp_path):
    trials = [(method, 0.5, seed) for seed in (0, 1) for method in ("opd", "rl")]
    found = by_seed(study(tmp_path / "good", *trials))
    assert found[1] == {m: tmp_path / "good" / f"{m}_lr0.5_seed1" for m in ("opd", "rl")}
    with pytest.raises(UserError, match="must be called opd and rl"):
        by_seed(study(tmp_path / "lacks", *trials[:3]))
    with pytest.raises(UserError, match="needs one learning rate"):
        by_seed(study(tmp_path / "rates", *trials, ("rl", 0.1, 0)))


def test_an_analysis_is_made_again_if_it_was_made_of_something_else(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("eval.results.command.opd", lambda *words, threads: made.append(words))
    runs = {label: tmp_path / label for label in ("opd", "rl")}
    for folder in runs.values():
        folder.mkdir()
        (folder / "summary.json").write_text('{"steps": 60}')
    (tmp_path / "seed0").mkdir()
    for limit, steps, times in [(64, 60, 1), (64, 60, 1), (32, 60, 2), (32, 30, 3), (32, 30, 3)]:
        (runs["rl"] / "summary.json").write_text(json.dumps({"steps": steps}))
        _analyze(tmp_path, 0, runs, {"limit": str(limit)})
        assert len(made) == times
    assert made[1][-6:] == (*("--limit", "32", "--output"), str(tmp_path / "seed0"), *made[0][-2:])


def test_tables_are_read_as_they_were_written(tmp_path):
    (tmp_path / "matrices.csv").write_text("run,step,layer,norm,matrix\nopd,6,0,0.5,a.b\n")
    (tmp_path / "lock_in.csv").write_text("run,step,matrices,cosine_mean\nrl,6,28,1\n")
    (tmp_path / "dynamics.csv").write_text("run,step,norm,cosine\nopd,0,0.0,\n")
    found = read_tables(tmp_path)
    assert found["matrices"] == [
        {"run": "opd", "step": 6, "layer": 0, "norm": 0.5, "matrix": "a.b"}
    ]
    assert str(found["matrices"][0]["step"]) == "6"  # a whole number, as steps are shown
    assert found["lock_in"] == [{"run": "rl", "step": 6, "matrices": 28, "cosine_mean": 1.0}]
    assert found["dynamics"] == [{"run": "opd", "step": 0, "norm": 0.0}]
