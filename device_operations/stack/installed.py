"""Whether the servers are installed here: they are a distribution of their own, which a client does without."""

from __future__ import annotations

from importlib.util import find_spec

from device_operations.stack.errors import StackError

#: The server's packages, and libraries without which none of them starts.
NEEDED = ("api_gateway", "migrations", "tasks", "workers", "celery", "fastapi", "psutil", "psycopg2", "sqlalchemy")


def require_servers() -> None:
    """Raises `StackError` where this Python cannot run the servers; looks for their packages and imports none."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StackError(
            f"the servers are not installed in this Python ({', '.join(missing)} not found): pip install "
            "'device-operations-server[cpu,local]', with cuda, directml or windowsml in place of cpu for such devices"
        )
