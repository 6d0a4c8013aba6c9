"""With trusted keys only what one of them signed is played, whenever it is read."""

import base64
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from spieldose_kernels.delta_file import write_delta
from spieldose_server.client import ClientError
from spieldose_server.config import ServerConfig
from spieldose_server.config_file import checked
from spieldose_server.errors import ConfigError, RejectedAdapter
from spieldose_server.sign import make_key, read_key, sign, sign_file
from spieldose_server.trusted_keys import TrustedKeys

from ..conftest import Running, eventually
from .shelf import Shelf
from .test_adapters import SHORT, MakeAdapter

NONE = "expected a signature by a trusted key, got none"
FOREIGN = "expected a signature by a trusted key, got one by no such key"
OTHER = "expected a signature of this file, got one of another"
UNREADABLE = "expected a signature by a trusted key, got one nobody can read"


class Keys:
    """A trusted key, a foreign one, and the file of trusted keys."""

    def __init__(self, directory: Path) -> None:
        self.trusted = make_key(directory / "trusted-key.pem")
        self.foreign = make_key(directory / "foreign-key.pem")
        self.directory, self.file = directory, directory / "trusted.pem"
        self.trust(self.trusted)

    def trust(self, *public: str) -> None:
        self.file.write_text("# ours\n" + "".join(public))

    def sign(self, path: Path, *, by: str = "trusted") -> None:
        sign_file(path, read_key(self.directory / f"{by}-key.pem"))


@pytest.fixture
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def reasons(shelf: Shelf, name: str) -> list[str]:
    return [version.reason for version in shelf.store.list() if version.name == name]


def test_only_what_a_trusted_key_signed_is_played(
    on_shelf: Any, tmp_path: Path, keys: Keys
) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        for seed, name in enumerate(("good", "none", "foreign", "other")):
            shelf.write(name, seed=seed)
        keys.sign(tmp_path / "good.safetensors")
        keys.sign(tmp_path / "foreign.safetensors", by="foreign")
        signed = (tmp_path / "good.safetensors.sig").read_bytes()
        (tmp_path / "other.safetensors.sig").write_bytes(signed)
        expected = {"good": "", "none": NONE, "foreign": FOREIGN, "other": OTHER}
        await shelf.settle()
        assert shelf.state("good") == "resident"
        for name in ("none", "foreign", "other"):
            assert reasons(shelf, name) == [expected[name]]
            with pytest.raises(RejectedAdapter):
                await shelf.use(name)
        shelf.store.retire("good")
        for file in tmp_path.iterdir():
            os.utime(file, (1e9, 1e9))
        shelf.directory._taken.clear()
        await shelf.directory.take_up()  # by their headers alone, as at a start
        assert shelf.state("good") == "found"
        for name in ("none", "foreign"):
            assert reasons(shelf, name) == [expected[name]]
        with pytest.raises(RejectedAdapter, match=OTHER):  # its header is the signed one's
            await shelf.use("other")
        assert (await shelf.use("good")).digest


@pytest.mark.parametrize("kind", ["random", "huge", "directory", "fifo", "link out", "empty"])
def test_a_broken_signature_rejects_its_adapter_and_no_other(
    on_shelf: Any, tmp_path: Path, keys: Keys, kind: str
) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        shelf.write("bad")
        shelf.write("good", seed=1)
        keys.sign(tmp_path / "good.safetensors")
        beside = tmp_path / "bad.safetensors.sig"
        if kind == "directory":
            beside.mkdir()
        elif kind == "fifo":
            os.mkfifo(beside)
        elif kind == "link out":
            beside.symlink_to(keys.file)
        elif kind == "huge":
            keys.sign(tmp_path / "bad.safetensors")
            os.truncate(beside, 1 << 40)
        else:
            beside.write_bytes(os.urandom(100) if kind == "random" else b"")
        await shelf.settle()
        (reason,) = reasons(shelf, "bad")
        assert reason and str(keys.directory) not in reason
        assert (reason == UNREADABLE) == (kind in ("random", "huge", "empty"))
        assert shelf.state("good") == "resident"


def test_a_signature_may_come_later_and_a_replacement_needs_its_own(
    on_shelf: Any, tmp_path: Path, keys: Keys
) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        file = tmp_path / "a.safetensors"
        shelf.write("a")
        await shelf.settle()
        assert reasons(shelf, "a") == [NONE]
        keys.sign(file)
        await shelf.settle()
        before = await shelf.use("a")
        shelf.write("a", seed=1)
        await shelf.settle()
        assert shelf.state("a") == "resident, rejected" and await shelf.use("a") is before
        assert OTHER in reasons(shelf, "a")
        keys.sign(file)
        await shelf.settle()
        assert shelf.state("a") == "resident" and await shelf.use("a") is not before


def test_who_replaces_the_signature_first_never_shows_a_rejected_adapter(
    on_shelf: Any, tmp_path: Path, keys: Keys
) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        shelf.write("new", seed=1)
        keys.sign(tmp_path / "new.safetensors")
        shelf.write("a")
        keys.sign(tmp_path / "a.safetensors")
        await shelf.settle()
        before = await shelf.use("a")
        (tmp_path / "new.safetensors.sig").rename(tmp_path / "a.safetensors.sig")
        await shelf.settle()
        assert shelf.state("a") == "resident" and await shelf.use("a") is before
        (tmp_path / "new.safetensors").rename(tmp_path / "a.safetensors")
        await shelf.settle()
        assert shelf.state("a") == "resident" and await shelf.use("a") is not before


