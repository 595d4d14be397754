"""Jobs: their rows, their order, how they are submitted, claimed, ended and requeued."""
