"""Device memory: allocations, budgets, and the plans and effects of the jobs on them."""
