"""On-policy distillation of language models on PyTorch Lightning, with EffOPD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.module import OPDModule
    from opd.prompts import PromptDataModule

__all__ = ["OPDModule", "PromptDataModule"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and torch with it, only then."""
    if name == "OPDModule":
        from opd.module import OPDModule

        return OPDModule
    if name == "PromptDataModule":
        from opd.prompts import PromptDataModule

        return PromptDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
