"""On-policy distillation of language models on PyTorch Lightning, with EffOPD."""
