"""The evidence: how the base was made, every table and its runs, times beside PEFT's. The lesson needs none of it."""

SEEDS = (1, 2, 3, 4, 5)
BASES = {seed: f"runs/bases/{seed}.pt" for seed in SEEDS} | {1: "data/tiny_vlm.pt"}  # {pretraining's seed: base model}
TWINS = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in SEEDS}  # asked nothing of what is right of a name
