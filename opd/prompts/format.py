"""How a row becomes token ids: its fields, the chat template, the tokenizer."""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opd.errors import UserError
from opd.prompts.prompt import Prompt
from opd.prompts.sources import Row

log = logging.getLogger(__name__)

Turn = dict[str, Any]
Reader = tuple[str, PreTrainedTokenizerBase]  # where a teacher comes from, and its tokenizer
SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")  # others must be named by the template
PROBE = "PROBE"
PROMPT = "{prompt}"
CONTEXT = "{context}"
SHORTEST_MARKER = 3  # characters; what is shorter than that stands in ordinary text too
WRITE_LIST = "write it as a JSON list of {role, content}, without quotes around it"
CHAT = "must be a non-empty list of objects with a 'role' and a 'content'"
KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    bytes: "binary data",
    list: "a list",
    dict: "an object",
    datetime.datetime: "a time",
}


@dataclass(frozen=True)
class PromptFormat:
    r"""How a row becomes token ids.

    A field may be nested: ``reward_model.ground_truth`` is the field ``ground_truth`` of the object
    in ``reward_model``, unless a row has a field with the whole name.

    Args:
        prompt_field: Field with the prompt: text, or a chat as in ``messages_field``.
        messages_field: Field with a chat, a list of {role, content}; wins over the prompt field.
        answer_field: Field with the reference answer.
        teacher_field: Field with the teacher's name.
        context_field: Field with what the teacher alone reads beside the prompt, as a solution or a
            hint: then it knows more than the student. None: both read the same.
        teacher_template: What a teacher is asked where a row has such a field: {prompt} stands for
            what the student is asked, {context} for the field.
        teacher_rendering: What teachers read: the ``student``'s tokens, or each prompt as the
            tokenizer and chat template of its teacher render it (``own``), which must have the same
            vocabulary. The tokens of completions are the same.
        completion_field: Field with a completion, for ``model.mixture``: text, or a chat that ends
            with the assistant's turn, as that in ``messages_field``. None: there are none.
        last_assistant: A chat that ends with turns of the assistant, as conversations do. ``drop``:
            they are left out, and the student answers what came before. ``refuse``: it ends the run
            with an error. ``continue``: the student goes on with the last one.
        system_turns: What becomes of the rows' own system turns: ``keep`` or ``drop``.
        system_prompt: System message put before prompts that have none.
        prompt_template: What the student is asked, where {prompt} stands for the prompt or for a
            chat's last turn of the user. For example: "{prompt} Answer in \\boxed{}."
        chat_template: Render plain-text prompts as a user message where the tokenizer has a chat
            template. Set to false for base models that are prompted with plain text.
        chat_template_kwargs: Passed to the chat template, for example {enable_thinking: false}.
    """

    prompt_field: str = "prompt"
    messages_field: str = "messages"
    answer_field: str = "answer"
    teacher_field: str = "teacher"
    context_field: str | None = None
    teacher_template: str = "{context}\n\n{prompt}"
    teacher_rendering: Literal["student", "own"] = "student"
    completion_field: str | None = None
    last_assistant: Literal["drop", "refuse", "continue"] = "drop"
    system_turns: Literal["keep", "drop"] = "keep"
    system_prompt: str | None = None
    prompt_template: str = "{prompt}"
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if PROMPT not in self.prompt_template:
            raise UserError(
                f"data.format.prompt_template must hold {PROMPT}, which stands for what a row "
                f"asks; it is {self.prompt_template[:60]!r}"
            )
        if PROMPT not in self.teacher_template or CONTEXT not in self.teacher_template:
            raise UserError(
                f"data.format.teacher_template must hold {PROMPT} and {CONTEXT}; it is "
                f"{self.teacher_template[:60]!r}"
            )

    def check_fields(self, rows: Iterable[Row], sources: str) -> None:
        """Make sure that fields which the user names are there.

        Raises:
            UserError: No row has one.
        """
        chosen = [
            f
            for f in fields(self)
            if f.name.endswith("_field") and getattr(self, f.name) != f.default
        ]
        missing = {f.name: getattr(self, f.name) for f in chosen}
        names: set[str] = set()
        for row in rows if missing else ():
            names.update(row)
            missing = {key: name for key, name in missing.items() if value_of(row, name) is None}
            if not missing:
                return
        for key, name in missing.items():
            raise UserError(
                f"data.format.{key}: no row of {sources} has {name!r}; rows have {sorted(names)}"
            )

    def render(
        self,
        row: Row,
        where: str,
        tokenizer: PreTrainedTokenizerBase,
        context: str | None = None,
    ) -> Rendered:
        """Render one row as text.

        Args:
            row: The row.
            where: What to call it.
            tokenizer: The student's.
            context: What the teacher alone reads; None: render it for the student.

        Raises:
            UserError: The row has no usable prompt; ``where`` names it.
        """
        prompt = self._asked(self._read(row, where), self.prompt_template, where)
        if context is not None:
            # What stands in a context is no place for the prompt
            before, _, after = self.teacher_template.partition(CONTEXT)
            if PROMPT in before:
                prompt = self._asked(prompt, before, where, after=context + after)
            else:
                prompt = self._asked(prompt, after, where, before=before + context)
        template = tokenizer.chat_template
        if isinstance(prompt, str) and (template is None or not self.chat_template):
            for name in ("system_prompt", "chat_template_kwargs"):
                if getattr(self, name):
                    why = "data.format.chat_template is false" if template else "it has none"
                    raise UserError(
                        f"data.format.{name} needs the tokenizer's chat template, and {why}: "
                        f"{where} is plain text"
                    )
            return Rendered(_unicode(prompt, where), None)
        if template is None:
            raise UserError(
                f"{where}: holds a chat, but the tokenizer has no chat template; name one that has "
                "with --model.tokenizer, for the student"
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt and turns[0]["role"] not in SYSTEM:
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        return Rendered(_unicode(self.by_template(turns, where, tokenizer), where), turns)

    def _read(self, row: Row, where: str) -> str | list[Turn]:
        """Return what a row asks: text, or the turns of a chat."""
        name = self.messages_field
        value = value_of(row, name)
        if value is None:
            name = self.prompt_field
            value = value_of(row, name)
            if isinstance(value, str) and value:
                if _holds_chat(value):
                    raise UserError(f"{where}: {name!r} is a chat written as text; {WRITE_LIST}")
                return value
            if not isinstance(value, list):
                known = value is not None or name in row
                has = f"its {name!r} is {kind_of(value)}" if known else ""
                raise UserError(
                    f"{where}: needs a non-empty text {name!r} or a list {self.messages_field!r}; "
                    f"{has or f'it has {sorted(row)}'}"
                )
        must = f"{where}: {name!r} {CHAT}"
        if not isinstance(value, list) or not value:
            hint = f" that holds one: {WRITE_LIST}" if _holds_chat(value) else ""
            raise UserError(f"{must}; it is {kind_of(value)}{hint}")
        for i, turn in enumerate(value, 1):
            if not isinstance(turn, Mapping):
                raise UserError(f"{must}; turn {i} is {kind_of(turn)}")
            tools = turn.get("tool_calls") is not None
            if not isinstance(turn.get("role"), str) or not ("content" in turn or tools):
                raise UserError(f"{must}; turn {i} has {sorted(turn)}")
        turns = [_turn(turn, f"{where}: turn {i} of {name!r}") for i, turn in enumerate(value, 1)]
        if self.system_turns == "drop":
            turns = [turn for turn in turns if turn["role"] not in SYSTEM]
            if not turns:
                raise UserError(f"{where}: {name!r} has only system turns, which are dropped")
        return self._ending(turns, f"{where}: {name!r}")

    def _asked(
        self,
        prompt: str | list[Turn],
        template: str,
        where: str,
        *,
        before: str = "",
        after: str = "",
    ) -> str | list[Turn]:
        """Put what a row asks into a template, and that between two texts."""
        if template == PROMPT and not before and not after:
            return prompt
        if isinstance(prompt, str):
            return before + template.replace(PROMPT, prompt) + after
        last = max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=None)
        if last is None:
            key = "teacher_template" if before or after else "prompt_template"
            raise UserError(f"{where}: has no turn of the user for data.format.{key}")
        content = before + template.replace(PROMPT, prompt[last]["content"]) + after
        return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]

    def _ending(self, turns: list[Turn], where: str) -> list[Turn]:
        """Do what is to be done about last turns of the assistant."""
        first = next((turn for turn in turns if turn["role"] not in SYSTEM), None)
        if first is not None and first["role"] == "assistant":
            raise UserError(f"{where} begins with the assistant's turn; a user's must come before")
        if turns[-1]["role"] != "assistant":
            return turns
        if self.last_assistant == "refuse":
            raise UserError(
                f"{where} ends with the assistant's turn; remove it, or set "
                "data.format.last_assistant to drop or continue"
            )
        if self.last_assistant == "continue":
            if not turns[-1]["content"]:
                raise UserError(f"{where}: its last turn has no text that could be continued")
            return turns
        kept = max(i for i, turn in enumerate(turns) if turn["role"] != "assistant") + 1
        return turns[:kept]

    def completion(self, row: Row, where: str) -> str | None:
        """Return the completion that a row holds, if it holds one.

        Raises:
            UserError: It is of the wrong type, or the student is to go on with it.
        """
        value = None if self.completion_field is None else value_of(row, self.completion_field)
        must = f"{where}: {self.completion_field!r} must be text or a chat"
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, Mapping)]
            if len(turns) < len(value):
                raise UserError(f"{must}; a turn is no object")
            if self.last_assistant == "continue":
                raise UserError(
                    f"{where}: the last turn of {self.completion_field!r} cannot be both a "
                    "completion and what the student goes on with; set data.format.last_assistant "
                    "to drop"
                )
            last = [turn for turn in turns[1:] if turn.get("role") == "assistant"]
            ends = bool(last) and turns[-1].get("role") == "assistant"
            value = _turn(last[-1], must)["content"] if ends else None
        if not isinstance(value, str | None):
            raise UserError(f"{must}; it is {kind_of(value)}")
        return None if not value else _unicode(value, where)

    def by_template(
        self, turns: Sequence[Turn], where: str, tokenizer: PreTrainedTokenizerBase
    ) -> str:
        """Let the chat template render turns, for the assistant to answer or to go on.

        Raises:
            UserError: It refuses them.
        """
        continued = turns[-1]["role"] == "assistant"
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(turns),
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                    **(self.chat_template_kwargs or {}),
                )
            )
        except Exception as error:  # templates raise whatever their author chose
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: the chat template refuses it ({reason})") from error

    def check_template(
        self,
        rendered: Sequence[Rendered],
        where: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        arguments: bool = True,
    ) -> None:
        """Make sure that the chat template makes something of what it is handed.

        Args:
            rendered: Rows as it has rendered them.
            where: What to call them.
            tokenizer: Whose template.
            arguments: Whether it must use all of ``chat_template_kwargs``.

        Raises:
            UserError: It passes over the turns of a role, or an argument.
        """
        template, known = str(tokenizer.chat_template), set[str]()
        chats = [(o.turns, o.text, w) for o, w in zip(rendered, where, strict=True) if o.turns]
        for name in self.chat_template_kwargs or {} if chats and arguments else ():
            if name not in template:
                raise UserError(
                    f"data.format.chat_template_kwargs: the chat template does not use {name!r}"
                )
        for turns, text, place in chats:
            for i, turn in enumerate(turns):
                role = turn["role"]
                if role in known or not turn["content"]:
                    continue
                changed = {**turn, "content": turn["content"] + "."}
                others = [*turns[:i], changed, *turns[i + 1 :]]
                named = role in ROLES or f"'{role}'" in template or f'"{role}"' in template
                if not named or self.by_template(others, place, tokenizer) == text:
                    raise UserError(
                        f"{place}: the chat template knows no turn of role {role!r}; "
                        "use system, user, assistant or tool, as far as it has them"
                    )
                known.add(role)


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: What is tokenized.
        turns: The chat that a template has rendered, and so has written its own special tokens
            for; None: the text is the row's own.
    """

    text: str
    turns: list[Turn] | None


def value_of(row: Row, name: str) -> Any:
    """Return a field of a row, or of the objects in it where the name has dots; None: none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def kind_of(value: Any) -> str:
    """Say in words what a value is."""
    return "empty" if value in ("", []) else KINDS.get(type(value), type(value).__name__)


