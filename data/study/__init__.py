"""The evidence: how the base was made, every table and its runs, times beside PEFT's. The lesson needs none of it."""

# {seed of pretraining: file}
BASES = {seed: f"runs/bases/{seed}.pt" for seed in (1, 2, 3, 4, 5)} | {1: "data/tiny_vlm.pt"}
TWINS = {seed: f"runs/bases/{seed}-unskilled.pt" for seed in (1, 2, 3, 4, 5, 6, 7, 8)}  # bases without the skill
