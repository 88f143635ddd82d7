"""A training run: the recipe, the Hugging Face Trainer with checkpoints of our kind, evaluation and generation.

Nothing is imported here, so that the command line can read recipes before it loads torch.
"""
