"""The report's rollouts: sides aligned by prompt, colours that follow the KL, safe, and searched.

Runs are written by hand, and the page is read back by a parser, as a browser would.
"""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import copy_of

from eval import rollouts_page
from eval.rollouts_page import HEAD, LEVELS, PROMPTS, TAIL
from opd.cli import main

VOID = {"meta", "img", "input", "br"}


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.classes = (attributes.get("class") or "").split()
        self.inside: list[Element | str] = []

    def all(self, name: str) -> list[Element]:
        """Elements within that have this tag or class, in their order."""
        return [e for e in self._walk() if e.tag == name or name in e.classes]

    def _walk(self) -> Iterator[Element]:
        for part in self.inside:
            if isinstance(part, Element):
                yield part
                yield from part._walk()

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)


class Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, "elements end in the order that they begin in"

    def handle_data(self, data):
        self.open[-1].inside.append(data)


@pytest.fixture
def run(vanilla, tmp_path) -> Path:
    """A run of three steps, to which the tests give other rollouts."""
    folder = copy_of(vanilla, tmp_path)
    shutil.rmtree(folder / "validation")
    return folder


@pytest.fixture
def page(tmp_path) -> Callable[..., Element]:
    def report(*runs: Path) -> Element:
        path = tmp_path / "report.html"
        assert main(["report", *map(str, runs), "--output", str(path)]) == 0
        parser = Parser()
        parser.feed(path.read_text(encoding="utf-8"))
        return parser.open[0]

    return report


def said(row: int, tokens: list[str], kl: list[float] | None = None, **more) -> dict:
    """A record as SampleWriter writes it."""
    numbers = {"reverse_kl": kl or [0.0] * len(tokens)}
    numbers |= {"student_logprob": [-0.25] * len(tokens), "teacher_logprob": [-4.0] * len(tokens)}
    about = {"row": row, "prompt": f"prompt {row}=", "answer": "7", "finish_reason": "stop"}
    return {**about, "completion": "".join(tokens), "tokens": tokens, **numbers, **more}


def write(run: Path, **files: list[dict]) -> None:
    (run / "validation").mkdir(exist_ok=True)
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "validation" / f"{name}.jsonl").write_text(lines)


def sides(row: Element) -> dict[str, str]:
    """What each side says in a row, by the name above it."""
    found = row.all("section")
    assert [s.classes[0] for s in found] == [s.all("h4")[0].all("b")[0].text for s in found]
    return {s.classes[0]: "".join(p.text for p in s.all("text")) for s in found}


def test_base_student_and_teacher_stand_side_by_side_by_prompt(run, page):
    write(
        run,
        step_000000=[said(0, ["a0"]), said(1, ["a1"], correct=False), said(2, ["a2"])],
        step_000002=[said(0, ["no"]), said(1, ["no"])],
        step_000003=[
            said(1, ["b1"], correct=True, data_set="sums"),
            said(0, ["b0"], finish_reason="length"),
        ],
        step_best=[said(1, ["a copy that somebody has made"])],
        step_000009=[said(0, ["of a run that was resumed from before"])],
        teacher=[said(1, ["c1"]), said(0, ["c0"], prompt="of other data")],
    )
    one, zero = page(run).all("rollout")
    assert sides(one) == {"base": "a1", "student": "b1", "teacher": "c1"}
    assert sides(zero) == {"base": "a0", "student": "b0", "teacher": ""}
    assert one.all("prompt")[0].text == "prompt 1="
    titles = [row.all("h4")[0].text for row in (one, zero)]
    assert titles == ["prompt 1 of sums, answer 7", "prompt 0, answer 7"]
    heads = [[side.all("h4")[0].text for side in row.all("section")] for row in (one, zero)]
    assert [re.sub(" ·.*", "", head) for head in heads[0]] == [
        *("base, step 0", "student, step 3", "teacher")
    ]
    assert "✗ wrong" in heads[0][0]
    assert "✓ right" in heads[0][1]
    assert "right" not in heads[0][2]
    assert "cut by the limit" in heads[1][1]
    assert heads[1][2] == "teacher: not sampled"


