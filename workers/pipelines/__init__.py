"""Models made of graphs and what stands between them: one file a pipeline, and the parts that they share."""
