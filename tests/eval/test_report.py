"""The report: self-contained, light, with the searches."""

import re

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
