"""The memory table: small numbers worked out by hand, and two moments of a real run.

Rollout and search are measured in tests/test_distributed.py.
"""

import json

import pytest
from conftest import FSDP2, ROOT, launch, slow_but

from eval.memory import Memory, memory, table


@pytest.mark.parametrize(
    ("devices", "strategy", "options", "expected"),
    [
        # 10 parameters x (4 + 8 + 4) + teacher 100 x 2 = 360 at rest
        (1, "ddp", {}, Memory(360 + 20, 360 + 40, 360 + 80, 360 + 40 + 20)),
        (5, "ddp", {"gradient_sync": "every"}, Memory(380, 400, 440, 420)),
        # 2 parameters x 16 + 20 x 2 = 72 at rest; the gathered copy and "last" are of all 10
        (5, "fsdp2", {}, Memory(72 + 20, 72 + 40, 72 + 16, 72 + 8 + 20)),
        (5, "fsdp2", {"gradient_sync": "every"}, Memory(92, 72 + 8, 88, 100)),
        # without EffOPD there is no anchor, and no copy of W in a search
        (5, "fsdp2", {"effopd": False}, Memory(64 + 20, 64 + 40, 64 + 16, 64 + 20)),
        (5, "fsdp2", {"teacher_offload": True}, Memory(32 + 20, 32 + 40, 32 + 16, 32 + 8 + 20)),
    ],
)
def test_memory_by_hand(devices, strategy, options, expected):
    found = memory(10, 100, devices, strategy, **options)
    assert found == expected
    moments = (expected.rollout, expected.backward, expected.step, expected.search)
    assert found.peak == max(moments)


def test_the_readme_has_this_table():
    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in table().splitlines())


@pytest.mark.parametrize("gradient_sync", slow_but("last", "every"))
def test_backward_and_step_of_a_real_run(tmp_path, gradient_sync):
    """Two processes that share out the built-in pair; tokens and prompts hardly count beside it."""
    options = [*FSDP2, "--trainer.precision", "bf16-mixed", "--model.teacher_dtype", "bfloat16"]
    options += ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "9"]
    options += ["--trainer.callbacks+=memory_probe.HeldMemory", "--trainer.limit_val_batches", "0"]
    options += ["--model.micro_batch_tokens", "64", "--model.gradient_sync", gradient_sync]
    run = launch(2, tmp_path / "run", *options, steps=2)
    for rank in (0, 1):
        held = json.loads((run / f"held_{rank}.json").read_text())
        size = held["parameters"]
        expected = memory(size, size, 2, "fsdp2", gradient_sync=gradient_sync)
        assert held["backward"] == pytest.approx(expected.backward, rel=0.04)
        assert held["step"] == pytest.approx(expected.step, rel=0.04)
