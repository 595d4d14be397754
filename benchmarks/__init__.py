"""Each figure beside its yardstick, in one run: `python -m benchmarks [NAME …] [--json FILE]`."""
