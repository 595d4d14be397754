"""From a message to a recorded end: which job runs next, running it, recording what came of it."""
