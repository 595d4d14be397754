"""Databases for tests: one migrated template a session, and a copy of it (30 ms) for whoever needs a fresh one."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import redis

from device_operations.stack import services
from device_operations.stack.servers import Servers
from tests.support.stack import REPOSITORY

_TEMPLATE = "template_of_tests"


class Databases:
    """Fresh databases on the session's servers."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._numbers = itertools.count(1)
        self._has_template = False

    @contextlib.contextmanager
    def migrated(self) -> Iterator[str]:
        """The URL of a new database with all tables and no rows; dropped afterwards."""
        self._make_template()
        with self._database(_TEMPLATE) as url:
            yield url

    @contextlib.contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a new database without tables; dropped afterwards."""
        with self._database("template0") as url:
            yield url

    def redis_url(self) -> str:
        """A Valkey database that is empty now; 63 of them go round (publish and subscribe know no databases)."""
        number = next(self._numbers) % 63 + 1
        url = urlunsplit(urlsplit(self._servers.redis_url)._replace(path=f"/{number}"))
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url

    def execute(self, statement: str) -> None:
        """Runs one statement on the server's own database, outside of a transaction."""
        with contextlib.closing(psycopg2.connect(self._servers.database_url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)

    @contextlib.contextmanager
    def _database(self, template: str) -> Iterator[str]:
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self._url(name)
        finally:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _make_template(self) -> None:
        if self._has_template:
            return
        self.execute(f"CREATE DATABASE {_TEMPLATE}")
        environment = services.environment({"DATABASE_URL": self._url(_TEMPLATE)})
        done = subprocess.run(
            services.migrate(environment).arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, f"the migrations fail: {done.stderr[-4000:]}"
        self._has_template = True

    def _url(self, name: str) -> str:
        return urlunsplit(urlsplit(self._servers.database_url)._replace(path=f"/{name}"))
