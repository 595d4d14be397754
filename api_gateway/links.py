"""Links to a blob that need no API key: good for one blob, for a while, and as long as the keys stay what they are.

A link carries when it ends and an HMAC over that and the blob's id. Its secret is made of all API keys, which every
gateway process has, so that changing any of them ends all links.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from urllib.parse import quote

from device_operations.settings import Settings
from device_operations.wire.bounds import whole_number

#: Seconds for which a link is good, as OpenAI's are.
LINK_SECONDS = 3600


def path_of(settings: Settings, blob_id: str) -> str:
    """The address of a blob, below the service's own, that may be read without a key for `LINK_SECONDS`."""
    path = f"/api/blobs/{quote(blob_id, safe='')}"
    if not settings.api_keys:
        return path
    expires = int(time.time()) + LINK_SECONDS
    return f"{path}?expires={expires}&signature={_signature(settings, blob_id, expires)}"


def is_good(settings: Settings, blob_id: str, expires: str, signature: str) -> bool:
    """Whether the link was made here, with the keys of now, and has not ended."""
    ends = whole_number(expires)
    if ends is None or not settings.api_keys or ends < time.time():
        return False
    return hmac.compare_digest(_signature(settings, blob_id, ends).encode(), signature.encode())


def _signature(settings: Settings, blob_id: str, expires: int) -> str:
    secret = hashlib.sha256("\n".join(sorted(key.key for key in settings.api_keys)).encode()).digest()
    return hmac.new(secret, f"blob\n{blob_id}\n{expires}".encode(), hashlib.sha256).hexdigest()
