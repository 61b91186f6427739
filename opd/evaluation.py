"""Held-out prompts: how good the student is, and what it and its teachers, if any, say.

The same random numbers every time, so that two validations differ by the weights alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd import memory, stages
from opd.metrics import prediction, token_metrics
from opd.objectives import Distributions, of_sampled
from opd.prompts import PromptBatch
from opd.randomness import derive_seed
from opd.rollouts import Rollouts, Tokens, TransformersEngine, rollout_records, token_texts
from opd.rollouts.records import RIGHT, note_right
from opd.stages import Distillation
from opd.teachers import LocalTeacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Completions of held-out prompts, and what student and teachers think of every token.

    Attributes:
        micro_batches: This rank's completions; column ``right``, [B]: whether the answer is right,
            1 or 0, NaN where there is nothing to judge.
        values: Of each micro-batch by name, as predictions have them, [N].
    """

    micro_batches: list[Rollouts]
    values: list[Mapping[str, Tensor]]

    def records(
        self, tokenizer: PreTrainedTokenizerBase, rows: Container[int]
    ) -> list[dict[str, Any]]:
        """Turn the completions of some prompts into JSON records, in the order of their rows.

        They are those of :func:`opd.rollouts.rollout_records`, and have besides: ``tokens``, the
        text of each; ``correct``; and the values of each token.
        """
        records: list[dict[str, Any]] = []
        for micro, values in zip(self.micro_batches, self.values, strict=True):
            prompts = micro.prompts.prompts
            chosen = [i for i, prompt in enumerate(prompts) if prompt.row in rows]
            columns = {name: micro.spread(value)[chosen] for name, value in values.items()}
            right = micro.columns[RIGHT][chosen].tolist()
            found = rollout_records(micro.select(chosen), tokenizer, **columns)
            for record, verdict in zip(found, right, strict=True):
                texts = token_texts(tokenizer, record["completion_ids"])
                correct = None if math.isnan(verdict) else bool(verdict)
                records.append({**record, "correct": correct, "tokens": texts})
        return sorted(records, key=lambda record: record["row"])


def evaluate(module: Distillation, batch: PromptBatch) -> Evaluation:
    """Add accuracy and teacher KL on prompts to the module's evaluation metrics."""
    rollouts = stages.generate(module, batch, derive_seed(module.seed, "validation"))
    metrics, names = module.evaluation_metrics, ("reverse_kl", "teacher_logprob")
    note_right(rollouts, stages.count_rollouts(module, metrics, rollouts))
    evaluation = Evaluation([], [])
    for micro in stages.micro_batches(module, rollouts):
        reading = stages.read(module, micro)
        values = stages.compare(module, reading, None, _measure).values
        student = {"student_logprob": values.pop("student_logprob")}
        stages.count_tokens(module, metrics, micro, values)
        teacher = {name: values[f"opd/{name}"] for name in names if f"opd/{name}" in values}
        evaluation.micro_batches.append(micro)
        evaluation.values.append(student | teacher)
    return evaluation


def _measure(both: Distributions, tokens: Tokens) -> dict[str, Tensor]:
    metrics = token_metrics(both, tokens)
    return {**metrics, "student_logprob": of_sampled(both.log_p, tokens.y)}


def listen(module: Distillation, batch: PromptBatch, max_new_tokens: int) -> Evaluation:
    """Let teachers complete prompts themselves, and the student read what they say.

    They draw from the random numbers that the student draws from in :func:`evaluate`. What a
    teacher says beyond ``max_new_tokens`` is cut off, and then not judged. All ranks together.

    Returns:
        Completions of those prompts whose teacher can sample: a whole model on this device.
    """
    rollouts = _of_teachers(module, batch, max_new_tokens)
    note_right(rollouts, stages.verify(module, rollouts))
    rollouts.columns[RIGHT].masked_fill_(~rollouts.finished, math.nan)
    return _compared(module, rollouts)


def _of_teachers(module: Distillation, batch: PromptBatch, max_new_tokens: int) -> Rollouts:
    limit = min(max_new_tokens, module.sampler.max_new_tokens)
    sampler = dataclasses.replace(module.sampler, max_new_tokens=limit)
    seed, parts = derive_seed(module.seed, "validation"), []
    for name, teacher in module.teachers.items():
        of_prompts = enumerate(batch.prompts)
        mine = [i for i, p in of_prompts if module.teachers.name_of(p) == name]
        model = teacher.whole if isinstance(teacher, LocalTeacher) else None
        if model is None or not mine:
            continue
        engine, prompts = TransformersEngine(), batch.select(mine)
        engine.start(model, module.weights, module.tokenizer)
        try:
            seeds = [derive_seed(seed, prompt.row, 0) for prompt in prompts.prompts]
            said = engine(prompts.for_teacher(sampler.pad_token_id), sampler, seeds)
            parts.append(dataclasses.replace(said, prompts=prompts))
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            log.warning("no memory to sample completions of teacher %s; they are left out", name)
    if not parts:
        return Rollouts.empty(batch.select([]))
    return Rollouts.concatenate(parts, sampler.pad_token_id)


def _compared(module: Distillation, rollouts: Rollouts) -> Evaluation:
    micro_batches = stages.micro_batches(module, rollouts)
    readings = (stages.read(module, micro) for micro in micro_batches)
    compared = [stages.compare(module, reading, None, prediction) for reading in readings]
    return Evaluation(micro_batches, [one.values for one in compared])


def predict(module: Distillation, batch: PromptBatch) -> list[dict[str, Any]]:
    """Sample completions and compare them with the teacher.

    Returns:
        One JSON record per prompt: prompt, completion, and per token the log-probabilities of
        student and teacher and their reverse KL.
    """
    rollouts = stages.generate(module, batch, derive_seed(module.seed, "predict"))
    predicted = _compared(module, rollouts)
    records: list[dict[str, Any]] = []
    for micro, values in zip(predicted.micro_batches, predicted.values, strict=True):
        if micro.num_tokens:
            columns = {name: micro.spread(value) for name, value in values.items()}
            records += rollout_records(micro, module.tokenizer, **columns)
    return sorted(records, key=lambda record: record["row"])
