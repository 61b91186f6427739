"""A real language model, distilled on a CPU and without a hub: ``make demo-smollm2``."""
