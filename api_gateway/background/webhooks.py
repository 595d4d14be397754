"""Webhooks: each ended job with a webhook is posted to its caller, again with backoff until it is received.

It is signed if `WEBHOOK__SECRET` is set, and given up after `ATTEMPTS`, or at once if its address is refused.

The row says what is due, so a webhook survives the gateway. An address is resolved once, checked, and connected to as
checked: a private address is refused unless `WEBHOOK__ALLOW_PRIVATE`, and so the inner network is out of reach.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import orjson
import structlog
from sqlalchemy import Engine

from device_operations.errors import OperationError, failure
from device_operations.requests.addresses import is_public, split_url
from device_operations.settings import Settings
from tasks.jobs import store
from tasks.jobs import webhooks as webhook_store
from tasks.statements import Row

log = structlog.get_logger(__name__)

#: Tries of one webhook, and the seconds before the second; doubled each time.
ATTEMPTS = 8
BACKOFF_SECONDS = 2.0

#: How long one delivery may take, and how long a delivery in progress keeps others away.
TIMEOUT_SECONDS = 10.0
LEASE_SECONDS = 30.0

#: Deliveries at once.
AT_ONCE = 16


class Webhooks:
    """Delivers what is due. `deliver_due` is called in turns by the reaper."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._threads = ThreadPoolExecutor(AT_ONCE, "webhook")

    def deliver_due(self) -> None:
        """Starts the deliveries that are due; each is leased, so that none is started twice at a time."""
        with self._engine.connect() as connection:
            due = webhook_store.due(connection, AT_ONCE, LEASE_SECONDS)
        for job in due:
            self._threads.submit(self._deliver, job)

    def stop(self) -> None:
        """Ends once the deliveries in progress have."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _deliver(self, job: Row) -> None:
        attempt = job["webhook_attempt"]
        try:
            self._post(job)
        except Exception as error:  # noqa: BLE001 - any failure of the caller's server: tried again, or given up
            # An address that may not be called stays so: calling again would only look for one that changes.
            refused = isinstance(error, OperationError) and not error.retryable
            given_up = refused or attempt >= ATTEMPTS
            retry = None if given_up else BACKOFF_SECONDS * 2 ** (attempt - 1)
            log.warning("webhook not delivered", job_id=job["id"], attempt=attempt, error=str(error), given_up=given_up)
        else:
            retry = None
        try:
            with self._engine.connect() as connection:
                webhook_store.settle(connection, job["id"], retry)
        except Exception:
            # Its lease runs out, and it is delivered once more: at least once is what a webhook promises.
            log.exception("webhook not settled", job_id=job["id"])

    def _post(self, job: Row) -> None:
        body = orjson.dumps(store.view(job), option=orjson.OPT_UTC_Z)
        url, host = pinned(job["webhook_url"], allow_private=self._settings.webhook.allow_private)
        headers = {
            "Content-Type": "application/json",
            "Host": host,
            "X-Job-Id": job["id"],
            "User-Agent": "device-operations",
        }
        if self._settings.webhook.secret:
            headers["X-Signature"] = sign(self._settings.webhook.secret, body)
        extensions = {"sni_hostname": urlsplit(job["webhook_url"]).hostname or ""}
        with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False) as client:
            answer = client.post(url, content=body, headers=headers, extensions=extensions)
        if not 200 <= answer.status_code < 300:
            raise RuntimeError(f"{answer.status_code} from {host}")


def sign(secret: str, body: bytes) -> str:
    """`sha256=` and the HMAC of the body, as a receiver computes it."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def pinned(url: str, *, allow_private: bool) -> tuple[str, str]:
    """The URL with its host replaced by the address that was checked, and the `Host` header to send with it.

    Raises `validation_failed` for a URL that cannot be called and for an address that is not public; retryable where
    the name does not resolve.
    """
    try:
        parts = split_url(url)
    except ValueError as error:
        raise failure("validation_failed", f"webhook_url: {error}") from error
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise failure(
            "validation_failed", f"webhook_url: {parts.hostname} cannot be resolved: {error}", retryable=True
        ) from error
    for address in found:
        if not allow_private and not is_public(str(address)):
            raise failure(
                "validation_failed",
                f"webhook_url: {parts.hostname} is {address}, which is not public; "
                "the service's operator may allow that with WEBHOOK__ALLOW_PRIVATE",
            )
    address = min(map(str, found))
    place = f"[{address}]" if ":" in address else address
    return parts._replace(netloc=f"{place}:{port}").geturl(), parts.netloc
