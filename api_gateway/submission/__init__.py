"""From a request's body to a job's answer."""
