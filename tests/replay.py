"""A rollout engine that replays what ``opd predict`` wrote: the same completions for any model."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from opd.prompts import PromptBatch
from opd.rollouts import RolloutEngine, Rollouts, Sampler


class Replay(RolloutEngine):
    """Args: predictions: ``predictions.jsonl`` on the prompts that are to be trained on."""

    def __init__(self, predictions: str):
        records = map(json.loads, Path(predictions).read_text().splitlines())
        self.by_row = {record["row"]: record for record in records}

    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        if not len(prompts):
            return Rollouts.empty(prompts)
        parts = [self.completion(prompts.select([i])) for i in range(len(prompts))]
        return Rollouts.concatenate(parts, sampler.pad_token_id)

    def completion(self, prompt):
        record = self.by_row[prompt.prompts[0].row]
        assert record["prompt_ids"] == list(prompt.prompts[0].token_ids)
        ids = torch.tensor([record["completion_ids"]])
        finished = torch.tensor([record["finish_reason"] == "stop"])
        length = torch.tensor([ids.shape[1]])
        return Rollouts(prompt, ids, length, finished, torch.tensor([record["engine_logprob"]]))
