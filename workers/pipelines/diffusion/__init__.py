"""What diffusion pipelines are made of: prompts, noise schedules, the loop, the autoencoder."""
