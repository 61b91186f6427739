"""The report's section of rollouts: base, student and teacher side by side, coloured by their KL.

All text is of models or data: it is escaped, and what would change the page's direction or could
not be seen is replaced by what can. Colours go from light to dark, so that they can be told apart
in grey, and the darkest two are underlined. Without JavaScript only the search is missing.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence

from eval.rollouts import BASE, STUDENT, TEACHER, Completion, HeldOut, Row, read_held_out
from eval.runs import Run

# What is more is left out, and the page says so: a prompt with three long completions is 60 kB
PROMPTS = 32  # of a run
PROMPTS_OF_ALL = 96  # of all runs of the page together
HEAD, TAIL = 200, 56  # tokens of a completion that are shown
PROMPT_HEAD, PROMPT_TAIL = 900, 300  # characters of a prompt
LEVELS = (0.01, 0.1, 0.3, 1.0, 3.0)  # nats at which the next colour begins

STYLE = """
.key { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ddd; z-index: 1;
       display: flex; flex-wrap: wrap; gap: .4rem 2rem; padding: .6rem 0; margin-bottom: 1rem }
.legend, .find { display: flex; flex-wrap: wrap; gap: .3rem .4rem; align-items: center; margin: 0 }
.find[hidden] { display: none }
.find input { font: inherit; padding: .15rem .5rem; width: 16rem; max-width: 100%;
              box-sizing: border-box }