def _holds_chat(value: Any) -> bool:
    """Whether text is JSON that would be a chat."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns)


def _turn(turn: Mapping[str, Any], where: str) -> Turn:
    """Make the content of a turn text, and drop what is null (parquet fills up turns with it).

    Raises:
        UserError: It is not of text only.
    """
    kept = {key: value for key, value in turn.items() if value is not None}
    return {**kept, "content": _content(kept.get("content", ""), where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: its 'content' is {kind_of(content)}; it must be text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or kind not in (None, "text"):
            what = f"a part of type {kind!r}" if kind else f"a part that is {kind_of(part)}"
            raise UserError(f"{where}: its 'content' has {what}; students and teachers read text")
        texts.append(text)
    return "".join(texts)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])
        raise UserError(f"{where}: holds {character}, half a character; remove it") from error
    return text


def _answer(value: Any, name: str, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise UserError(f"{where}: {name!r} must be text or a number; it is {kind_of(value)}")
    if not isinstance(value, str) and not math.isfinite(value):
        raise UserError(f"{where}: {name!r} is {value}; leave it out where there is no answer")
    return format(value, "f") if isinstance(value, Decimal) else _unicode(str(value), where)


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    *,
    source: str = "rows",
    unit: str = "row",
    data_set: str | None = None,
    first_row: int = 0,
    numbers: Sequence[int] | None = None,
    teachers: Mapping[str | None, Reader] | None = None,
) -> list[Prompt]:
    """Render and tokenize rows.

    Args:
        rows: Rows as :func:`read_rows` gives them.
        tokenizer: The student's tokenizer.
        fmt: Field names and chat template options.
        source: Name of the source in messages.
        unit: What a row is called in messages; ``line`` counts from 1, all else from 0.
        data_set: Name of the data set, if it has one.
        first_row: Number of the first row, where there are several data sets.
        numbers: Numbers of the rows in their source. None: 0, 1, 2, ...
        teachers: Where the teachers of rows come from and their own tokenizers, by what rows call
            them, for prompts as they would render them. None: they read the student's.

    Raises:
        UserError: A row has no usable prompt, or a field of the wrong type.
    """
    first = 1 if unit == "line" else 0
    numbers = range(len(rows)) if numbers is None else numbers
    where = [f"{source} {unit} {number + first}" for number in numbers]
    rendered = [fmt.render(row, w, tokenizer) for row, w in zip(rows, where, strict=True)]
    fmt.check_template(rendered, where, tokenizer)
    ids = encode(rendered, tokenizer)
    _warn_of_rendered(rendered, where, tokenizer, fmt)
    completions = [fmt.completion(row, w) for row, w in zip(rows, where, strict=True)]
    completion_ids = encode_completions(completions, tokenizer)
    prompts: list[Prompt] = []
    contexts: list[str | None] = []
    for i, row in enumerate(rows):
        answer = _answer(value_of(row, fmt.answer_field), fmt.answer_field, where[i])
        teacher = value_of(row, fmt.teacher_field)
        if not isinstance(teacher, str | None):
            raise UserError(f"{where[i]}: {fmt.teacher_field!r} must be text")
        context = None if fmt.context_field is None else value_of(row, fmt.context_field)
        if not isinstance(context, str | None):
            raise UserError(f"{where[i]}: {fmt.context_field!r} must be text")
        if not ids[i]:
            raise UserError(f"{where[i]}: the prompt is empty after tokenization")
        contexts.append(context or None)
        prompts.append(
            Prompt(
                first_row + numbers[i],
                tuple(ids[i]),
                answer,
                teacher,
                None,
                data_set,
                where=where[i],
                completion_ids=completion_ids[i],
            )
        )
    return _read_by_teachers(prompts, rows, contexts, ("", tokenizer), fmt, teachers or {})


def _read_by_teachers(
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    contexts: Sequence[str | None],
    student: Reader,
    fmt: PromptFormat,
    teachers: Mapping[str | None, Reader],
) -> list[Prompt]:
    """Say what teachers read where it is something else than what the student reads."""
    readers = [teachers.get(prompt.teacher, student) for prompt in prompts]
    found = list(prompts)
    for source, tokenizer in dict.fromkeys(readers):
        mine = [i for i, reader in enumerate(readers) if reader == (source, tokenizer)]
        if tokenizer is student[1]:
            mine = [i for i in mine if contexts[i] is not None]
        where = [prompts[i].place for i in mine]
        try:
            rendered = [
                fmt.render(rows[i], place, tokenizer, contexts[i])
                for i, place in zip(mine, where, strict=True)
            ]
            if source:
                fmt.check_template(rendered, where, tokenizer, arguments=False)
        except UserError as error:
            if not source:
                raise
            raise UserError(
                f"data.format.teacher_rendering own: teacher {source}: {error}"
            ) from error
        for i, ids in zip(mine, encode(rendered, tokenizer), strict=True):
            theirs = tuple(ids)
            if theirs != prompts[i].token_ids:
                found[i] = replace(prompts[i], teacher_ids=theirs)
    return found


def encode(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize rendered rows; the BOS is the template's, the text's or the tokenizer's own."""
    ids: list[list[int]] = [[]] * len(rendered)
    for special in (False, True):
        chosen = [
            i
            for i, one in enumerate(rendered)
            if special == (one.turns is None and not _begins_with_bos(one.text, tokenizer))
        ]
        if chosen:
            texts = [rendered[i].text for i in chosen]
            encoded = tokenizer(texts, add_special_tokens=special)["input_ids"]
            for i, token_ids in zip(chosen, encoded, strict=True):
                ids[i] = token_ids
    return ids


