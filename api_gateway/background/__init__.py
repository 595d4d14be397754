"""What a gateway does without being asked: the reaper, webhooks, queues that no device reads."""
