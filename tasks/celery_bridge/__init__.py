"""What gateways and workers need of Celery's and kombu's insides."""
