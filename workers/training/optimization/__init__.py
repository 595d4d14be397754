"""What changes the weights: losses, optimizers, schedules, precision and seeds."""
