"""device-operations: jobs on GPUs for a whole team. This package is the public face and is safe to import anywhere."""
