"""Prompts to train and to validate on, as a LightningDataModule.

All rows are rendered and tokenized once, at set-up. The order of an epoch is a function of (seed,
epoch), and the loader's state is (epoch, prompts), so a resumed run repeats nothing and skips
nothing, with any number of devices and any batch size.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import load_tokenizer
from opd.prompts.format import PromptFormat, Reader, pad_token_id, tokenize_rows, value_of
from opd.prompts.prompt import Prompt, PromptBatch
from opd.prompts.sources import Row, choose, columns, is_of_the_hub, read_rows
from opd.prompts.where import check_where, matching
from opd.randomness import derive_seed

log = logging.getLogger(__name__)

EXAMPLES = 4  # rows that are kept as they are, of each data set and teacher


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
        self.position = 0  # prompts of this epoch already handed out, to all ranks together
        self.batch_start = 0  # position before the last batch

    def __len__(self) -> int:
        return math.ceil(len(self.prompts) / self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        if self.position >= len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
        order = self._order(self.epoch)
        while self.position < len(order):
            self.batch_start = self.position
            self.position = min(self.position + self.batch_size, len(order))
            batch = PromptBatch.collate(self._chosen(order, self.batch_start), self.pad_id)
            if self.position < len(order):
                batch.upcoming = self._chosen(order, self.position)
            else:
                batch.upcoming = self._chosen(self._order(self.epoch + 1), 0)
            yield batch

    def _chosen(self, order: Sequence[int], start: int) -> list[Prompt]:
        """Return this rank's prompts of the batch that begins at a position."""
        batch = order[start : start + self.batch_size]
        return [self.prompts[i] for i in batch[self.rank :: self.world_size]]

    def put_back(self) -> None:
        """Count the last batch as not handed out: the step that was to take it has failed."""
        self.position = self.batch_start

    def _order(self, epoch: int) -> list[int]:
        if self.seed is None:
            return list(range(len(self.prompts)))
        shuffler = torch.Generator().manual_seed(derive_seed(self.seed, epoch, "order"))
        return torch.randperm(len(self.prompts), generator=shuffler).tolist()

    @functools.cached_property
    def _what(self) -> dict[str, Any]:
        """What the position is a position in."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(array("q", [len(prompt.token_ids), *prompt.token_ids]).tobytes())
        return {"seed": self.seed, "count": len(self.prompts), "digest": digest.hexdigest()}

    def state_dict(self) -> dict[str, Any]:
        """Position in the data; Lightning saves it in every checkpoint."""
        return {"epoch": self.epoch, "prompts": self.position, **self._what}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the prompt after the last one that the checkpoint's run has had.

        Raises:
            UserError: These are other prompts, or they come in another order.
        """
        if "prompts" not in state:  # up to version 0.1
            log.warning(
                "the checkpoint counts batches, as earlier versions did: it goes on with the next "
                "prompt if data.train, data.batch_size and seed_everything are what they were"
            )
            self.epoch, self.position = state["epoch"], state["position"] * self.batch_size
            return
        ours = self._what
        texts = []
        if ours["seed"] != state["seed"]:
            texts.append(f"seed_everything was {state['seed']} and is {ours['seed']}")
        if ours["count"] != state["count"]:
            texts.append(f"there were {state['count']} and are {ours['count']}")
        elif ours["digest"] != state["digest"]:
            texts.append("there are as many, with other tokens")
        if texts:
            raise UserError(
                "--ckpt_path: it stopped at another place than one in these prompts of data.train "
                f"({'; '.join(texts)}); go on with the same data, format, tokenizer and seed, or "
                "begin anew from its weights with --model.student CHECKPOINT"
            )
        self.epoch, self.position = state["epoch"], state["prompts"]


@dataclass(frozen=True)
class _Rows:
    """The rows of a source that count, and what messages and metrics call it."""

    rows: Sequence[Row]
    numbers: Sequence[int]  # of these rows in the source
    count: int  # rows of the source
    source: str
    unit: str
    data_set: str | None


