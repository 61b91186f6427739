"""The report: self-contained, light, with the searches; the study: a table from real runs."""

import json
import re

import yaml
from conftest import ROOT, SHRUNK

from opd.cli import main


def test_report_is_self_contained_and_marks_the_searches(searched, tmp_path):
    page = tmp_path / "report.html"
    assert main(["report", str(searched), "--output", str(page)]) == 0
    text = page.read_text()
    assert 'src="data:image/png;base64,' in text
    assert "http://" not in text
    assert not re.search(r"(src|href)=(?!.?data:)|@import|url\(", text)
    assert "searched: 2 searches" in text
    assert page.stat().st_size < 1_000_000
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_study_compares_accelerators(tmp_path):
    line_search = str(ROOT / "configs" / "effopd" / "line_search.yaml")
    config = {
        "recipe": str(ROOT / "configs" / "quickstart.yaml"),
        "accelerators": {"vanilla": None, "line_search": line_search},
        "learning_rates": [1e-4],
        "seeds": [0],
        "target": 0.05,
        "max_steps": 2,
        "arguments": ["--data.validation_limit=16", *SHRUNK],
        "output": str(tmp_path / "study"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["study", "--config", str(path)]) == 0
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [r["trial"]["accelerator"] for r in results] == ["vanilla", "line_search"]
    assert all(r["steps"] is not None for r in results)
    assert "line_search" in (tmp_path / "study" / "results.md").read_text()
    assert (tmp_path / "study" / "results.png").is_file()
