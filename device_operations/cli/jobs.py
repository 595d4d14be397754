"""The commands on jobs: `jobs`, `submit` and `retry`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_object, print_table
from device_operations.cli.progress import follow, require_success
from device_operations.client import Client
from device_operations.jobs import Job, Kind, State
from device_operations.wire.json_types import FreeJson

#: Seconds between two looks of `--watch`.
WATCH_SECONDS = 1.0


@click.command()
@click.argument("job_id", required=False)
@click.option("--state", type=click.Choice([state.value for state in State]))
@click.option("--kind", type=click.Choice([kind.value for kind in Kind]))
@click.option("--device", "device_id", metavar="ID")
@click.option("--owner")
@click.option("--label", metavar="NAME:VALUE")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True)
@click.option("--watch", is_flag=True, help="Show them again every second, until Ctrl-C.")
@json_option
@with_client
def jobs(client: Client, job_id: str | None, limit: int, watch: bool, as_json: bool, **filters: str | None) -> None:
    """Show jobs, newest first, or everything about the one with JOB_ID."""
    if job_id is not None:
        _show(client.job(job_id), as_json)
        return
    shown: dict[str, object] = {}
    while True:
        found = [job.model_dump(mode="json") for job in client.jobs(limit=limit, **filters)]
        if as_json and watch:
            for job in reversed(found):
                if shown.get(job["job_id"]) != job:
                    print_json(job)
            shown = {job["job_id"]: job for job in found}
        elif as_json:
            print_json({"jobs": found})
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            _print_jobs(found)
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


@click.command()
@click.argument("kind", type=click.Choice([kind.value for kind in Kind]))
@click.option("--request", "request_text", required=True, metavar="JSON|@FILE", help="The request, with `job` in it.")
@click.option("--idempotency-key", metavar="KEY", help="The same key and request again is the same job.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit status 1 if the job does not succeed.")
@json_option
@with_client
def submit(
    client: Client, kind: str, request_text: str, idempotency_key: str | None, wait: bool, as_json: bool
) -> None:
    """Submit a job of KIND."""
    job = client.submit(kind, _read_request(request_text), idempotency_key=idempotency_key)
    if wait:
        job = follow(client, job, quiet=as_json)
    _show(job, as_json)
    if wait:
        require_success(job)


@click.command()
@click.argument("job_id")
@click.option(
    "--request", "request_text", default="{}", metavar="JSON|@FILE", help="Fields of the first request to replace."
)
@click.option("--idempotency-key", metavar="KEY", help="The same key and fields again is the same job.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit status 1 if the job does not succeed.")
@json_option
@with_client
def retry(
    client: Client, job_id: str, request_text: str, idempotency_key: str | None, wait: bool, as_json: bool
) -> None:
    """Submit the ended job JOB_ID again, as a new job."""
    job = client.retry(job_id, _read_request(request_text), idempotency_key=idempotency_key)
    if wait:
        job = follow(client, job, quiet=as_json)
    _show(job, as_json)
    if wait:
        require_success(job)


def _read_request(text: str) -> dict[str, object]:
    try:
        if text == "@-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        request = json.loads(text)
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"neither JSON nor a file of it: {error}", param_hint="--request") from None
    if not isinstance(request, dict):
        raise click.BadParameter("the request is a JSON object", param_hint="--request")
    return request


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print_object(job.model_dump(mode="json", exclude_none=True))


def _print_jobs(found: list[FreeJson]) -> None:
    heads = ["job", "kind", "state", "device", "priority", "attempt", "submitted", "queued ms", "device ms", "error"]
    rows = [
        (
            job["job_id"],
            job["kind"],
            job["state"],
            job["device_id"],
            job["priority"],
            job["attempt"],
            job["submitted_at"][:19],
            _rounded(job["timings"]["queued_ms"]),
            _rounded(job["timings"]["device_ms"]),
            (job["error"] or {}).get("code"),
        )
        for job in found
    ]
    print_table(heads, rows)


def _rounded(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds:.1f}"
