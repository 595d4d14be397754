"""Training sessions and checkpoints: plans, statements, and the effects of the jobs on them."""
