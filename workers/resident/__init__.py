"""What stays on the device between jobs: models, sessions and allocations."""
