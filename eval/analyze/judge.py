"""What weights are worth that nobody has trained: W_0 with changes, run and scored.

Scores are accuracies of lm-eval tasks, sampled as ``opd evaluate`` does; and, beside a teacher, the
reverse KL to it on completions of prompts, as validation measures it. The random numbers are the
same for all weights, so that differences are theirs.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.analyze.tensors import Tensors
from eval.harness import Settings, evaluate_model, load_tasks
from eval.tables import per_problem
from opd import OPDModule, PromptDataModule, stages
from opd.errors import UserError
from opd.models.passes import body, in_eval_mode
from opd.prompts import PromptBatch
from opd.randomness import derive_seed
from opd.rollouts import TransformersEngine
from opd.weights import Weights

Change = Callable[[str], Tensor | None]  # dW of a tensor, by its name; None: 0
Scores = dict[str, float]
BATCH = 64  # prompts


class Judge:
    """A model whose weights are put in place, and scored.

    Args:
        base: W_0.
        model: A model of this architecture; its weights are overwritten.
        tokenizer: Its tokenizer.
        device: Where it is run.
    """

    def __init__(
        self,
        base: Tensors,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self.base = base
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self._weights = Weights(model)
        self._scored: list[Callable[[], Scores]] = []
        self.prompts: PromptScore | None = None
        for name, _ in model.named_parameters():
            if name not in base.shapes:
                raise UserError(f"{base.source}: its files hold no {name}, which the model has")

    def by_tasks(self, names: list[str], settings: Settings) -> None:
        """Score by tasks: their mean avg@n is ``accuracy``.

        Raises:
            UserError: A task cannot be had, or has no avg@n.
        """
        tasks = load_tasks(names, settings)
        engine = TransformersEngine()
        engine.start(self.model, self._weights, self.tokenizer)

        def score() -> Scores:
            torch.nn.Module.to(self.model, self.device)
            found = evaluate_model(self.model, self.tokenizer, tasks, engine, settings)
            means = []
            for name in names:
                values = per_problem(found["samples"][name], "avg@")
                if values is None:
                    raise UserError(f"--tasks {name}: has no avg@n to judge weights by")
                means.append(statistics.fmean(values[1]))
            return {"accuracy": statistics.fmean(means)}

        self._scored.append(score)

    def by_prompts(self, score: PromptScore) -> None:
        """Score by the KL to a teacher on prompts, too; its student is the model."""
        self.prompts = score
        self._scored.append(score)

    @torch.no_grad()
    def put(self, change: Change) -> None:
        """Put W_0 + dW in place."""
        with self._weights.edit():
            for name, parameter in self.model.named_parameters():
                delta = change(name)
                value = self.base.read(name)
                parameter.copy_(value if delta is None else value.double() + delta.double())

    def __call__(self, change: Change) -> Scores:
        """Score W_0 + dW."""
        self.put(change)
        found: Scores = {}
        for score in self._scored:
            found |= score()
        return found


class PromptScore:
    """The reverse KL to a teacher on completions of prompts.

    Args:
        base: The model.
        teacher: The teacher.
        prompts: Where they come from, as ``--data.validation``.
        limit: How many.
        max_new_tokens: Longest completion.
        seed: Of sampling.
        device: Where models are run.
        trust_remote_code: Let models run their own code.

    Raises:
        UserError: A model or the prompts cannot be had, or do not fit.
    """

    def __init__(
        self,
        base: str,
        teacher: str,
        prompts: str,
        limit: int,
        max_new_tokens: int,
        seed: int,
        device: torch.device,
        trust_remote_code: bool,
    ) -> None:
        self.device = device
        self.module = OPDModule(
            base,
            teacher,
            max_new_tokens=max_new_tokens,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self.data = PromptDataModule(
            prompts,
            validation=prompts,
            tokenizer=base,
            validation_limit=limit,
            validation_batch_size=BATCH,
            trust_remote_code=trust_remote_code,
        )
        quiet: dict[str, Any] = {
            **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
            "enable_checkpointing": False,
            "accelerator": "gpu" if device.type == "cuda" else device.type,
            "devices": [device.index or 0] if device.type == "cuda" else 1,
        }
        with _quietly():
            self.trainer = Trainer(**quiet)
        self.module.configure_model()
        self.data.setup("validate")

    def __call__(self) -> Scores:
        with _quietly():
            (found,) = self.trainer.validate(self.module, self.data, verbose=False)
        return {"reverse_kl": float(found["val/reverse_kl"])}

    @torch.no_grad()
    def hidden(self) -> Callable[[], list[Tensor]]:
        """Sample completions with the weights as they are.

        Returns:
            What reads them with the weights as they are then: the last hidden states of their
            tokens, [N, H] for each batch.
        """
        module, pad = self.module, self.module.sampler.pad_token_id
        prompts, seed = self.data.validation_prompts, derive_seed(self.module.seed, "analyze")
        self._move_student()
        module.engine.start(module.student, module.weights, module.tokenizer)
        batches = [
            PromptBatch.collate(prompts[i : i + BATCH], pad).to(self.device)
            for i in range(0, len(prompts), BATCH)
        ]
        rollouts = [stages.generate(module, batch, seed) for batch in batches]
        module.engine.stop()

        def read() -> list[Tensor]:
            self._move_student()
            with torch.no_grad(), in_eval_mode(module.student):
                return [body(module.student, *batch.inputs()).cpu() for batch in rollouts]

        return read

    def _move_student(self) -> None:
        """Put it on its device, from which Lightning takes it after each validation."""
        torch.nn.Module.to(self.module.student, self.device)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Lightning from telling of devices, at each of a hundred scores."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # its own
            yield
    finally:
        logger.setLevel(level)
