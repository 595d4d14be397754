"""What Redis carries: names of queues and keys, messages, and publishing."""
