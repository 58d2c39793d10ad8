"""The evidence: how the base was made, every table and its runs. The lesson needs none of it."""
