"""Times, tokens and memory of the steps of a process; without anything of ours or TRL's."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")
LOOK = 0.005  # seconds between looks at a process's memory


class Stopwatch:
    """Takes the time of each step, and the memory over what was there before the first."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.before = self.peak = 0

    def start(self) -> None:
        """Begin: models are loaded."""
        self.before = self.peak = _memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        self.lap()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _memory())
            time.sleep(LOOK)

    def lap(self) -> None:
        """A step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def report(self, path: Path, warmup: int, **more: object) -> None:
        """Write what was measured: seconds per step, memory over the models in bytes."""
        count = len(self.wall) - 1 - warmup
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        found = {
            "wall_seconds": (self.wall[-1] - self.wall[warmup]) / count,
            "cpu_seconds": (self.cpu[-1] - self.cpu[warmup]) / count,
            "memory_bytes": self.peak - self.before,
            **more,
        }
        path.write_text(json.dumps(found))


def _memory() -> int:
    """Return what is held on the GPU; without one, of this process what no file holds too.

    Pages of libraries come and go as the system likes, and say nothing of a step.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE


def fixed_batch(
    folder: Path, tokenizer: object, batch: int, new_tokens: int, vocabulary: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and completions, the same on both sides: as token ids, of unequal lengths."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = []
    for row in rows[:batch]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompts.append(tokenizer(prompt)["input_ids"])  # type: ignore[operator]
        else:
            text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                prompt, tokenize=False, add_generation_prompt=True
            )
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, new_tokens * (i + 1) // batch) for i in range(batch)]
    completions = [
        torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]
    return prompts, completions
