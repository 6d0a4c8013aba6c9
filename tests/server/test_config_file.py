"""Settings from a TOML file: errors are named, flags win, the file in the tree is current."""

import math
import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import tyro

from spieldose_kernels.errors import BaseError
from spieldose_server.command_line import serve
from spieldose_server.config import ServerConfig
from spieldose_server.config_file import ServeArguments, template, with_file
from spieldose_server.errors import ConfigError

CURRENT = Path(__file__).parents[2] / "server" / "spieldose.toml"


def written(directory: Path, text: str) -> list[str]:
    (directory / "spieldose.toml").write_text(text)
    return ["--config", str(directory / "spieldose.toml")]


def parsed(arguments: list[str]) -> ServeArguments:
    return tyro.cli(ServeArguments, args=with_file(arguments))


def test_the_file_in_the_tree_has_every_setting_with_its_default() -> None:
    assert CURRENT.read_text() == template(), "run `make config`"
    settings = tomllib.loads(template())
    for field in fields(ServerConfig):
        if field.default is MISSING:
            assert re.search(rf"^# .+\n# {field.name} = ", template(), re.MULTILINE)
        else:
            assert settings.pop(field.name) == field.default
            assert re.search(rf"^# .+\n{field.name} = ", template(), re.MULTILINE)
    assert not settings


def test_the_file_in_the_tree_is_read_to_the_defaults(tmp_path: Path) -> None:
    required = ["--base", "b", "--adapters", str(tmp_path)]
    found = parsed([*written(tmp_path, template()), *required])
    for field in fields(ServerConfig):
        if field.default is not MISSING:
            assert getattr(found, field.name) == field.default


def test_flags_override_the_file(tmp_path: Path) -> None:
    text = f'base = "b"\nadapters = "{tmp_path}"\nkv_tokens = 4096\ndrain_seconds = 2\n'
    found = parsed([*written(tmp_path, text), "--kv-tokens", "8192"])
    assert (found.base, found.kv_tokens, found.drain_seconds) == ("b", 8192, 2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv_tokenz = 1", "expected a setting, got 'kv_tokenz'; did you mean 'kv_tokens'?"),
        ("[server]\nkv_tokens = 1", "expected a setting, got 'server'"),
        ("check = true", "expected a setting, got 'check'"),
        ('kv_tokens = "many"', "kv_tokens: expected a whole number, got 'many'"),
        ("kv_tokens = 1.5", "kv_tokens: expected a whole number, got 1.5"),
        ("kv_tokens = true", "kv_tokens: expected a whole number, got True"),
        ("drain_seconds = '3'", "drain_seconds: expected a number, got '3'"),
        ("base = 3", "base: expected a string, got 3"),
        ('device = "cudo"', "device: expected one of auto, cpu, cuda, got 'cudo'; did you mean"),
        ("device = []", "device: expected one of auto, cpu, cuda, got []"),
        ("kv_tokens =", "expected a readable TOML file, got: "),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_right_one(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(written(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'spieldose.toml'}: {expected}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: expected a readable TOML file, got: "):
        parsed(["--config", str(tmp_path / "none.toml")])


def test_a_value_out_of_range_is_refused_as_from_a_flag(tmp_path: Path) -> None:
    required = ["--base", "b", "--adapters", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"^kv_tokens must be at least 1, got 0$"):
        parsed([*written(tmp_path, "kv_tokens = 0"), *required])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drain_seconds", math.nan),
        ("tenant_tokens_per_second", math.nan),
        ("drain_seconds", math.inf),
        ("host_memory", -1),
        ("max_message_bytes", 1 << 31),
        ("max_connection_calls", 1 << 40),
    ],
)
def test_a_number_that_is_no_use_is_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must (not )?be .*, got {value}$"):
        ServerConfig(base="b", adapters=tmp_path, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["listen", "admin_listen", "http_listen", "metrics_listen"])
@pytest.mark.parametrize("address", ["localhost", ":50051", "localhost:65536", "localhost:http"])
def test_what_is_no_address_is_refused(tmp_path: Path, name: str, address: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected HOST:PORT.*, got '{address}'"):
        ServerConfig(base="b", adapters=tmp_path, **{name: address})  # type: ignore[arg-type]
    fits = {name: "unix:server.sock" if "admin" in name else "[::1]:0"}
    ServerConfig(base="b", adapters=tmp_path, **fits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["collector:4317", "http://", "grpc://collector:4317", "http:4317", "http://[::1"]
)
def test_what_is_no_collector_is_refused(tmp_path: Path, url: str) -> None:
    said = f"otlp_endpoint: expected http.*, got {re.escape(repr(url))}"
    with pytest.raises(ConfigError, match=said):
        ServerConfig(base="b", adapters=tmp_path, otlp_endpoint=url)
    for fits in ("http://collector:4317", "https://[::1]:4317"):
        ServerConfig(base="b", adapters=tmp_path, otlp_endpoint=fits)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(ConfigError, match=f"trace_ratio: expected 0 to 1, got {ratio}"):
        ServerConfig(base="b", adapters=tmp_path, trace_ratio=ratio)


def test_check_serves_nothing(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(["--base", str(tiny_directory), "--adapters", str(tmp_path), "--check"])
    assert "the settings are right" in capsys.readouterr().out


def test_check_refuses_names_that_are_too_long(tmp_path: Path) -> None:
    long = "a" * 300
    with pytest.raises(BaseError, match=r"^expected a model directory or hub name, got 'a"):
        serve(["--base", long, "--adapters", str(tmp_path), "--check"])
    with pytest.raises(ConfigError, match=r"^adapters must be a directory, got a"):
        serve(["--base", "b", "--adapters", long, "--check"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_check_says_that_there_is_no_cuda_device(tiny_directory: Path, tmp_path: Path) -> None:
    words = ["--base", str(tiny_directory), "--adapters", str(tmp_path), "--device", "cuda"]
    with pytest.raises(BaseError, match=r"^device: expected a CUDA device .*, got none$"):
        serve([*words, "--check"])
