"""Everything that an operator can set: environment variables, and flags of `dd-server serve`.

A flag wins over the environment (`DD_SERVER_` + the upper-case name), which wins over the default.
"""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dd_core.bundle import DEFAULT_BUNDLE
from dd_core.errors import InvalidRequestError

ENV_PREFIX = "DD_SERVER_"


class Settings(BaseSettings):
    """How the server listens, what it loads and how much it admits."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    model: str = Field(DEFAULT_BUNDLE, description="Built-in or published model, or a bundle's folder.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    max_batch: int = Field(32, ge=1, le=4096, description="Most images computed together.")
    queue_size: int = Field(256, ge=1, description="Most images that wait; beyond it the reply is 429.")
    max_images: int = Field(16, ge=1, le=256, description="Most images of one request (`n`).")
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes; beyond it 413.")
    encode_threads: int = Field(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        ge=1,
        le=64,
        description="Threads that encode images.",
    )
    drain_timeout: float = Field(
        20.0, ge=0.0, le=3600.0, description="Seconds that running requests get after SIGTERM."
    )
    warmup: bool = Field(True, description="Run every plan once before the server reports ready.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity logged."
    )
    access_log: bool = Field(False, description="Log a line for every request.")

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_link(cls, value: Any) -> Any:
        # Kubernetes sets DD_SERVER_PORT=tcp://… in every pod beside a Service named dd-server.
        return 8000 if isinstance(value, str) and value.startswith("tcp://") else value

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        if self.queue_size < self.max_images:
            raise ValueError(
                f"queue_size ({self.queue_size}) must be at least max_images ({self.max_images}), "
                "or the largest request could never be admitted"
            )
        return self


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
