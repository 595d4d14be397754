"""Training sessions on torch: models, steps, checkpoints and export. No database, no Celery; torch is imported here."""
