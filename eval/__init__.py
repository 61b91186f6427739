"""Programs that turn checkpoints and runs into numbers and pictures."""
