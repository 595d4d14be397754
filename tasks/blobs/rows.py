"""The rows of blobs, as PostgreSQL gives them."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict


class BlobRow(TypedDict):
    """A row of `blobs`."""

    blob_id: str
    sha256: str | None
    size_bytes: int
    owner: str
    created_at: datetime
    #: Not before then, and not while anything open refers to it.
    expires_at: datetime | None
