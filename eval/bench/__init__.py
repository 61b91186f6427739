"""``opd bench``: how fast and how large a step is, ours beside TRL's on the same work."""
