"""How a job runs: the process pinned to one device."""
