"""Planners of each kind of job, one module a noun, and what they share. `tasks.planning.plan` is the way to them."""
