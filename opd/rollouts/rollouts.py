"""What a rollout engine is asked for and what it returns.

A completion may be a conversation, in which tokens were inserted that nobody has sampled: they are
read, and nothing else (``opd/rollouts/conversations.py``).

Shapes: B completions, P prompt tokens (padded left), C completion tokens (padded right), N sampled
tokens of all completions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd.errors import UserError
from opd.prompts import Prompt, PromptBatch

INSERTED = "inserted"  # column: 1 at tokens of a conversation that nobody has sampled
SAMPLED = "sampled"  # column: whether an engine has sampled a completion, [B]; none: it has all


@dataclass(frozen=True)
class Sampler:
    """A fully specified sampler: nothing comes from a model's generation config.

    Attributes:
        max_new_tokens: Longest completion, its EOS included.
        temperature: Divides the logits; 0 is greedy.
        top_p: Smallest set of tokens with this mass; 1 keeps all.
        top_k: So many likeliest tokens; 0 keeps all.
        eos_token_ids: Tokens that end a completion; they belong to it.
        pad_token_id: Fills up after the end. May equal an EOS: lengths tell them apart.
        vocabulary: Tokens from this id on are never sampled, and have no probability; None: there
            are none. Teachers do not know them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for name, value, valid, wanted in [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1, which keeps all"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0, which keeps all"),
        ]:
            if not valid:
                raise UserError(f"model.{name}={value} must be {wanted}")


