"""Callbacks and objectives that look into runs of other processes, or make them fail."""

import copy
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from conftest import memory_profile, peak_bytes
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import Benchmarks, EffOPD
from opd import extrapolation
from opd.errors import UserError
from opd.extrapolation import Score
from opd.objectives import Objective, reverse_kl
from opd.prompts import PromptBatch
from opd.rollouts import Rollouts, Sampler, Tokens, TransformersEngine
from opd.scores import CandidateScore
from opd.sharding import gathered, local_shards


class Collectives(TorchDispatchMode):
    """Counts communication between ranks: operations with ``kind`` in their names."""

    def __init__(self, kind=""):
        super().__init__()
        self.kind = kind
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        communicates = function.namespace in ("c10d", "_c10d_functional")
        self.count += communicates and self.kind in str(function)
        return function(*args, **(kwargs or {}))


def held_bytes(tensors):
    return sum(shard.nbytes for shard in local_shards(list(tensors)))


class CountingEngine(TransformersEngine):
    """Appends the number of collectives of each rollout, and of its prompts, to PATH_RANK.txt."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        with Collectives() as mode:
            rollouts = super().__call__(prompts, sampler, seeds)
        with Path(f"{self.path}_{torch.distributed.get_rank()}.txt").open("a") as file:
            file.write(f"{len(prompts)} {mode.count}\n")
        return rollouts


class StaleEngine(TransformersEngine):
    """Never gets new weights, as an engine of its own that nothing is pushed to."""

    def start(self, student, weights, tokenizer):
        if self._student is None:
            super().start(copy.deepcopy(student), weights, tokenizer)


class OtherEngine(TransformersEngine):
    """Has a model of its own, as far from the student as ``noise``."""

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise

    def start(self, student, weights, tokenizer):
        torch.manual_seed(0)
        self._student = copy.deepcopy(student)
        with torch.no_grad():
            for parameter in self._student.parameters():
                parameter += self.noise * torch.randn_like(parameter)


class Unjudged(Benchmarks):
    """Cannot judge what the student says; the first rank does that."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        import eval.harness  # loads lm-eval

        eval.harness.scorer_of = self._scorer_of

    def _scorer_of(self, *_):
        return self._refuse

    def _refuse(self, completion, doc):
        raise UserError("nobody can judge this")


class Constant(CandidateScore):
    """Finds all candidates equally good, at no cost."""

    def __call__(self, module):
        return Score(torch.ones(1), torch.ones(1))


class MeasuredEffOPD(EffOPD):
    """Accepts five candidates, and writes what the search cost to search_RANK.json."""

    def __init__(self):
        super().__init__(score=Constant(), schedule="every 1")

    def accelerate(self, trainer, pl_module, output):
        set_candidate, spent = extrapolation.set_candidate, {"candidates": 0, "collectives": 0}

        def counted(*args):
            with Collectives() as mode:
                set_candidate(*args)
            spent["candidates"] += 1
            spent["collectives"] += mode.count

        extrapolation.set_candidate = counted
        with memory_profile() as profile:
            result = super().accelerate(trainer, pl_module, output)
        extrapolation.set_candidate = set_candidate
        with Collectives() as mode:  # the counter counts
            trainer.strategy.reduce(torch.ones(1), reduce_op="sum")
        with memory_profile() as gathering, gathered(pl_module.student):
            pass
        (optimizer,) = trainer.optimizers
        moments = [t for state in optimizer.state.values() for t in state.values()]
        spent |= {
            "peak_bytes": peak_bytes(profile),
            "gathered_bytes": peak_bytes(gathering),
            "collectives_of_one_reduce": mode.count,
            "parameters": sum(p.numel() for p in pl_module.student.parameters()),
            "weights_bytes": held_bytes(pl_module.student.parameters()),
            "anchor_bytes": held_bytes(self.anchor.buffers()),
            "optimizer_bytes": held_bytes(moments),
            "teacher_bytes": held_bytes(pl_module.teachers["default"].model.parameters()),
        }
        path = Path(trainer.default_root_dir) / f"search_{trainer.global_rank}.json"
        path.write_text(json.dumps(spent))
        return result


class SigtermInFirstValidation(Callback):
    """Sends SIGTERM to rank 1 while the untrained student is validated."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.sanity_checking and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class GradientSyncs(Callback):
    """Writes how many reduce-scatters the last step has made to syncs.txt."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode = Collectives("reduce_scatter")
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        path = Path(trainer.default_root_dir) / "syncs.txt"
        path.write_text(f"{len(outputs['step'].micro_batches)} {self.mode.count}")


class WeightsAtStart(Callback):
    """Writes the weights that training starts with to start.pt."""

    def on_train_start(self, trainer, pl_module):
        state = {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for name, tensor in trainer.strategy.lightning_module_state_dict().items()
        }
        if trainer.is_global_zero:
            torch.save(state, Path(trainer.default_root_dir) / "start.pt")


class NaNOnRank1(Objective):
    """A loss that is not a number, on rank 1, in the second micro-batch."""

    calls = 0

    def __call__(
        self, log_p: torch.Tensor, opinions: Mapping[str, torch.Tensor], tokens: Tokens
    ) -> torch.Tensor:
        NaNOnRank1.calls += log_p.dtype == torch.float32  # not those of opd.objectives.probe
        loss = reverse_kl(log_p, opinions["teacher"])
        if torch.distributed.get_rank() == 1 and NaNOnRank1.calls == 2:
            loss[0] = torch.nan
        return loss


class Scripted(CandidateScore):
    """Gives W and its candidates these scores, in the order they are asked for; then the last."""

    def __init__(self, scores: list[float]):
        self.scores = scores

    def prepare(self, module, output, seed: int) -> None:
        self.calls = 0

    def __call__(self, module) -> Score:
        self.calls += 1
        return Score(
            torch.tensor([self.scores[min(self.calls, len(self.scores)) - 1]]), torch.ones(1)
        )