def encode_completions(
    texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...] | None]:
    """Tokenize completions, and end them with the tokenizer's EOS unless they do already."""
    found: list[tuple[int, ...] | None] = [None] * len(texts)
    rows = [i for i, text in enumerate(texts) if text is not None]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    given = [text for text in texts if text is not None]
    encoded = tokenizer(given, add_special_tokens=False)["input_ids"] if given else []
    for i, ids in zip(rows, encoded, strict=True):
        found[i] = tuple(ids if ids[-1:] == end else [*ids, *end]) or None
    return found


def _begins_with_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text has the BOS that the tokenizer would put before it."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not text.startswith(bos):
        return False
    added = tokenizer(bos)["input_ids"]
    return list(added[:2]) == [tokenizer.bos_token_id] * 2


def _warn_of_rendered(
    rendered: Sequence[Rendered],
    where: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
) -> None:
    """Say once if prompts come with a template's marks already, and what happens to them."""
    begun = [i for i, one in enumerate(rendered) if one.turns is None]
    begun = [i for i in begun if _begins_with_bos(rendered[i].text, tokenizer)]
    if begun:
        log.warning(
            "%s (and %d more) begins with %r, so the tokenizer's is not added before it",
            where[begun[0]],
            len(begun) - 1,
            tokenizer.bos_token,
        )
    if not any(one.turns for one in rendered):
        return
    anywhere, starts, ends = _marks(tokenizer, fmt)
    found = []
    for i, one in enumerate(rendered):
        for text in (turn["content"] for turn in one.turns or [] if turn["role"] == "user"):
            marks = [mark for mark in anywhere if mark in text]
            marks += [mark for mark in starts if text.lstrip().startswith(mark)]
            marks += [mark for mark in ends if text.rstrip().endswith(mark)]
            if marks:
                found.append((i, marks[0]))
                break
    if found:
        i, mark = found[0]
        log.warning(
            "%s (and %d more) holds %r, as if it were rendered already; the chat template puts "
            "another turn around it. Give what the user says, or, if all of the prompt is in "
            "'prompt', set --data.format.chat_template false",
            where[i],
            len(found) - 1,
            mark,
        )


def _marks(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
) -> tuple[list[str], list[str], list[str]]:
    """Return what rendered text holds anywhere, begins with, and ends with."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    try:
        chat = [{"role": "user", "content": PROBE}]
        before, _, after = fmt.by_template(chat, "a prompt", tokenizer).partition(PROBE)
    except UserError:  # of templates that ask for more than a user's turn
        before = after = ""
    before = before.removeprefix(tokenizer.bos_token or "")
    long = [
        [mark for mark in marks if len(mark) >= SHORTEST_MARKER]
        for marks in (sorted(special), [before.strip()], [after.strip()])
    ]
    return long[0], long[1], long[2]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's own, else its EOS, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
