"""Pipelines: what they compute, compared with diffusers, and what callers see of them over HTTP."""
