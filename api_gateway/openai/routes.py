"""The routes below /v1, put together."""

from __future__ import annotations

from fastapi import FastAPI

from api_gateway.openai import embeddings, images, models


def install(app: FastAPI) -> None:
    """Adds the routes."""
    for part in (models, embeddings, images):
        app.include_router(part.router)
