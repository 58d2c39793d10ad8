"""The evidence: how the base was made, every table and its runs, times beside PEFT's. The lesson needs none of it."""

BASES = ("data/tiny_vlm.pt", "runs/bases/2.pt", "runs/bases/3.pt")  # pretrained with seeds 1, 2, 3
TWINS = tuple(f"runs/bases/{seed}-unskilled.pt" for seed in range(1, 6))  # asked nothing of what is right of a name