def test_what_is_read_from_disk_again_needs_its_signature_again(
    on_shelf: Any, tmp_path: Path, keys: Keys
) -> None:
    @on_shelf(slots=1, host=0.01, keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        for seed, name in enumerate("ab"):
            shelf.write(name, seed=seed)
            keys.sign(tmp_path / f"{name}.safetensors")
        await shelf.settle()
        await shelf.use("a")
        await shelf.use("b")
        keys.trust(keys.foreign)  # the directory has not looked yet
        with pytest.raises(RejectedAdapter, match=FOREIGN):
            await shelf.use("a")


def test_a_removed_key_withdraws_what_it_signed_and_an_added_one_lets_it_in(
    on_shelf: Any, tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        for name, by in (("a", "trusted"), ("b", "foreign")):
            shelf.write(name)
            keys.sign(tmp_path / f"{name}.safetensors", by=by)
        await shelf.settle()
        assert (shelf.state("a"), reasons(shelf, "b")) == ("resident", [FOREIGN])
        keys.file.write_text("spoilt")
        await shelf.settle()
        assert shelf.state("a") == "resident" and "trusted keys stay as they were" in caplog.text
        with shelf.store.lease("a") as running:
            assert running is not None
            (await running.ready()).playing += 1
            keys.trust(keys.foreign)
            await shelf.settle()
            assert (reasons(shelf, "a"), shelf.state("b")) == ([FOREIGN], "resident")
            assert running.version.slot is not None  # what runs is played to its end
            running.version.playing -= 1
        assert running.version.slot is None
        keys.trust(keys.trusted, keys.foreign)
        await shelf.settle()
        assert shelf.state("a") == shelf.state("b") == "resident"


def test_keys_are_rotated_without_a_rejection(on_shelf: Any, tmp_path: Path, keys: Keys) -> None:
    @on_shelf(keys=TrustedKeys(keys.file))
    async def _(shelf: Shelf) -> None:
        for name in "ab":
            shelf.write(name)
            keys.sign(tmp_path / f"{name}.safetensors")
        await shelf.settle()
        before = await shelf.use("a")
        keys.trust(keys.trusted, keys.foreign)
        keys.sign(tmp_path / "a.safetensors", by="foreign")
        await shelf.settle()
        keys.trust(keys.foreign)
        await shelf.settle()
        assert await shelf.use("a") is before and reasons(shelf, "a") == [""]
        assert reasons(shelf, "b") == [FOREIGN]
        keys.sign(tmp_path / "b.safetensors", by="foreign")
        keys.trust(keys.foreign, keys.foreign)  # both at once
        await shelf.settle()
        assert shelf.state("b") == "resident"


def test_a_key_of_an_unknown_kind_changes_nothing(keys: Keys, tmp_path: Path) -> None:
    trusted = TrustedKeys(keys.file)
    before = trusted.current()
    body = keys.trusted.splitlines()
    raw = bytearray(base64.b64decode(body[1]))
    raw[raw.index(b"\x2b\x65\x70") : raw.index(b"\x2b\x65\x70") + 3] = b"\x2a\x03\x04"  # its OID
    odd = "\n".join([body[0], base64.b64encode(raw).decode(), *body[2:], ""])
    keys.trust(keys.trusted, odd)
    assert trusted.current() == before
    with pytest.raises(ConfigError, match=r"trusted\.pem: expected public keys as PEM, got: "):
        TrustedKeys(keys.file)


def test_a_server_plays_what_the_command_signed(
    serve_tiny: Callable[..., Iterator[Running]],
    tmp_path: Path,
    make_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, trusted, directory = tmp_path / "key.pem", tmp_path / "trusted.pem", tmp_path / "adapters"
    directory.mkdir()
    sign(["--new-key", str(key)])
    trusted.write_text(capsys.readouterr().out)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="expected to write a new key"):
        sign(["--new-key", str(key)])
    for seed, name in enumerate(("a", "b")):
        write_delta(directory / f"{name}.safetensors", make_adapter(seed))
    sign([str(directory / "a.safetensors"), "--key", str(key)])
    with contextmanager(serve_tiny)(directory, trusted_keys=str(trusted)) as running:
        ask = running.client.generate
        assert ask("x", adapter="a", sampling=SHORT).adapter.startswith("a@")
        eventually(lambda: NONE in running.state("b"))
        with pytest.raises(ClientError) as caught:
            ask("x", adapter="b")
        assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION and NONE in str(
            caught.value
        )
        sign([str(directory / "b.safetensors"), "--key", str(key)])
        eventually(lambda: running.state("b") == "resident")
        assert ask("x", adapter="b", sampling=SHORT).adapter.startswith("b@")


@pytest.mark.parametrize("content", ["", "no PEM", "private", "cut"])
def test_a_file_that_holds_no_public_keys_is_refused(
    keys: Keys, tiny_directory: Path, content: str
) -> None:
    secret = (keys.directory / "trusted-key.pem").read_text()
    keys.file.write_text({"private": secret, "cut": keys.trusted[:60]}.get(content, content))
    config = ServerConfig(
        base=str(tiny_directory), adapters=keys.directory, trusted_keys=str(keys.file)
    )
    with pytest.raises(ConfigError, match="expected"):
        checked(config)
    keys.trust(keys.trusted, keys.foreign)
    assert "the settings are right" in checked(config)
