"""With Hugging Face models: a manual, a script that fine-tunes one, and their tests."""
