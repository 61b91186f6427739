"""Benchmarks: a YAML for each, which is its lm-eval task; what they share is in ``_shared``."""
