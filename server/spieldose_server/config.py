"""Every setting of the server; the command line is derived from this one dataclass."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from spieldose_server.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
TENANT = "spieldose-tenant"  # key of the calls' metadata that names who asks
DIGEST_SHOWN = 12  # hex digits that tell versions apart for people, and enough to ask for one
LARGEST = (1 << 31) - 1  # of a number that gRPC takes
MESSAGE_BYTES = 8 << 20  # above the prompts' limit, so that too long a one gets its own error
LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Serve one 4-bit base and every adapter in a directory over gRPC."""

    base: str  # directory or hub name of the base model
    adapters: Path  # directory of delta files; NAME.safetensors is served as NAME
    listen: str = DEFAULT_ADDRESS  # HOST:PORT (0: a free one), or unix:PATH
    admin_listen: str = ""  # HOST:PORT or unix:PATH for load, unload, pin; empty: see SECURITY.md
    http_listen: str = ""  # address and port for OpenAI's clients; empty: none
    metrics_listen: str = ""  # address and port for Prometheus, over HTTP; empty: no metrics
    tls_certificate: str = ""  # PEM file of the server's certificate and its chain; empty: no TLS
    tls_key: str = ""  # PEM file of its key; both are read again once they change
    tls_client_ca: str = ""  # PEM file; clients must have certificates of these authorities
    otlp_endpoint: str = ""  # URL of an OpenTelemetry collector, http or https; empty: no traces
    trace_ratio: float = 1.0  # share traced of the requests without a traceparent
    log_format: LogFormat = "text"  # of the log, on stderr
    trusted_keys: str = ""  # PEM file of keys, one of which must sign an adapter; empty: no check
    access: str = ""  # TOML file of tenants, their tokens and adapters; empty: all may play all

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when there is one
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    adapter_memory: int = 0  # bytes of device memory for adapters; 0: half of what is free
    host_memory: int = 0  # bytes of host memory for copies; 0: 1/4 of what is free, on the CPU 1/8
    max_adapters: int = 1024  # adapters resident at once, whatever their size
    kv_tokens: int = 16384  # tokens of KV cache, shared by all running requests
    max_batch_tokens: int = 512  # tokens of a forward pass; a longer prompt takes several
    max_batch_requests: int = 64  # requests of one forward pass
    max_requests: int = 1024  # requests accepted at once; more are turned away
    max_tenant_requests: int = 512  # the same of one tenant
    max_tenant_running: int = 64  # requests of one tenant in a forward pass; more wait
    tenant_tokens_per_second: float = 0.0  # of prompts and answers; 0 sets no limit
    max_prompt_bytes: int = 1 << 20  # of text or messages in one request
    max_message_bytes: int = MESSAGE_BYTES  # of one message; well above max_prompt_bytes
    max_connection_calls: int = 1024  # of one connection at once; more wait in the client
    drain_seconds: float = 30.0  # how long running requests may go on after SIGTERM

    def __post_init__(self) -> None:
        for name in (
            "max_adapters",
            "kv_tokens",
            "max_batch_tokens",
            "max_batch_requests",
            "max_requests",
            "max_tenant_requests",
            "max_tenant_running",
            "max_prompt_bytes",
            "max_message_bytes",
            "max_connection_calls",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST:
                raise ConfigError(f"{name} must be at most {LARGEST}, got {getattr(self, name)}")
        for name in (
            "adapter_memory",
            "host_memory",
            "drain_seconds",
            "tenant_tokens_per_second",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be finite, got {getattr(self, name)}")
        _check_address("listen", self.listen, sockets=True)
        if self.admin_listen:
            _check_address("admin_listen", self.admin_listen, sockets=True)
        if self.http_listen:
            _check_address("http_listen", self.http_listen, sockets=False)
        if self.metrics_listen:
            _check_address("metrics_listen", self.metrics_listen, sockets=False)
        if self.otlp_endpoint and not _is_url(self.otlp_endpoint):
            raise ConfigError(
                f"otlp_endpoint: expected http://HOST:PORT or https://…, got {self.otlp_endpoint!r}"
            )
        if not 0 <= self.trace_ratio <= 1:
            raise ConfigError(f"trace_ratio: expected 0 to 1, got {self.trace_ratio}")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key: expected both or none, got one")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("tls_client_ca: expected a tls_certificate beside it, got none")
        if not os.path.isdir(self.adapters):  # Path's own raises where a name is too long
            raise ConfigError(f"adapters must be a directory, got {self.adapters}")


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
    except ValueError:  # of half an IPv6 address, for one
        return False
    return url.scheme in ("http", "https") and bool(url.hostname)


def _check_address(name: str, address: str, *, sockets: bool) -> None:
    host, _, port = address.rpartition(":")
    if sockets and address.startswith("unix:") and address.removeprefix("unix:").strip("/"):
        return
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        also = " or unix:PATH" if sockets else ""
        raise ConfigError(f"{name}: expected HOST:PORT{also}, got {address!r}")
