"""What reaches into uvicorn's insides."""
