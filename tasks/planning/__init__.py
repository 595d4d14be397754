"""Planning: from a checked request to a job ready to be recorded."""
