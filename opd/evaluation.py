"""Held-out prompts: how good the student is, and what it says.

The same random numbers every time, so that two validations differ by the weights alone.
"""

from __future__ import annotations

from typing import Any

from opd import stages
from opd.metrics import prediction, token_metrics
from opd.prompts import PromptBatch
from opd.randomness import derive_seed
from opd.rollouts import rollout_records
from opd.stages import Distillation


def evaluate(module: Distillation, batch: PromptBatch) -> None:
    """Add accuracy and teacher KL on prompts to the module's evaluation metrics."""
    rollouts = stages.generate(module, batch, derive_seed(module.seed, "validation"))
    stages.count_rollouts(module, module.evaluation_metrics, rollouts)
    for micro in stages.micro_batches(module, rollouts):
        reading = stages.read(module, micro)
        values = stages.compare(module, reading, None, token_metrics).values
        stages.count_tokens(module, module.evaluation_metrics, micro, values)


def predict(module: Distillation, batch: PromptBatch) -> list[dict[str, Any]]:
    """Sample completions and compare them with the teacher.

    Returns:
        One JSON record per prompt: prompt, completion, and per token the log-probabilities of
        student and teacher and their reverse KL.
    """
    rollouts = stages.generate(module, batch, derive_seed(module.seed, "predict"))
    records: list[dict[str, Any]] = []
    for micro in stages.micro_batches(module, rollouts):
        reading = stages.read(module, micro)
        values = stages.compare(module, reading, None, prediction).values
        if micro.num_tokens:
            columns = {name: micro.spread(value) for name, value in values.items()}
            records += rollout_records(micro, module.tokenizer, **columns)
    return sorted(records, key=lambda record: record["row"])
