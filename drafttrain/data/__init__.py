"""Training data: prompts, the target's own answers, its features, and how they are stored and packed."""
