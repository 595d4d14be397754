"""How a job arrives: the HTTP gateway."""
