"""A frozen teacher on this rank's device.

What is kept of a teacher's pass are hidden states of completion positions, [N, H]:
log-probabilities
over the vocabulary, [N, V], are made from them when they are needed and are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import cpu_offload
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import PreTrainedModel

from opd.models import hidden_states, project
from opd.rollouts import Rollouts
from opd.sharding import is_sharded, transformer_layers


class LocalTeacher:
    """Scores completions with a model in this process; deliberately no ``nn.Module``.

    Whoever holds it holds no parameters: it is in no checkpoint and no optimizer.

    Args:
        model: The teacher, whole or sharded; it is frozen and put into eval mode.
        offload: Keep the weights of a whole model's layers in host memory.
    """

    def __init__(self, model: PreTrainedModel, *, offload: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.offload = offload
        self._placed = is_sharded(model)  # shards are where they belong

    def to(self, device: torch.device) -> None:
        """Move the weights to the device that they run on, once."""
        if self._placed:
            return
        self._placed = True
        if self.offload:
            for layer in transformer_layers(self.model):
                cpu_offload(layer, execution_device=device)
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if not tensor.is_meta:
                    module, _, attribute = name.rpartition(".")
                    set_module_tensor_to_device(self.model.get_submodule(module), attribute, device)
        else:
            self.model.to(device)

    @torch.no_grad()
    def score(self, rollouts: Rollouts) -> TeacherScored:
        """Run the teacher over B completions of N tokens together."""
        return TeacherScored(rollouts, self, hidden_states(self.model, *rollouts.inputs()))


@dataclass
class TeacherScored:
    """Completions with the teacher's opinion of every token.

    Attributes:
        rollouts: B completions of N tokens together.
        teacher: Who scored them.
        hidden: The teacher's hidden states, [N, H].
    """

    rollouts: Rollouts
    teacher: LocalTeacher
    hidden: Tensor

    @torch.no_grad()
    def teacher_logprobs(self, vocabulary: int, temperature: float) -> Tensor:
        """Log-probabilities over the first ``vocabulary`` tokens, float32, [N, vocabulary]."""
        logits = project(self.teacher.model, self.hidden)[:, :vocabulary]
        return torch.log_softmax(logits / temperature, dim=-1)

    def placeholder(self) -> TeacherScored:
        """Return one completion without tokens, scored by the same teacher."""
        name, device = self.rollouts.prompts.prompts[0].teacher, self.hidden.device
        return TeacherScored(Rollouts.placeholder(name, device), self.teacher, self.hidden[:0])

    def select(self, rows: Sequence[int]) -> TeacherScored:
        """Take some completions with their part of the hidden states."""
        keep = torch.zeros_like(self.rollouts.finished)
        keep[list(rows)] = True
        tokens_kept = keep[:, None].expand_as(self.rollouts.mask)[self.rollouts.mask]
        return TeacherScored(self.rollouts.select(rows), self.teacher, self.hidden[tokens_kept])
