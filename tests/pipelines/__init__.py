"""Pipelines: what they compute beside diffusers, and what callers see of them over HTTP."""
