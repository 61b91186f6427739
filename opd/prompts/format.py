"""How a row becomes token ids: its fields, the chat template, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.errors import UserError
from opd.prompts.prompt import Prompt
from opd.prompts.sources import Row


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes token ids.

    Args:
        prompt_field: Field with the prompt's text.
        messages_field: Field with a chat, a list of {role, content}; wins over the prompt field.
        answer_field: Field with the reference answer.
        teacher_field: Field with the teacher's name.
        system_prompt: System message put before prompts that are plain text.
        chat_template: Render plain-text prompts as a user message where the tokenizer has a chat
            template. Set to false for base models that are prompted with plain text.
        chat_template_kwargs: Passed to the chat template, for example {enable_thinking: false}.
    """

    prompt_field: str = "prompt"
    messages_field: str = "messages"
    answer_field: str = "answer"
    teacher_field: str = "teacher"
    system_prompt: str | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def render(self, row: Row, where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
        """Render one row as text.

        Returns:
            The text, and whether a chat template made it (and so wrote its own special tokens).

        Raises:
            UserError: The row has no usable prompt; ``where`` names it.
        """
        messages, text = row.get(self.messages_field), row.get(self.prompt_field)
        if messages is None:
            if not isinstance(text, str) or not text:
                raise UserError(
                    f"{where}: needs a non-empty text {self.prompt_field!r} or a list "
                    f"{self.messages_field!r}; it has {sorted(row)}"
                )
            if tokenizer.chat_template is None or not self.chat_template:
                return text, False
            system = [{"role": "system", "content": self.system_prompt}]
            messages = [*(system if self.system_prompt else []), {"role": "user", "content": text}]
        elif not _is_chat(messages):
            raise UserError(
                f"{where}: {self.messages_field!r} must be a non-empty list of objects with a "
                "'role' and a 'content'"
            )
        elif tokenizer.chat_template is None:
            raise UserError(
                f"{where}: holds {self.messages_field!r}, but the tokenizer has no chat template; "
                "name one that has with --model.tokenizer"
            )
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                **(self.chat_template_kwargs or {}),
            )
        except Exception as error:  # templates raise whatever their author chose
            raise UserError(f"{where}: the chat template refuses it ({error})") from error
        return str(rendered), True


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
    )


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    *,
    source: str = "rows",
    unit: str = "row",
) -> list[Prompt]:
    """Render and tokenize rows.

    Args:
        rows: Rows as :func:`read_rows` gives them.
        tokenizer: The student's tokenizer.
        fmt: Field names and chat template options.
        source: Name of the source in messages.
        unit: What a row is called in messages; ``line`` counts from 1, all else from 0.

    Raises:
        UserError: A row has no usable prompt, or a field of the wrong type.
    """
    first = 1 if unit == "line" else 0
    where = [f"{source} {unit} {i + first}" for i in range(len(rows))]
    rendered = [fmt.render(row, w, tokenizer) for row, w in zip(rows, where, strict=True)]
    ids: list[list[int]] = [[]] * len(rows)
    for templated in (True, False):
        chosen = [i for i, (_, by_template) in enumerate(rendered) if by_template == templated]
        if chosen:
            encoded = tokenizer([rendered[i][0] for i in chosen], add_special_tokens=not templated)[
                "input_ids"
            ]
            for i, token_ids in zip(chosen, encoded, strict=True):
                ids[i] = token_ids
    prompts = []
    for i, row in enumerate(rows):
        answer, teacher = row.get(fmt.answer_field), row.get(fmt.teacher_field)
        if not isinstance(answer, str | int | float | None):
            raise UserError(f"{where[i]}: {fmt.answer_field!r} must be text or a number")
        if not isinstance(teacher, str | None):
            raise UserError(f"{where[i]}: {fmt.teacher_field!r} must be text")
        if not ids[i]:
            raise UserError(f"{where[i]}: the prompt is empty after tokenization")
        prompts.append(Prompt(i, tuple(ids[i]), None if answer is None else str(answer), teacher))
    return prompts


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's own, else its EOS, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
