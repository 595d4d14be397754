"""What a gateway does between requests: the reaper, webhooks, queues that no device reads."""
