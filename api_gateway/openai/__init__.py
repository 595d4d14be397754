"""OpenAI's API for what pipelines do, for the clients that exist: models, embeddings and images below /v1.

The API key is the bearer token, a model's name is its `model`, and errors have OpenAI's form there (`errors`).
"""
