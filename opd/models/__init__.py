"""Models: how they are loaded, run, and checked against each other."""

from opd.models.checks import (
    check_context,
    check_master_weights,
    check_models,
    check_precision,
    check_tokenizers,
    context_length,
    eos_token_ids,
    vocabulary_size,
)
from opd.models.load import Dtype, load_model, load_tokenizer, student_files
from opd.models.passes import Head, completion_logits, hidden_states

__all__ = [
    "Dtype",
    "Head",
    "check_context",
    "check_master_weights",
    "check_models",
    "check_precision",
    "check_tokenizers",
    "completion_logits",
    "context_length",
    "eos_token_ids",
    "hidden_states",
    "load_model",
    "load_tokenizer",
    "student_files",
    "vocabulary_size",
]
