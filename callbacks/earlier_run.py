"""What an earlier run has left behind is replaced by no callback that was not told to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Trainer

from opd.errors import UserError


def refuse_to_replace(trainer: Trainer, names: Iterable[str]) -> None:
    """Refuse, before a run begins, what it would write over; a run that is resumed goes on.

    Args:
        trainer: Whose ``default_root_dir``.
        names: Patterns of files in it.

    Raises:
        UserError: There is such a file.
    """
    folder = Path(trainer.default_root_dir)
    found = [path for name in names for path in sorted(folder.glob(name))]
    first = trainer.strategy.broadcast(str(found[0]) if found else None)
    if first and trainer.ckpt_path is None:
        raise UserError(
            f"{first} is there from an earlier run; move it away, or give this run a folder of its "
            "own: Trainer(default_root_dir=...)"
        )
