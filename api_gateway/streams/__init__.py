"""A read's bytes on their way from a worker to the caller."""
