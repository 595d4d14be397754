"""What this installation is set to: every setting, read once from the environment and an optional TOML file.

    load()  ─▶  Settings            what is in force, frozen; the same object for the whole process
            ─▶  SettingsError       one message with the setting's name, its value and what is allowed

Names are those of the environment: `DEVICE_OPERATIONS_HTTP__PORT` is `settings.http.port`. The environment wins over
the TOML file named by `DEVICE_OPERATIONS_CONFIG`. Where no URL is set for PostgreSQL or Redis, the ones that a running
`device-operations up` noted in its data folder are used. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableSettings
from pydantic_settings.sources import TomlConfigSettingsSource

from device_operations.devices import DeviceSpec, parse_devices, spell_devices
from device_operations.settings.api_keys import ApiKey, parse_api_keys
from device_operations.settings.names import (
    PREFIX,
    SECRET,
    environment_name,
    explain,
    is_secret,
    leaves,
    masked,
    nearest,
)
from device_operations.settings.running_stack import read_stack, stack_file
from device_operations.settings.sections import (
    BlobSettings,
    FlowerSettings,
    HttpSettings,
    InferenceSettings,
    JobSettings,
    QueueSettings,
    TrainingSettings,
    WebhookSettings,
)

__all__ = [
    "CONFIG",
    "PREFIX",
    "ApiKey",
    "Setting",
    "Settings",
    "SettingsError",
    "describe",
    "gateway_url",
    "load",
    "local_url",
    "names",
    "read",
    "read_stack",
    "stack_file",
]

#: Names the TOML file; a setting of the settings, so it is no field of theirs.
CONFIG = PREFIX + "CONFIG"

#: What Kubernetes injects for a service that is itself named device-operations: no settings, and no mistakes.
_SERVICE_LINK = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)$")


class SettingsError(Exception):
    """Raised when a setting is wrong, unknown or missing; the message names it, its value and what is allowed."""


@functools.cache
def load() -> Settings:
    """The settings in force, with the URLs of a running `up` where none are set; read on the first call, then kept.

    Raises `SettingsError`.
    """
    settings = read()
    noted = read_stack(settings.data_dir)
    missing = [name for name in ("database_url", "redis_url") if getattr(settings, name) is None and name in noted]
    return settings.model_copy(update={name: noted[name] for name in missing})


def gateway_url(settings: Settings) -> str:
    """Where callers on this machine reach the gateway: where `up` says it runs, unless a host or port is set."""
    if not {"host", "port"} & settings.http.model_fields_set:
        noted = read_stack(settings.data_dir).get("http_url")
        if isinstance(noted, str):
            return noted
    return local_url(settings.http.host, settings.http.port)


def local_url(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on a host, "all addresses" included."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def read() -> Settings:
    """The settings as the environment and the file say now, for programs that start a stack or change it on purpose."""
    _refuse_unknown_names(os.environ)
    _refuse_unreadable_file(os.environ.get(CONFIG))
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(explain(error, Settings)) from None
    except UnreadableSettings as error:
        raise SettingsError(str(error)) from None


def _of_scheme(*schemes: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value is not None and (not isinstance(value, str) or value.split("://")[0] not in schemes):
            raise ValueError("the scheme is not " + " or ".join(f"{scheme}://" for scheme in schemes))
        return value

    return check


class Settings(BaseSettings):
    """Every setting in force. Frozen; secrets do not show in its repr."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        env_parse_none_str="null",
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    database_url: Annotated[
        str | None, BeforeValidator(_of_scheme("postgresql", "postgres", "postgresql+psycopg2"))
    ] = Field(None, description="postgresql://user:password@host:port/database", json_schema_extra=SECRET, repr=False)
    redis_url: Annotated[str | None, BeforeValidator(_of_scheme("redis", "rediss", "unix", "sentinel"))] = Field(
        None, description="redis://:password@host:port/0", json_schema_extra=SECRET, repr=False
    )
    node: str | None = Field(
        None,
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="lower-case letters, digits and hyphens, 63 at most",
    )
    data_dir: Path = Field(Path(".device-operations"), description="a folder")
    devices: Annotated[tuple[DeviceSpec, ...], NoDecode, BeforeValidator(parse_devices)] = Field(
        (), validate_default=False, description="auto, or for example cuda:0,cuda:1 or directml:0 or cpu:2"
    )
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(parse_api_keys)] = Field(
        (),
        description="owner:key or owner:key:admin, comma separated, or the same as a JSON list",
        json_schema_extra=SECRET,
        repr=False,
    )
    max_memory_allocation_gb: float = Field(24, gt=0, description="largest allocation in GB (2**30 bytes), above 0")
    default_device: str = Field("gpu_0", pattern=r"^([a-z0-9-]+\.)?[a-z]+_\d+$", description="a device such as gpu_0")
    model_cache_path: Path = Field(Path("models"), description="a folder")
    enable_gpu_scheduling: bool = Field(True, description="true or false")
    lease_seconds: float = Field(15, ge=1, le=3600, description="seconds until a silent worker is lost, 1 to 3600")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(lambda text: str(text).lower())
    ] = Field("info", description="debug, info, warning or error")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto (JSON where it is not a terminal), console or json"
    )

    http: HttpSettings = Field(default_factory=HttpSettings)
    flower: FlowerSettings = Field(default_factory=FlowerSettings)
    inference: InferenceSettings = Field(default_factory=InferenceSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    blobs: BlobSettings = Field(default_factory=BlobSettings)
    webhook: WebhookSettings = Field(default_factory=WebhookSettings)
    jobs: JobSettings = Field(default_factory=JobSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before the TOML file; nothing else is read."""
        path = os.environ.get(CONFIG)
        toml = (TomlConfigSettingsSource(settings_cls, toml_file=path),) if path else ()
        return (init_settings, env_settings, *toml)

    def model_post_init(self, context: object) -> None:
        """Makes paths absolute and fills in the blob folder, so that no other module has a default of its own."""
        for name in ("data_dir", "model_cache_path"):
            self.__dict__[name] = Path(getattr(self, name)).expanduser().absolute()
        self.training.__dict__["checkpoint_path"] = self.training.checkpoint_path.expanduser().absolute()
        if self.blobs.url is None:
            self.blobs.__dict__["url"] = (self.data_dir / "blobs").as_uri()

    def require_database_url(self) -> str:
        """PostgreSQL's URL. Raises `SettingsError` where none is set and no stack runs."""
        return self.database_url or self._refuse_missing("database_url")

    def require_redis_url(self) -> str:
        """Redis's URL. Raises `SettingsError` where none is set and no stack runs."""
        return self.redis_url or self._refuse_missing("redis_url")

    def _refuse_missing(self, name: str) -> str:
        raise SettingsError(
            f"{PREFIX}{name.upper()} is not set, and no running stack has noted one in {stack_file(self.data_dir)}: "
            f"set it ({type(self).model_fields[name].description}), or start `device-operations up`"
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is in force: its name in the environment, its value as JSON would hold it, what is allowed."""

    name: str
    value: object
    allowed: str
    secret: bool

    @property
    def shown(self) -> object:
        """The value, with what is secret in it masked."""
        return masked(self.value) if self.secret and self.value else self.value


def describe(settings: Settings) -> list[Setting]:
    """Every setting in force, in the order of `Settings`."""
    return [
        Setting(
            name=environment_name(path),
            value=spell_devices(settings.devices) if path == ("devices",) else _plain(_value(settings, path)),
            allowed=field.description or "",
            secret=is_secret(field),
        )
        for path, field in leaves(Settings)
    ]


def _value(settings: Settings, path: tuple[str, ...]) -> object:
    value: object = settings
    for name in path:
        value = getattr(value, name)
    return value


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value) if isinstance(value, Path) else value


def names() -> list[str]:
    """Every setting's name in the environment."""
    return [environment_name(path) for path, _ in leaves(Settings)]


def _refuse_unknown_names(environment: Mapping[str, str]) -> None:
    known = [*names(), CONFIG]
    for name in environment:
        if not name.upper().startswith(PREFIX) or name.upper() in known:
            continue
        if _SERVICE_LINK.match(name[len(PREFIX) :]):
            continue
        raise SettingsError(f"{name} is no setting{nearest(name.upper(), known)}")


def _refuse_unreadable_file(path: str | None) -> None:
    if not path:
        return
    try:
        tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{CONFIG} is {path!r}: it must name a TOML file that can be read ({error})") from None
