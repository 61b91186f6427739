"""Models: how they are loaded, run, and checked against each other."""

from opd.models.adapters import Dtype, LoRA, check_adapter, whole_weights, without_adapter
from opd.models.checks import (
    check_context,
    check_master_weights,
    check_models,
    check_precision,
    check_tokenizers,
    context_length,
    vocabulary_size,
)
from opd.models.generation import (
    check_eos_token_ids,
    ends_of_all,
    eos_token_ids,
    generating_with,
    plain_sampling,
)
from opd.models.load import load_head, load_model, load_tokenizer, model_folder, student_files
from opd.models.passes import (
    Buffer,
    Head,
    completion_logits,
    hidden_states,
    in_eval_mode,
    product_dtype,
)

__all__ = [
    "Buffer",
    "Dtype",
    "Head",
    "LoRA",
    "check_adapter",
    "check_context",
    "check_eos_token_ids",
    "check_master_weights",
    "check_models",
    "check_precision",
    "check_tokenizers",
    "completion_logits",
    "context_length",
    "ends_of_all",
    "eos_token_ids",
    "generating_with",
    "hidden_states",
    "in_eval_mode",
    "load_head",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "plain_sampling",
    "product_dtype",
    "student_files",
    "vocabulary_size",
    "whole_weights",
    "without_adapter",
]