class PromptDataModule(LightningDataModule):
    """Prompts to train on and prompts to validate on.

    Args:
        train: Prompts to train on: hub id, .jsonl or .parquet file, or embedded:train; or several,
            as a mapping from a name of yours to one of these. Metrics of several data sets are
            logged for each of them too, as <metric>/data/<name>.
        validation: Held-out prompts, named alike. None: no validation.
        tokenizer: Where the tokenizer comes from. Empty: that of the module which it is used with.
        batch_size: Prompts per optimizer step, all ranks together.
        validation_batch_size: Prompts per validation batch, all ranks together.
        validation_limit: Validate on the first so many prompts of each data set only. None: on all.
        max_prompt_tokens: Longest prompt in tokens.
        overlong: Longer prompts are dropped and counted, or end the run with an error.
        where: Take only the rows of each source whose fields have these values, for example
            ``{ability: code}``, ``{level: [4, 5]}`` or ``{difficulty: '>= 6'}``; fields may be
            nested, as those of the format. None: all rows.
        format: Field names and chat template options.
        name: Configuration of data sets of the hub; or a mapping from the id to it, where they
            have different ones.
        revision: Branch, tag or commit of data sets of the hub; or a mapping, likewise.
        train_split: Split of a hub data set to train on.
        validation_split: Split of a hub data set to validate on.
        trust_remote_code: Let a hub tokenizer run its own code.
        seed: Seed of the order; the command line fills in seed_everything.
    """

    def __init__(
        self,
        train: str | dict[str, str],
        validation: str | dict[str, str] | None = None,
        tokenizer: str = "",
        batch_size: int = 1024,
        validation_batch_size: int = 256,
        validation_limit: int | None = None,
        max_prompt_tokens: int = 2048,
        overlong: Literal["drop", "error"] = "drop",
        where: dict[str, Any] | None = None,
        format: PromptFormat = PromptFormat(),  # noqa: A002, B008 - the YAML key; frozen
        name: str | dict[str, str] | None = None,
        revision: str | dict[str, str] | None = None,
        train_split: str = "train",
        validation_split: str = "test",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in [
            ("batch_size", batch_size),
            ("validation_batch_size", validation_batch_size),
            ("max_prompt_tokens", max_prompt_tokens),
        ]:
            if value < 1:
                raise UserError(f"data.{key} must be at least 1, got {value}")
        if validation_limit is not None and validation_limit < 1:
            raise UserError(
                f"data.validation_limit must be at least 1, got {validation_limit}; null is all "
                "prompts, and data.validation null is no validation"
            )
        check_where(where)
        self.train = train
        self.validation = validation
        self._train = _by_name("train", train)
        self._validation = _by_name("validation", validation) if validation else {}
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.validation_limit = validation_limit
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong
        self.where = where
        self.format = format
        self.train_split = train_split
        self.validation_split = validation_split
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.train_prompts: list[Prompt] = []
        self.validation_prompts: list[Prompt] = []
        self.examples: list[tuple[Prompt, Row]] = []
        self.pad_id = 0
        hub = {s for s in [*self._train.values(), *self._validation.values()] if is_of_the_hub(s)}
        self._names = _by_id("name", name, hub)
        self._revisions = _by_id("revision", revision, hub)

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that are in use."""
        return [*self.train_prompts, *self.validation_prompts]

    @property
    def train_sets(self) -> list[str]:
        """Names of the data sets that are trained on, if there are several."""
        return _several(self._train)

    @property
    def validation_sets(self) -> list[str]:
        """Names of the data sets that are validated on, if there are several."""
        return _several(self._validation)

    def setup(self, stage: str) -> None:
        """Read, render and tokenize what the stage needs, once.

        Raises:
            UserError: A source is missing, broken or empty, or no prompt is short enough.
        """
        tokenizer = self._tokenizer()
        self.pad_id = pad_token_id(tokenizer)
        if stage != "fit" and not self._validation:
            raise UserError(f"opd {TrainerFn(stage).value} needs prompts: set --data.validation")
        train, validation = [], []
        if stage == "fit" and not self.train_prompts:
            train = self._read(self._train, self.train_split)
        if not self.validation_prompts:
            validation = self._read(self._validation, self.validation_split)
        read = [*train, *validation]
        self.format.check_fields(
            (row for part in read for row in part.rows), ", ".join(part.source for part in read)
        )
        self.train_prompts = self.train_prompts or self._tokenize(train, tokenizer, None)
        self.validation_prompts = self.validation_prompts or self._tokenize(
            validation, tokenizer, self.validation_limit
        )
        if train and len(self.train_prompts) < self.batch_size:
            log.warning(
                "data.batch_size is %d, and there are %d prompts to train on: each step takes all "
                "of them, and no more",
                *(self.batch_size, len(self.train_prompts)),
            )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        own = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if not self.tokenizer_source and own is not None:
            return cast(PreTrainedTokenizerBase, own)
        if not self.tokenizer_source:
            raise UserError(
                "PromptDataModule: name a tokenizer, PromptDataModule(tokenizer=STUDENT, ...), or "
                "set it up with an OPDModule, by trainer.fit(module, data)"
            )
        return load_tokenizer(self.tokenizer_source, trust_remote_code=self.trust_remote_code)

    def _readers(self) -> Mapping[str | None, Reader]:
        """Return the teachers' own tokenizers.

        Raises:
            UserError: Nobody knows the teachers, or their vocabulary is another.
        """
        readers = getattr(self.trainer and self.trainer.lightning_module, "teacher_readers", None)
        if readers is None:
            raise UserError(
                "data.format.teacher_rendering own needs the teachers: set up the data with an "
                "OPDModule, by trainer.fit(module, data)"
            )
        found: Mapping[str | None, Reader] = readers()
        return found

    def _read(self, sources: Mapping[str | None, str], split: str) -> list[_Rows]:
        parts = []
        for data_set, source in sources.items():
            name, revision = self._names.get(source), self._revisions.get(source)
            rows, unit = read_rows(source, split, name=name, revision=revision)
            numbers: Sequence[int] = range(len(rows))
            if self.where:
                numbers = matching(rows, self.where, source)
            kept = choose(rows, numbers) if len(numbers) < len(rows) else rows
            parts.append(_Rows(kept, numbers, len(rows), source, unit, data_set))
        return parts

    def _tokenize(
        self, parts: Sequence[_Rows], tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> list[Prompt]:
        """Tokenize the rows of all data sets, which are numbered together."""
        prompts: list[Prompt] = []
        first_row = 0
        readers = self._readers() if parts and self.format.teacher_rendering == "own" else None
        for part in parts:
            tokenized = tokenize_rows(
                self._narrow(part.rows),
                tokenizer,
                self.format,
                source=part.source,
                unit=part.unit,
                data_set=part.data_set,
                first_row=first_row,
                numbers=part.numbers,
                teachers=readers,
            )
            kept = self._short(tokenized, part.source)[:limit]
            count = Counter[str | None]()
            for prompt in kept:
                count[prompt.teacher] += 1
                if count[prompt.teacher] <= EXAMPLES:
                    place = bisect.bisect_left(part.numbers, prompt.row - first_row)
                    self.examples.append((prompt, part.rows[place]))
            prompts += kept
            first_row += part.count
        return prompts

    def _narrow(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Read only what is needed, if rows have what is needed most: else a message says all."""
        asked = (self.format.messages_field, self.format.prompt_field)
        if all(value_of(rows[0], field) is None for field in asked):
            return rows
        fmt = self.format
        others = (fmt.answer_field, fmt.teacher_field, fmt.context_field, fmt.completion_field)
        return columns(rows, [*asked, *(field for field in others if field is not None)])

    def _short(self, prompts: Sequence[Prompt], source: str) -> Sequence[Prompt]:
        kept = [p for p in prompts if len(p.token_ids) <= self.max_prompt_tokens]
        if dropped := len(prompts) - len(kept):
            message = (
                f"{source}: {dropped} of {len(prompts)} prompts are longer than "
                f"data.max_prompt_tokens={self.max_prompt_tokens}"
            )
            if self.overlong == "error" or not kept:
                drop = ", or set data.overlong to drop" if kept else ""
                raise UserError(f"{message}; raise it{drop}")
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


def _by_name(key: str, sources: str | dict[str, str]) -> dict[str | None, str]:
    """Return sources by the names of their data sets; the only one needs none.

    Raises:
        UserError: There are none, or a name does not do in the name of a metric.
    """
    if isinstance(sources, str):
        if sources.startswith(("{", "[")):
            raise UserError(
                f"data.{key}={sources}: name one source, or several as a mapping from names to text"
            )
        return {None: sources}
    if not sources:
        raise UserError(f"data.{key} is an empty mapping; name at least one data set")
    for name in map(str, sources):  # YAML reads 1 as a number
        if not re.fullmatch(r"[^\s/]+", name):
            raise UserError(f"data.{key}: {name!r} names metrics; use no spaces and no slashes")
    return {str(name): source for name, source in sources.items()}


def _several(sources: Mapping[str | None, str]) -> list[str]:
    return [name for name in sources if name is not None] if len(sources) > 1 else []


def _by_id(key: str, value: str | dict[str, str] | None, hub: set[str]) -> dict[str, str]:
    """Return what a data set of the hub is asked for with, by its id.

    Raises:
        UserError: It would be asked of no data set.
    """
    if value is None:
        return {}
    given = dict.fromkeys(hub, value) if isinstance(value, str) else value
    if unused := sorted(set(given) - hub):
        raise UserError(f"data.{key}: {unused[0]} is no data set of the hub that this run reads")
    if not given:
        raise UserError(f"data.{key}={value}: no data set of this run is from the hub")
    return given
