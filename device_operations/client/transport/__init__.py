"""How one call is sent, retried and answered, for the blocking and the async client alike."""
