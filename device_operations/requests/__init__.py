"""The requests that callers send, one module for each noun; `kinds` names the one of each job kind."""
