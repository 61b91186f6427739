"""A frozen teacher on this rank's device.

What is kept of its reading are hidden states of completion positions, [N, H]; log-probabilities
over the vocabulary are made from them a tile at a time, when they are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import cpu_offload
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd.models import (
    Buffer,
    Head,
    context_length,
    hidden_states,
    in_eval_mode,
    product_dtype,
    without_adapter,
)
from opd.rollouts import Rollouts
from opd.sharding import head_gathered, is_sharded, transformer_layers
from opd.teachers.teacher import Gives, Opened


class LocalTeacher:
    """A teacher that is a model in this process.

    Args:
        model: The model, whole or sharded; it is frozen and put into eval mode.
        vocabulary: Tokens that its opinions are about; what lies beyond is padding.
        temperature: Divides its logits, as it does the student's.
        offload: Keep the weights of a whole model's layers in host memory.
    """

    gives: Gives = "full"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: int,
        temperature: float = 1.0,
        offload: bool = False,
    ) -> None:
        self.model = self._frozen(model)
        self.vocabulary = vocabulary
        self.temperature = temperature
        self.offload = offload
        self._on_device = is_sharded(model)  # shards are where they belong

    def _frozen(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        model.eval()
        return model

    def speaking(self) -> AbstractContextManager[None]:
        """Let the model be the teacher within."""
        return nullcontext()

    @property
    def whole(self) -> PreTrainedModel | None:
        """The model, if it can sample here; None if each token would move weights about."""
        return None if self.offload or is_sharded(self.model) else self.model

    @property
    def context(self) -> int | None:
        """Positions that the model was made for."""
        return context_length(self.model)

    def to(self, device: torch.device) -> None:
        """Move the weights to the device that they run on, once."""
        if self._on_device:
            return
        self._on_device = True
        if self.offload:
            for layer in transformer_layers(self.model):
                cpu_offload(layer, execution_device=device)
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if not tensor.is_meta:
                    module, _, attribute = name.rpartition(".")
                    set_module_tensor_to_device(self.model.get_submodule(module), attribute, device)
            self.model.tie_weights()  # a tied head has stayed behind
        else:
            nn.Module.to(self.model, device)

    @torch.no_grad()
    def read(self, micro: Rollouts) -> LocalOpinion:
        """Run the model's body over B completions of N tokens together."""
        with self.speaking():
            return LocalOpinion(self, hidden_states(self.model, *micro.inputs()), micro.counts)


class BaseTeacher(LocalTeacher):
    """The base model of a student that trains an adapter: the student itself, its adapter off."""

    def _frozen(self, model: PreTrainedModel) -> PreTrainedModel:
        return model  # it is, but for the adapter

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Let the model be its base within."""
        with in_eval_mode(self.model), without_adapter(self.model):
            yield

    @property
    def whole(self) -> None:
        """Nothing: it is the student that samples."""
        return None

    def to(self, device: torch.device) -> None:
        """Do nothing: it is where the student is."""


@dataclass(frozen=True)
class LocalOpinion:
    """What a local teacher thinks of B completions of N tokens together.

    Attributes:
        teacher: Whose opinion it is.
        hidden: The teacher's last hidden states, [N, H].
        counts: Of each completion, [B].
    """

    teacher: LocalTeacher
    hidden: Tensor
    counts: Tensor

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        """Hold the teacher's head; rows of the N tokens become logits, [n, V]."""
        teacher, buffer = self.teacher, Buffer()
        with head_gathered(teacher.model):
            with teacher.speaking():
                head = Head.of(teacher.model, teacher.vocabulary, product_dtype(teacher.model))

            def logits(rows: slice) -> Tensor:
                hidden = self.hidden[rows]
                with torch.autocast(hidden.device.type, enabled=False):
                    product = head.product(hidden, buffer.of(hidden, len(head.weight)))
                    logits = head.finish(product)
                    return logits if teacher.temperature == 1 else logits / teacher.temperature

            yield logits

    def select(self, completions: Sequence[int]) -> LocalOpinion:
        """Keep the opinion of some completions, in the order given."""
        parts = self.hidden.split(self.counts.tolist())
        chosen = [parts[i] for i in completions]
        index = torch.as_tensor(completions, dtype=torch.long, device=self.counts.device)
        hidden = torch.cat(chosen) if chosen else self.hidden[:0]
        return LocalOpinion(self.teacher, hidden, self.counts[index])
