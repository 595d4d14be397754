"""How the tables came to be: Alembic revisions, run by `python -m migrations`."""
