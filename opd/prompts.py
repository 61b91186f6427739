"""Prompts: a hub data set, a JSONL or parquet file or ``embedded:NAME`` becomes token ids.

A row holds ``prompt`` (text) or ``messages`` (a chat), and may hold ``answer`` and ``teacher``. All
rows are rendered and tokenized once, at set-up. The order of an epoch is a function of (seed,
epoch), and the loader's state is (epoch, batches), so a resumed run repeats nothing and skips
nothing, with any number of devices.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd.embedded import arithmetic
from opd.errors import UserError
from opd.models import load_tokenizer
from opd.seeding import derive_seed

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized.

    Attributes:
        row: Index of its row in the source, from 0.
        token_ids: Token ids, special tokens included.
        answer: Reference answer, if the row has one.
        teacher: Name of the teacher that scores its completions, if the row names one.
    """

    row: int
    token_ids: tuple[int, ...]
    answer: str | None = None
    teacher: str | None = None


@dataclass
class PromptBatch:
    """B prompts, padded on the left to P tokens.

    Attributes:
        prompts: The B prompts.
        ids: Token ids, [B, P].
        mask: True at tokens, False at padding, [B, P].
    """

    prompts: list[Prompt]
    ids: Tensor
    mask: Tensor

    @classmethod
    def collate(cls, prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
        """Pad prompts on the left with ``pad_id``."""
        width = max((len(p.token_ids) for p in prompts), default=0)
        ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            start = width - len(prompt.token_ids)
            ids[i, start:] = torch.tensor(prompt.token_ids)
            mask[i, start:] = True
        return cls(list(prompts), ids, mask)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, **kwargs: Any) -> PromptBatch:
        """Copy the tensors to a device; Lightning calls this for every batch."""
        return PromptBatch(
            self.prompts, self.ids.to(device, **kwargs), self.mask.to(device, **kwargs)
        )

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """Take some prompts, in the order given, without the padding they no longer need."""
        index = torch.as_tensor(rows, device=self.ids.device, dtype=torch.long)
        width = max((len(self.prompts[i].token_ids) for i in rows), default=0)
        start = self.ids.shape[1] - width
        return PromptBatch(
            [self.prompts[i] for i in rows], self.ids[index, start:], self.mask[index, start:]
        )

    def repeat(self, times: int) -> PromptBatch:
        """Repeat each prompt ``times`` times, copies side by side."""
        return self.select([i for i in range(len(self)) for _ in range(times)])


def read_rows(source: str, split: str) -> tuple[list[Row], str]:
    """Read all rows of a prompt source.

    Args:
        source: ``embedded:train``, ``embedded:test``, a .jsonl or .parquet file, or a hub id.
        split: Split of a hub data set; ignored elsewhere.

    Returns:
        The rows, and what one row is called in messages (``line`` or ``row``).

    Raises:
        UserError: The source does not exist, cannot be parsed, or holds no rows.
    """
    name = source.removeprefix("embedded:")
    unit = "row"
    if source != name:
        if name not in arithmetic.PROMPTS:
            known = ", ".join(f"embedded:{known}" for known in arithmetic.PROMPTS)
            raise UserError(f"{source}: the embedded prompts are {known}")
        rows: list[Row] = list(arithmetic.rows(name))
    elif source.endswith((".jsonl", ".json")):
        rows, unit = _read_jsonl(Path(source).expanduser()), "line"
    elif source.endswith(".parquet"):
        rows = _read_parquet(Path(source).expanduser())
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise UserError(f"{source}: holds no prompts")
    return rows, unit


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            if not text.strip():
                break
            raise UserError(f"{path} line {number}: is empty; remove it")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    if source.startswith((".", "/", "~")) or Path(source).exists():
        raise UserError(f"{source}: prompts come from a .jsonl or .parquet file or a hub id")
    try:
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # the hub client raises dozens of unrelated types
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: neither a .jsonl or .parquet file nor a data set on the hub with "
            f"split {split!r} ({type(error).__name__}: {reason})"
        ) from error


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


class PromptLoader:
    """Batches of prompts for one rank, in an order that depends on (seed, epoch) alone.

    Every rank walks the same global batches and takes each ``world_size``-th prompt of them, so a
    global batch does not depend on the number of ranks. The last batch of an epoch may be smaller.

    Args:
        prompts: All prompts of the source.
        batch_size: Prompts per batch, all ranks together.
        pad_id: Token id that pads on the left.
        seed: Seed of the order; None keeps the source's order.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        pad_id: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out

    def __len__(self) -> int:
        return math.ceil(len(self.prompts) / self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = self._order()
        while self.position < len(self):
            start = self.position * self.batch_size
            chosen = order[start : start + self.batch_size][self.rank :: self.world_size]
            self.position += 1
            yield PromptBatch.collate([self.prompts[i] for i in chosen], self.pad_id)

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(len(self.prompts)))
        shuffler = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "order"))
        return torch.randperm(len(self.prompts), generator=shuffler).tolist()

    def state_dict(self) -> dict[str, int]:
        """Position in the data; Lightning saves it in every checkpoint."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the checkpoint stopped."""
        self.epoch, self.position = state["epoch"], state["position"]