def test_what_an_environment_says_is_told_apart_and_in_no_mean(run, page):
    turns = said(0, ["8", "no", "?", "9"], [0.5, 0.0, 0.0, 1.5], inserted=[0, 1.0, 1.0, 0])
    write(run, step_000000=[turns])
    (side,) = page(run).all("section")
    head = side.all("h4")[0].text
    assert "KL 1.000" in head
    assert "2 tokens" in head
    assert [token.classes for token in side.all("i")] == [["k3"], ["u"], ["u"], ["k4"]]
    write(run, step_000000=[{**turns, "inserted": [0]}])
    with pytest.raises(AssertionError):  # a message, and code 2
        page(run)


def test_colours_follow_the_kl_and_the_title_has_the_numbers(run, page):
    kl = [0.0, 0.0099, *LEVELS, 2.99, math.inf, math.nan]
    tokens = [f" t{i}" for i in range(len(kl))]
    write(run, step_000000=[said(0, tokens, kl)])
    html_page = page(run)
    found = html_page.all("section")[0].all("i")
    assert [token.text for token in found] == tokens
    levels = [*("", ""), *("k1", "k2", "k3", "k4", "k5"), *("k4", "k5", "")]
    assert [" ".join(token.classes) for token in found] == levels
    titles = [token.attributes["title"] for token in found]
    assert titles[4] == "␣t4: KL 0.300 nats, log p -0.250, log q -4.000"
    legend = [(" ".join(box.classes), box.text) for box in html_page.all("legend")[0].all("i")]
    assert legend[0] == ("k0", "below 0.01")
    assert legend[1:3] == [("k1", "0.01 to 0.1"), ("k2", "0.1 to 0.3")]
    assert legend[5] == ("k5", "3 and more")


