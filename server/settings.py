"""Everything that an operator can set: environment variables, and flags of `dd-server serve`.

A flag wins over the environment (`DD_SERVER_` + the upper-case name), which wins over the default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dd_core.bundle import DEFAULT_BUNDLE, DEFAULT_TEXT_BUNDLE
from dd_core.engine.arithmetic import ArithmeticName
from dd_core.errors import InvalidRequestError

ENV_PREFIX = "DD_SERVER_"
Determinism = Literal["exact", "fast"]

# What Kubernetes sets in the pods beside Services named dd-server or dd-server-*.
_SERVICE_LINK = re.compile(
    r"(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://.*")
_PUBLIC_URL = re.compile(r"https?://(?:[A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/[^\s?#]*)?")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.\-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")


class Settings(BaseSettings):
    """Settings of the server: its address, its models, its limits."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; `0.0.0.0` for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; `0` lets the system choose.")
    model: str = Field(
        f"{DEFAULT_BUNDLE},{DEFAULT_TEXT_BUNDLE}",
        description="Built-in or published models, or bundles' folders; several with commas between.",
    )
    served_model_name: str = Field(
        "",
        description="Other names for the models, as clients of other servers send: "
        "`pictograms=dall-e-3,pictograms=gpt-image-1`; `NAME=ALIAS`, joined by commas.",
    )
    device: str = Field(
        "auto",
        description="`auto` (a process for every GPU; on a CPU one, or for models of at most 256 MiB in all "
        "one a core, at most four), `cpu`, `cuda` or `cuda:N`; several with commas between: a process each.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Threads of a device process on a CPU; 0 = the cores are shared out."
    )
    max_batch: int = Field(32, ge=1, le=4096, description="Most images computed together.")
    queue_size: int = Field(
        256,
        ge=1,
        description="Most images that wait; beyond it the reply is 429; at least `DD_SERVER_MAX_IMAGES`.",
    )
    cohorts: int = Field(
        2, ge=1, le=64, description="Most batches that the teacher has under way; each holds a cache."
    )
    determinism: Determinism = Field(
        "exact",
        description="`exact` (the same bytes in every batch) or `fast` (arithmetic shared between the images "
        "of a batch).",
    )
    arithmetic: ArithmeticName = Field(
        "auto",
        description="Numbers that the models compute in: `exact32` (float32), `bf16` or `fp16` (faster in "
        "hardware that has them, other bytes), or `auto`: `exact32`, but with `--determinism fast` `bf16` "
        "where the hardware has it.",
    )
    brownout_ms: float = Field(
        2000.0,
        ge=0.0,
        le=3_600_000.0,
        description="Milliseconds of waiting for others beyond which a cheaper plan is spent; 0 = never.",
    )
    auto_latency_ms: float = Field(
        250.0,
        ge=1.0,
        le=3_600_000.0,
        description="Milliseconds that `quality: auto` may take: the best plan expected to be done by then.",
    )
    hang_timeout: float = Field(
        300.0, ge=0.1, description="Seconds after which a pass counts as hung and its process is replaced."
    )
    load_timeout: float = Field(
        600.0, ge=0.1, le=86400.0, description="Seconds that a load through `/admin` may take; beyond it 504."
    )
    max_images: int = Field(16, ge=1, le=256, description="Most images of one request (`n`).")
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes; beyond it 413.")
    encode_threads: int = Field(
        default_factory=lambda: min(16, os.cpu_count() or 1),
        ge=1,
        le=64,
        description="Most threads that encode images; one starts when all others are at work.",
    )
    drain_timeout: float = Field(
        20.0, ge=0.0, le=3600.0, description="Seconds that running requests get after SIGTERM."
    )
    warmup: bool = Field(True, description="Run every plan once before the server reports ready.")
    costs_folder: Path | None = Field(
        None,
        description="Folder of the costs that the warm-up measured, which the next start only checks; "
        "none = `$DD_HOME/costs`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity logged: `debug`, `info`, `warning` or `error`."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the log: `text`, or `json` with an object a line."
    )
    access_log: bool = Field(True, description="Log a line for every request.")
    log_prompts: bool = Field(
        False,
        description="Whether the log line of a request holds its prompt; otherwise no prompt is logged.",
    )
    max_header_bytes: int = Field(
        16384, ge=1024, le=2**20, description="Longest request line and headers in bytes; beyond it 431."
    )
    max_connections: int = Field(
        1000,
        ge=1,
        le=10**6,
        description="Most connections kept open; beyond it 503 and the end of the new one.",
    )
    receive_timeout: float = Field(
        30.0,
        ge=0.1,
        le=3600.0,
        description="Seconds that a client may take to send a request (beyond it 408), or not read a reply.",
    )
    keep_alive_timeout: float = Field(
        75.0, ge=0.0, le=3600.0, description="Seconds that a connection is kept for another request."
    )
    trusted_proxies: str = Field(
        "127.0.0.1,::1",
        description="Addresses or networks, joined by commas, whose `X-Forwarded-*` or `Forwarded` name the "
        "client in the log and what links begin with; `*` = any, empty = none.",
    )
    public_url: str = Field(
        "",
        description="Address of the server as its clients know it, for links, as `https://img.example/dd`; "
        "empty = as the request, or a trusted proxy, says.",
    )
    otel_endpoint: str = Field(
        "",
        pattern=r"^(https?://[^\s/]+\S*)?$",
        description="OTLP/HTTP collector that gets a trace of every request, as `http://collector:4318`; "
        "empty = none; needs the extra `otel`.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins of other pages that may ask, joined by commas (`https://a.example`), or `*`; "
        "empty = none.",
    )
    api_keys_file: Path | None = Field(
        None, description="File of API keys, `name:key` or `key` a line; none = no key is asked for."
    )
    admin_keys_file: Path | None = Field(
        None, description="File of keys for `/admin`, in the same form; none = `/admin` does not exist."
    )

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_link(cls, value: Any) -> Any:
        # Kubernetes sets DD_SERVER_PORT=tcp://… in every pod beside a Service named dd-server.
        return 8000 if isinstance(value, str) and value.startswith("tcp://") else value

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        return value.strip().removeprefix("[").removesuffix("]")  # an IPv6 address, as a URL writes it

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, value: str) -> str:
        for part in filter(None, map(str.strip, value.split(","))):
            if part != "*":
                ip_network(part)
        return value

    @field_validator("served_model_name")
    @classmethod
    def _aliases_are_pairs(cls, value: str) -> str:
        _aliases(value)
        return value

    @property
    def aliases(self) -> dict[str, str]:
        """The name of a model by each of its aliases."""
        return _aliases(self.served_model_name)

    @field_validator("public_url")
    @classmethod
    def _public_url_is_an_address(cls, value: str) -> str:
        if value and not _PUBLIC_URL.fullmatch(value):
            raise ValueError(f"{value!r} is no address: write http(s)://host, with port and path if need be")
        return value.rstrip("/")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # A browser sends exactly this form, so anything else would never match.
        for origin in value:
            if not _ORIGIN.fullmatch(origin) and value != ("*",):
                raise ValueError(
                    f"{origin!r} is no origin: write scheme://host or scheme://host:port in lower case "
                    "without a path, or * alone"
                )
        return value

    @field_validator("api_keys_file", "admin_keys_file", "costs_folder", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        if self.queue_size < self.max_images:
            raise ValueError(
                f"queue_size ({self.queue_size}) must be at least max_images ({self.max_images}), "
                "or the largest request could never be admitted"
            )
        return self


def _aliases(text: str) -> dict[str, str]:
    """Parse `NAME=ALIAS,NAME=ALIAS`; an alias without a name is another one of the name before it."""
    names: dict[str, str] = {}
    name = ""
    for part in filter(None, map(str.strip, text.split(","))):
        before, sign, after = (piece.strip() for piece in part.partition("="))
        name, alias = (before, after) if sign else (name, before)
        if not name or not alias:
            raise ValueError(f"{part!r} is no alias: write NAME=ALIAS, joined by commas")
        if names.setdefault(alias, name) != name:
            raise ValueError(f"{alias} would be an alias of both {names[alias]} and {name}")
    return names


def show(value: object) -> str:
    """A default as the help and the documentation write it."""
    if value is None or value in ((), ""):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def load_settings(**flags: object) -> Settings:
    """Settings from the environment, overridden by the flags that are not None.

    Raises:
        InvalidRequestError: a value is out of range; `param` is the setting's name.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        where = f"{name} ({ENV_PREFIX}{name.upper()})" if name else "settings"
        raise InvalidRequestError(f"{where}: {message}", param=name or None) from None


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A line for each `DD_SERVER_*` variable that is no setting and so would change nothing."""
    known = [name.upper() for name in Settings.model_fields]
    lines = []
    for variable, value in sorted(environ.items()):
        name = variable.upper()
        rest = name.removeprefix(ENV_PREFIX)
        if rest == name or rest in known or _SERVICE_LINK.fullmatch(rest):
            continue
        if rest.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value):
            continue
        close = difflib.get_close_matches(rest, known, n=1)
        hint = f"; did you mean {ENV_PREFIX}{close[0]}?" if close else ""
        lines.append(f"{variable} is no setting{hint}")
    return lines