.legend i { padding: 0 .45rem; outline: 1px solid #ccc; font-size: .9em; white-space: nowrap }
.run > summary { font-size: 1.1rem; font-weight: 600; cursor: pointer; margin-bottom: .6rem }
.rollout { border-top: 1px solid #999; padding: .7rem 0 1.3rem }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
         gap: .8rem 1.4rem }
.sides > section { min-width: 0; border-left: 4px solid #ddd; padding-left: .7rem }
.sides > .student { border-color: #555 }
.rollout h4 { font-size: .85rem; font-weight: 400; margin: 0 0 .2rem; color: #595959 }
.rollout h4 b { color: #222 } .rollout h4 .right { color: #1d6b2f }
.rollout h4 .wrong { color: #a02020 }
.text { font: 15px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
        margin: 0; color: #1a1a1a; unicode-bidi: isolate }
.prompt { background: #f2f2f2; padding: .3rem .7rem; margin-bottom: .7rem }
.text i, .legend i { font-style: normal; border-radius: 2px; color: #1a1a1a }
.text i { padding: .1em 0; box-shadow: inset -1px 0 #fff }
.text i:hover { outline: 2px solid #1a1a1a }
.text i:empty::before { content: "·" }
.n::before { content: "↵"; color: #666 }
.text em { color: #595959 }
.k1 { background: #fff7bc } .k2 { background: #fee391 } .k3 { background: #fec44f }
.text .u { color: #6b6b6b }
.k4 { background: #fe9929; text-decoration: underline }
.k5 { background: #ec7014; text-decoration: underline double }
@media (max-width: 40rem) { .key { position: static } }
@media print { .key { position: static } * { print-color-adjust: exact } }
"""
SCRIPT = """
const box = document.getElementById("find"), said = document.getElementById("found");
const plain = text => text.toLowerCase().replace(/\\s+/g, " ");
const rows = [...document.querySelectorAll(".rollout")].map(row =>
  [row, plain([...row.querySelectorAll(".text")].map(part => part.textContent).join("\\n"))]);
function find() {
  const wanted = plain(box.value.trim());
  let found = 0;
  for (const [row, text] of rows) {
    row.hidden = !text.includes(wanted);
    found += !row.hidden;
  }
  if (wanted) for (const run of document.querySelectorAll(".run"))
    run.open = run.querySelector(".rollout:not([hidden])") !== null;
  said.textContent = `${found} of ${rows.length} prompts`;
}
box.addEventListener("input", find);
box.form.addEventListener("submit", event => event.preventDefault());
box.form.hidden = false;
find();
"""

# What cannot be seen gets its picture; what turns text around, or is half a character, a mark
UNSEEN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
UNSEEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
UNSEEN |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
IN_TITLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def rollouts_section(runs: Sequence[Run]) -> str:
    """Lay out what runs have said on held-out prompts; nothing if none has said anything.

    Raises:
        UserError: A file of a run is damaged.
    """
    found = [
        (run.name, held_out)
        for run in runs
        if run.summary and (held_out := read_held_out(run.folder, int(run.summary["steps"])))
    ]
    if not found:
        return ""
    most = max(1, min(PROMPTS, PROMPTS_OF_ALL // len(found)))
    parts = [_run(name, held_out, most, i == 0) for i, (name, held_out) in enumerate(found)]
    return (
        "<h2>Rollouts</h2>"
        "<p>Held-out prompts, and what comes after them: the base (the student before training), "
        "the student, and the teacher's own completion. All draw from the same random numbers. "
        "The colour of a token is the reverse KL from student to teacher there; in the teacher's "
        "text, from the base to the teacher. Hover over a token for its numbers.</p>"
        f"<div class=key><p class=legend>{_legend()}</p>"
        "<form class=find role=search hidden><label for=find>Find in prompts and completions"
        "</label><input id=find type=search autocomplete=off>"
        "<output id=found for=find></output></form></div>"
        f"{''.join(parts)}<script>{SCRIPT}</script>"
    )


def _legend() -> str:
    bounds = [f"{bound:g}" for bound in LEVELS]
    ranges = [f"below {bounds[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(bounds))]
    boxes = [*ranges, f"{bounds[-1]} and more"]
    return "KL in nats: " + " ".join(f"<i class=k{i}>{text}</i>" for i, text in enumerate(boxes))


def _run(name: str, held_out: HeldOut, most: int, is_first: bool) -> str:
    rows, count = held_out.rows[:most], len(held_out.rows)
    shown = f"{count} prompt{'s' * (count > 1)}"
    shown = shown if count == len(rows) else f"the first {most} of {shown}"
    absent = [side for side in (BASE, STUDENT, TEACHER) if side not in held_out.steps]
    note = f"<p><small>Not sampled in this run: {', '.join(absent)}.</small></p>" if absent else ""
    return (
        f"<details class=run{' open' * is_first}><summary>{_escape(name)}: {shown}</summary>{note}"
        f"{''.join(_row(row, held_out) for row in rows)}</details>"
    )


def _row(row: Row, held_out: HeldOut) -> str:
    answer = "" if row.answer is None else f", answer <b>{_escape(row.answer)}</b>"
    data_set = "" if row.data_set is None else f" of {_escape(row.data_set)}"
    sides = "".join(_side(side, step, row.said.get(side)) for side, step in held_out.steps.items())
    return (
        f"<article class=rollout><h4>prompt {row.number}{data_set}{answer}</h4>"
        f'<p class="text prompt" dir=auto>{_prompt(row.prompt)}</p>'
        f"<div class=sides>{sides}</div></article>"
    )


def _prompt(text: str) -> str:
    dropped = len(text) - PROMPT_HEAD - PROMPT_TAIL
    if dropped <= 0:
        return _marked(text)
    cut = f"<em> … {dropped:,} characters left out … </em>"
    return _marked(text[:PROMPT_HEAD]) + cut + _marked(text[-PROMPT_TAIL:])


def _side(side: str, step: int | None, completion: Completion | None) -> str:
    name = f"<b>{side}</b>" if step is None else f"<b>{side}</b>, step {step}"
    if completion is None:
        return f"<section class={side}><h4>{name}: not sampled</h4></section>"
    said = [name, *_facts(side, completion)]
    return (
        f"<section class={side}><h4>{' · '.join(said)}</h4>"
        f"<p class=text dir=auto>{_tokens(completion)}</p></section>"
    )


def _facts(side: str, completion: Completion) -> list[str]:
    """Say in words what is known of a completion."""
    facts, count = [], sum(completion.sampled)
    kl = list(itertools.compress(completion.values.get("reverse_kl", []), completion.sampled))
    if completion.correct is not None:
        facts.append(
            "<b class=right>✓ right</b>" if completion.correct else "<b class=wrong>✗ wrong</b>"
        )
    if kl:
        whose = "base's KL" if side == TEACHER else "KL"
        facts.append(f"{whose} {sum(kl) / len(kl):.3f}")
    if "reverse_kl" in completion.values or len(completion.tokens) > 1:
        facts.append(f"{count:,} tokens")
    if not completion.ended:
        facts.append("cut by the limit of tokens")
    return facts


def _tokens(completion: Completion) -> str:
    count = len(completion.tokens)
    if count <= HEAD + TAIL:
        return "".join(_token(completion, i) for i in range(count))
    cut = f"<em> … {count - HEAD - TAIL:,} tokens left out … </em>"
    head, tail = range(HEAD), range(count - TAIL, count)
    parts = ["".join(_token(completion, i) for i in part) for part in (head, tail)]
    return cut.join(parts)


def _token(completion: Completion, i: int) -> str:
    text, values = completion.tokens[i], {n: v[i] for n, v in completion.values.items()}
    if not completion.sampled[i]:
        return f'<i class=u title="said by the environment">{_marked(text)}</i>'
    if not values:
        return _marked(text)
    names = {"reverse_kl": "KL", "student_logprob": "log p", "teacher_logprob": "log q"}
    units = {"reverse_kl": " nats"}
    numbers = [f"{names[name]} {value:.3f}{units.get(name, '')}" for name, value in values.items()]
    title = f"{text.translate(IN_TITLE) or 'part of a character'}: {', '.join(numbers)}"
    level = _level(values.get("reverse_kl", math.nan))
    kind = f" class=k{level}" if level else ""
    return f'<i{kind} title="{_escape(title)}">{_marked(text)}</i>'


def _level(kl: float) -> int:
    """Number the colour of a KL, 0 (none) to 5; none where it is not known."""
    return sum(kl >= bound for bound in LEVELS)


def _marked(text: str) -> str:
    """Escape text; line breaks can be seen, and are no part of the text."""
    return _escape(text).replace("\n", "<span class=n></span>\n")


def _escape(text: str) -> str:
    return html.escape(text.translate(UNSEEN))
