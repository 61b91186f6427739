"""``opd analyze``: what checkpoints have learnt, read off their weights (2605.11739, section 4)."""
