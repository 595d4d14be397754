"""Programs that show the product on real work: `python -m examples.demo`."""