def luminance(colour: str) -> float:
    """Of WCAG 2: of a colour #rrggbb, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_told_apart_in_grey_and_text_be_read_on_all():
    style = rollouts_page.STYLE
    colours = re.findall(r"\.k(\d) \{ background: (#\w{6})", style)
    assert [int(level) for level, _ in colours] == [1, 2, 3, 4, 5]
    shades = [1.0, *(luminance(colour) for _, colour in colours)]
    ratios = [(a + 0.05) / (b + 0.05) for a, b in pairwise(shades)]
    assert min(ratios) > 1.05
    ink = luminance("#1a1a1a")
    assert (shades[-1] + 0.05) / (ink + 0.05) > 4.5  # WCAG AA
    assert len(re.findall(r"\.k[45] \{[^}]*underline", style)) == 2


HOSTILE = [
    *("</script>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'>&amp;"),
    *("\x00\x1b[31m", "\u202eevil", "\ud83d", "", "😀", "line\nbreak", "</p></section>"),
]


def test_no_text_of_a_model_leaves_its_place(run, page, tmp_path):
    prompt = "</p><script>alert(2)</script>" + "".join(HOSTILE)
    record = said(0, HOSTILE, prompt=prompt, answer="<b>7</b>", teacher="<u>")
    write(run, step_000000=[record], teacher=[record])
    run = run.rename(tmp_path / "<i>run")
    found = page(run)
    shown = [t.replace("\x00\x1b", "␀␛").replace("\u202e", "�") for t in HOSTILE]
    shown[6] = "�"
    for side in found.all("section"):
        assert [token.text for token in side.all("i")] == shown
    assert found.all("prompt")[0].text == "</p><script>alert(2)</script>" + "".join(shown)
    assert found.all("summary")[-1].text == "<i>run: 1 prompt"
    assert "answer <b>7</b>" in found.all("rollout")[0].all("h4")[0].text
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == 1  # the curves
    assert not found.all("u")


def test_the_search_finds_its_parts_in_the_page(run, page):
    """What the script asks for, by id and class, is there; it asks for nothing from elsewhere."""
    write(run, step_000000=[said(i, ["a", "\n"]) for i in range(3)])
    found = page(run)
    (script,) = found.all("script")
    assert not script.attributes
    ids = re.findall(r'getElementById\("(\w+)"\)', script.text)
    classes = re.findall(r'querySelector(?:All)?\("\.(\w+)', script.text)
    assert ids == ["find", "found"]
    assert set(classes) == {"rollout", "text", "run"}
    for name in ids:
        assert len([e for e in found.all("form")[0]._walk() if e.attributes.get("id") == name]) == 1
    (label,) = found.all("label")
    assert label.attributes["for"] == "find"
    (box,) = found.all("input")
    assert box.attributes["type"] == "search"
    assert "hidden" in found.all("form")[0].attributes  # the script shows it
    rows = found.all("run")[0].all("rollout")
    assert len(rows) == 3
    for row in rows:  # prompt and completion can be found, and nothing else
        assert [part.text for part in row.all("text")] == [row.all("prompt")[0].text, "a\n"]
    assert "http" not in script.text


def test_what_is_long_is_cut_and_the_page_says_so(run, page):
    many = [f"{i};" for i in range(HEAD + TAIL + 1234)]
    records = [said(i, many[: HEAD + TAIL]) for i in range(PROMPTS + 3)]
    records[1] = said(1, many, prompt="x" * 900 + "y" * 5000 + "z" * 300)
    write(run, step_000000=records)
    found = page(run)
    assert f"the first {PROMPTS} of {PROMPTS + 3} prompts" in found.all("summary")[-1].text
    rows = found.all("rollout")
    assert len(rows) == PROMPTS
    assert sides(rows[0])["base"] == "".join(many[: HEAD + TAIL])
    cut = "".join(many[:HEAD]) + " … 1,234 tokens left out … " + "".join(many[-TAIL:])
    assert sides(rows[1])["base"] == cut
    prompt = rows[1].all("prompt")[0].text
    assert prompt == "x" * 900 + " … 5,000 characters left out … " + "z" * 300


def test_many_runs_share_the_rows_of_a_page(run, page, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts_page, "PROMPTS_OF_ALL", 8)
    write(run, step_000000=[said(i, ["a"]) for i in range(3)])
    copies = [shutil.copytree(run, tmp_path / str(i)) for i in range(2)]
    runs = page(run, *copies).all("run")
    assert [len(one.all("rollout")) for one in runs] == [2, 2, 2]
    assert runs[1].all("summary")[0].text == "0: the first 2 of 3 prompts"


def test_only_the_first_of_several_runs_is_open(run, searched, page):
    write(run, step_000000=[said(0, ["a"])])
    runs = page(run, searched).all("run")
    assert ["open" in one.attributes for one in runs] == [True, False]


def test_runs_of_before_have_a_report_too(run, page):
    """Without what was said, and with texts whose tokens nobody knows."""
    assert not page(run).all("rollout")
    assert not page(run).all("script")
    plain = {"row": 0, "prompt": "1+1=", "completion": "2 <3"}
    write(run, step_000003=[plain])
    found = page(run)
    assert sides(found.all("rollout")[0]) == {"student": "2 <3"}
    assert not found.all("section")[0].all("i")
    assert "Not sampled in this run: base, teacher" in found.all("run")[0].text


def test_what_a_kill_has_cut_is_left_out_and_what_is_damaged_is_named(run, page, capsys):
    write(run, step_000000=[said(0, ["a"]), said(1, ["b"])])
    path = run / "validation" / "step_000000.jsonl"
    path.write_text(path.read_text()[:-30])
    assert len(page(run).all("rollout")) == 1
    for bad, message in [
        (said(0, ["a", "b"], [0.5]), "row 0: reverse_kl has 1 numbers for 2 tokens"),
        (said(0, ["a"], ["x"]), 'reverse_kl.0 must be a number, not "x"'),
        ({**said(0, ["a"]), "prompt": 5}, "prompt must be text, not 5"),
    ]:
        write(run, step_000000=[bad])
        assert main(["report", str(run), "--output", str(run / "report.html")]) == 2
        assert f"step_000000.jsonl: {message}" in capsys.readouterr().err
