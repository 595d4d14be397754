"""Text embedding's parts: what a model's folder says, texts as tokens, batches of them, and vectors out of tokens."""