class PromptDataModule(LightningDataModule):
    """Prompts to train on and prompts to validate on.

    Args:
        train: Prompts to train on: hub id, .jsonl or .parquet file, or embedded:train.
        validation: Held-out prompts, named alike. None: no validation.
        tokenizer: Where the tokenizer comes from; the command line fills in the student.
        batch_size: Prompts per optimizer step, all ranks together.
        validation_batch_size: Prompts per validation batch, all ranks together.
        validation_limit: Validate on the first so many prompts only. None: on all.
        max_prompt_tokens: Longest prompt in tokens.
        overlong: Longer prompts are dropped and counted, or end the run with an error.
        format: Field names and chat template options.
        train_split: Split of a hub data set to train on.
        validation_split: Split of a hub data set to validate on.
        trust_remote_code: Let a hub tokenizer run its own code.
        seed: Seed of the order; the command line fills in seed_everything.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        tokenizer: str = "",
        batch_size: int = 1024,
        validation_batch_size: int = 256,
        validation_limit: int | None = None,
        max_prompt_tokens: int = 2048,
        overlong: Literal["drop", "error"] = "drop",
        format: PromptFormat = PromptFormat(),  # noqa: A002 - the YAML key; frozen
        train_split: str = "train",
        validation_split: str = "test",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in [
            ("batch_size", batch_size),
            ("validation_batch_size", validation_batch_size),
            ("max_prompt_tokens", max_prompt_tokens),
        ]:
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        self.train = train
        self.validation = validation
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.validation_limit = validation_limit
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong
        self.format = format
        self.train_split = train_split
        self.validation_split = validation_split
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.train_prompts: list[Prompt] = []
        self.validation_prompts: list[Prompt] = []
        self.pad_id = 0

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that are in use."""
        return [*self.train_prompts, *self.validation_prompts]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is in use."""
        return max((len(p.token_ids) for p in self.prompts), default=0)

    def setup(self, stage: str) -> None:
        """Read, render and tokenize what the stage needs, once.

        Raises:
            UserError: A source is missing, broken or empty, or no prompt is short enough.
        """
        tokenizer = load_tokenizer(self.tokenizer_source, trust_remote_code=self.trust_remote_code)
        self.pad_id = pad_token_id(tokenizer)
        if stage == "fit" and not self.train_prompts:
            self.train_prompts = self._load(self.train, self.train_split, tokenizer)
        if self.validation and not self.validation_prompts:
            loaded = self._load(self.validation, self.validation_split, tokenizer)
            self.validation_prompts = loaded[: self.validation_limit]
        elif stage != "fit" and not self.validation:
            raise UserError(f"opd {stage} needs prompts: set --data.validation")

    def _load(self, source: str, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        rows, unit = read_rows(source, split)
        prompts = tokenize_rows(rows, tokenizer, self.format, source=source, unit=unit)
        kept = [p for p in prompts if len(p.token_ids) <= self.max_prompt_tokens]
        dropped = len(prompts) - len(kept)
        if dropped:
            message = (
                f"{source}: {dropped} of {len(prompts)} prompts are longer than "
                f"data.max_prompt_tokens={self.max_prompt_tokens}"
            )
            if self.overlong == "error" or not kept:
                raise UserError(f"{message}; raise it, or set data.overlong to drop")
            log.warning("%s and were dropped", message)
        return kept

    def train_dataloader(self) -> PromptLoader:
        return self._loader(self.train_prompts, self.batch_size, self.seed)

    def val_dataloader(self) -> PromptLoader | list[Any]:
        return self._evaluation_loader()

    def test_dataloader(self) -> PromptLoader | list[Any]:
        return self._evaluation_loader()

    def predict_dataloader(self) -> PromptLoader | list[Any]:
        return self._evaluation_loader()

    def _evaluation_loader(self) -> PromptLoader | list[Any]:
        if not self.validation_prompts:
            return []
        return self._loader(self.validation_prompts, self.validation_batch_size, None)

    def _loader(self, prompts: Sequence[Prompt], batch_size: int, seed: int | None) -> PromptLoader:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return PromptLoader(
            prompts, batch_size, self.pad_id, seed=seed, rank=rank, world_size=world_size
        )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's own, else its EOS, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
