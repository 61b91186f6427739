"""Prompts to train and to validate on, as a LightningDataModule.

All rows are rendered and tokenized once, at set-up. The order of an epoch is a function of (seed,
epoch), and the loader's state is (epoch, batches), so a resumed run repeats nothing and skips
nothing, with any number of devices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import load_tokenizer
from opd.prompts.format import PromptFormat, pad_token_id, tokenize_rows
from opd.prompts.prompt import Prompt, PromptBatch
from opd.prompts.sources import read_rows
from opd.randomness import derive_seed

log = logging.getLogger(__name__)


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
        format: PromptFormat = PromptFormat(),  # noqa: A002, B008 - the YAML key; frozen
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
