"""What the paper finds about OPD and RL (2605.11739, section 4), asked of any pair of models."""
