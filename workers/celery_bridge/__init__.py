"""What a worker needs of Celery's and kombu's insides: its pool, events and revocations."""