@dataclass
class Rollouts:
    """B completions with their prompts.

    Attributes:
        prompts: The B prompts, padded left.
        completion_ids: Token ids, padded right, [B, C].
        lengths: Tokens of each completion, its EOS and inserted ones included, [B].
        finished: Whether an EOS ended it (rather than max_new_tokens), [B].
        engine_logprobs: Log-probability of each token under the distribution it was drawn from,
            float32, 0 at padding and where it was inserted, [B, C].
        columns: What else is known of each completion, by name: [B], or [B, C] and 0 at padding.
            ``advantage``, ``weight`` and ``drift`` reach the objective as :class:`Tokens`;
            ``inserted`` is 1 at tokens that nobody has sampled.
    """

    prompts: PromptBatch
    completion_ids: Tensor
    lengths: Tensor
    finished: Tensor
    engine_logprobs: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def present(self) -> Tensor:
        """True at completion tokens, sampled or inserted, [B, C]."""
        columns = torch.arange(self.completion_ids.shape[1], device=self.lengths.device)
        return columns < self.lengths[:, None]

    @property
    def mask(self) -> Tensor:
        """True at sampled tokens, [B, C]."""
        inserted = self.columns.get(INSERTED)
        return self.present if inserted is None else self.present & (inserted == 0)

    @property
    def counts(self) -> Tensor:
        """Sampled tokens of each completion, [B]."""
        return self.mask.sum(dim=1) if INSERTED in self.columns else self.lengths

    @property
    def last_turns(self) -> Tensor:
        """Where the last turn of each conversation begins; 0 of an ordinary completion, [B]."""
        if INSERTED not in self.columns or not self.columns[INSERTED].shape[1]:
            return torch.zeros_like(self.lengths)
        places = torch.arange(1, self.completion_ids.shape[1] + 1, device=self.lengths.device)
        return (places * (self.columns[INSERTED] != 0)).amax(dim=1)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> Tensor:
        """All sampled tokens, row after row, [N]."""
        return self.completion_ids[self.mask]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a forward pass needs.

        Returns:
            Token ids [B, P + C], mask of tokens [B, P + C], and the positions whose hidden state
            predicts a sampled token [B, P + C]: one to the left of each, N in all.
        """
        ids = torch.cat([self.prompts.ids, self.completion_ids], dim=1)
        mask = torch.cat([self.prompts.mask, self.present], dim=1)
        predicts = torch.zeros_like(mask)
        predicts[:, self.prompts.ids.shape[1] - 1 : -1] = self.mask
        return ids, mask, predicts

    def for_teacher(self) -> Rollouts:
        """Return the same completions after the prompts as their teachers read them."""
        return replace(self, prompts=self.prompts.for_teacher(pad_id=0))

    def spread(self, values: Tensor) -> Tensor:
        """Spread values per token, [N], over positions, [B, C], with 0 elsewhere."""
        return torch.zeros_like(self.engine_logprobs).masked_scatter(
            self.mask, values.to(self.engine_logprobs.dtype)
        )

    def keep_sampled(self, values: Tensor) -> Tensor:
        """Keep, of values per token, those of tokens that an engine has sampled, [N] -> [S]."""
        sampled = self.are_sampled()
        return values if sampled is None else values[sampled]

    def are_sampled(self) -> Tensor | None:
        """Whether an engine has sampled each token, [N]; None: all of them."""
        column = self.columns.get(SAMPLED)
        return None if column is None else column[:, None].expand_as(self.mask)[self.mask]

    def select(self, rows: Sequence[int]) -> Rollouts:
        """Take some completions, in the order given, without the padding they no longer need."""
        index = torch.as_tensor(rows, device=self.lengths.device, dtype=torch.long)
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(rows) else 0
        return Rollouts(
            self.prompts.select(rows),
            self.completion_ids[index, :width],
            lengths,
            self.finished[index],
            self.engine_logprobs[index, :width],
            {
                name: column[index] if column.ndim == 1 else column[index, :width]
                for name, column in self.columns.items()
            },
        )

    @classmethod
    def empty(cls, prompts: PromptBatch) -> Rollouts:
        """Return no completions, for a batch without prompts."""
        device = prompts.ids.device
        ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        lengths = torch.zeros(0, dtype=torch.long, device=device)
        return cls(prompts, ids, lengths, lengths.bool(), ids.float())

    @classmethod
    def of_lists(
        cls,
        prompts: PromptBatch,
        token_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        sampler: Sampler,
        inserted: Sequence[Sequence[bool]] | None = None,
    ) -> Rollouts:
        """Make rollouts of what was sampled.

        Args:
            prompts: B prompts.
            token_ids: The tokens of each completion, its EOS included; at least one.
            logprobs: Their log-probabilities under what they were drawn from.
            sampler: What they were sampled with.
            inserted: Whether nobody has sampled a token; None: all were sampled.
        """
        device = prompts.ids.device
        ids = [torch.tensor(row, dtype=torch.long) for row in token_ids]
        return cls(
            prompts,
            pad_sequence(ids, batch_first=True, padding_value=sampler.pad_token_id).to(device),
            torch.tensor([len(row) for row in token_ids], device=device),
            torch.tensor([row[-1] in sampler.eos_token_ids for row in token_ids], device=device),
            _padded(logprobs).to(device),
            {} if inserted is None else {INSERTED: _padded(inserted).to(device)},
        )

    def placeholder(self, teacher: str | None) -> Rollouts:
        """Return one completion without tokens, for passes that a rank makes for others' sake.

        Args:
            teacher: Who reads it.
        """
        device = self.lengths.device
        prompt = Prompt(row=-1, token_ids=(0,), teacher=teacher)
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        length = torch.zeros(1, dtype=torch.long, device=device)
        batch = PromptBatch.collate([prompt], pad_id=0).to(device)
        columns = {
            name: column.new_zeros((1,) * column.ndim) for name, column in self.columns.items()
        }
        return Rollouts(batch, ids, length, length.bool(), ids.float(), columns)

    @staticmethod
    def concatenate(parts: Sequence[Rollouts], pad_id: int) -> Rollouts:
        """Join rollouts of different widths."""
        width = max(part.completion_ids.shape[1] for part in parts)

        def widen(tensor: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

        def join(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([t if t.ndim == 1 else widen(t, 0.0) for t in tensors])

        device = parts[0].completion_ids.device
        prompts = [prompt for part in parts for prompt in part.prompts.prompts]
        return Rollouts(
            PromptBatch.collate(prompts, pad_id).to(device),
            torch.cat([widen(part.completion_ids, pad_id) for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.finished for part in parts]),
            join([part.engine_logprobs for part in parts]),
            {name: join([part.columns[name] for part in parts]) for name in parts[0].columns},
        )


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    values = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return pad_sequence(values, batch_first=True)


@dataclass(frozen=True)
class Tokens:
    r"""What is known of sampled tokens besides distributions; n of them.

    Attributes:
        y: The tokens, [n].
        logmu_y: Their log-probabilities under the rollout engine, [n].
        advantage: Of their completions' rewards, [n]; None if there are no rewards.
        weight: Factor of their losses, [n]; None: 1. What the sum of losses is divided by stays the
            number of tokens.
        position: How many tokens of its completion stand before each, [n]; None if nobody knows.
        drift: Share of its completion's disagreement with the teacher, as the sum of
            \|log q(y) - log mu(y)\|, that stands before each, [n]; None if nobody has asked.
    """

    y: Tensor
    logmu_y: Tensor
    advantage: Tensor | None = None
    weight: Tensor | None = None
    position: Tensor | None = None
    drift: Tensor | None = None

    @classmethod
    def of(cls, rollouts: Rollouts) -> Tokens:
        """Collect the N sampled tokens; a number per completion is one for each of its tokens."""
        mask = rollouts.mask

        def per_token(name: str) -> Tensor | None:
            column = rollouts.columns.get(name)
            if column is not None and column.ndim == 1:
                column = column[:, None].expand_as(mask)
            return None if column is None else column[mask]

        return cls(
            rollouts.tokens,
            rollouts.engine_logprobs[mask],
            per_token("advantage"),
            per_token("weight"),
            torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask],
            per_token("drift"),
        )

    def __getitem__(self, rows: slice) -> Tokens:
        """Take the tokens of a tile."""
        return Tokens(
            self.y[rows],
            self.logmu_y[rows],
            None if self.advantage is None else self.advantage[rows],
            None if self.weight is None else self.weight[rows],
            None if self.position is None else self.position[rows],
            None if self.drift is None else self.drift[rows],
        )
