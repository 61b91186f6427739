"""A census of the tensors that a rank holds at two moments of a step."""

import gc
import json
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback


def held_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    tensors += [t._local_tensor for t in tensors if hasattr(t, "_local_tensor")]
    plain = [t for t in tensors if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in plain)}.values())


class HeldMemory(Callback):
    """Writes what is held in step 2, where the optimizer has its state, to held_RANK.json."""

    def __init__(self):
        self.held = {}

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            self.held.setdefault("backward", held_bytes())  # of the first micro-batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            self.held["step"] = held_bytes()
            self.held["parameters"] = sum(p.numel() for p in pl_module.student.parameters())

    def on_train_end(self, trainer, pl_module):
        path = Path(trainer.default_root_dir) / f"held_{trainer.global_rank}.json"
        path.write_text(json.dumps(self.held))
