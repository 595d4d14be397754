"""The proof on a machine with a GPU; `python -m benchmarks.gpu REPORT.json` runs it."""

#: The header of a request that waits for its job.
WAIT = {"Prefer": "wait=60"}
