"""Models, graphs and inference sessions: plans, statements, and the effects of the jobs on them."""
