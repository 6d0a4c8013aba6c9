"""What lies outside the adapter directory is not read, whatever links lead there and when."""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from spieldose_kernels.delta_file import write_delta
from spieldose_kernels.errors import NotADelta
from spieldose_server.client import ClientError
from spieldose_server.errors import RejectedAdapter
from spieldose_server.files import AdapterFiles
from spieldose_server.inside import open_inside

from ..conftest import Running, eventually
from .shelf import SPEC, Shelf
from .test_adapters import SHORT, MakeAdapter

OUT = "expected a file in the adapter directory, got a link that leads out of it"


@pytest.fixture
def outside(on_shelf: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory elsewhere with a valid adapter's file."""
    directory = tmp_path_factory.mktemp("outside")

    @on_shelf("secret")
    async def _(shelf: Shelf) -> None:
        (tmp_path / "secret.safetensors").rename(directory / "secret.safetensors")

    return directory


def lead_out(root: Path, outside: Path, *, how: str) -> None:
    """Make x.safetensors a link that leads out."""
    x, secret = root / "x.safetensors", outside / "secret.safetensors"
    if how == "by a chain":
        (root / "one").symlink_to(secret)
        (root / ".two").symlink_to("one")
    elif how == "by a linked parent":
        (root / "parent").symlink_to(outside)
    elif how == "to a circle":
        (outside / "circle").symlink_to("circle")
    elif how == "to a neighbour of a longer name":
        shutil.copytree(outside, f"{root}-more")
    x.symlink_to(
        {
            "directly": secret,
            "by steps up": Path("..", os.path.relpath(secret, root.parent)),
            "by a chain": ".two",
            "by a linked parent": "parent/secret.safetensors",
            "to a circle": outside / "circle",
            "to a neighbour of a longer name": f"{root}-more/secret.safetensors",
            "to nothing": outside / "none",
            "to a directory": outside,
            "to a device": "/dev/zero",
        }[how]
    )


WAYS = (
    "directly",
    "by steps up",
    "by a chain",
    "by a linked parent",
    "to a circle",
    "to a neighbour of a longer name",
    "to nothing",
    "to a directory",
    "to a device",
)


@pytest.mark.parametrize("how", WAYS)
def test_a_link_that_leads_out_is_rejected_and_tells_nothing_of_what_is_there(
    on_shelf: Any, tmp_path: Path, outside: Path, how: str
) -> None:
    lead_out(tmp_path, outside, how=how)

    @on_shelf("a")  # it lies there at the start
    async def _(shelf: Shelf) -> None:
        assert shelf.state("x") == "rejected"
        (tmp_path / "y.safetensors").symlink_to("x.safetensors")  # and while it runs
        await shelf.settle()
        for name in "xy":
            assert [v.reason for v in shelf.store.list() if v.name == name] == [OUT]
            with pytest.raises(RejectedAdapter):
                await shelf.use(name)
            with pytest.raises(RejectedAdapter):
                await shelf.directory.load(name)
        assert (await shelf.use("a")).name == "a"


@pytest.mark.parametrize("sight", ["scanned", "looked at before it was opened"])
def test_a_link_swapped_at_any_moment_is_not_followed_out(
    on_shelf: Any,
    tmp_path: Path,
    outside: Path,
    monkeypatch: pytest.MonkeyPatch,
    sight: str,
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        shutil.copytree(outside, tmp_path / "sub", copy_function=os.link)  # the very same inode
        (tmp_path / "x.safetensors").symlink_to("sub/secret.safetensors")
        files = AdapterFiles(tmp_path, SPEC, dtype=torch.float32)
        stamp = files.scan()["x"]
        assert files.read("x", stamp).digest

        def swap(*_: object) -> bool:
            if not (tmp_path / "sub").is_symlink():
                shutil.rmtree(tmp_path / "sub")
                (tmp_path / "sub").symlink_to(outside)
            return False

        if sight == "scanned":
            swap()
        else:
            monkeypatch.setattr("spieldose_server.inside.leads_out", swap)
        for read in (files.read, files.describe):
            with pytest.raises(NotADelta, match=OUT):
                read("x", stamp)


def test_a_replacement_that_leads_out_leaves_the_good_version_in_service(
    on_shelf: Any, tmp_path: Path, outside: Path
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        before = await shelf.use("a")
        (tmp_path / "a.safetensors").unlink()
        (tmp_path / "a.safetensors").symlink_to(outside / "secret.safetensors")
        await shelf.settle()
        assert shelf.state("a") == "resident, rejected"
        assert await shelf.use("a") is before


def test_a_volume_as_kubernetes_mounts_it_is_served_and_replaced_at_once(
    on_shelf: Any, tmp_path: Path
) -> None:
    @on_shelf("a", "b")
    async def _(shelf: Shelf) -> None:
        mount(tmp_path, "..2026_01", ["a", "b"])
        await shelf.settle()
        assert shelf.state("x") == shelf.state("y") == "resident"
        before = await shelf.use("x")
        assert before.digest == (await shelf.use("a")).digest
        mount(tmp_path, "..2026_02", ["b", "a"])
        shutil.rmtree(tmp_path / "..2026_01")
        await shelf.settle()
        assert (await shelf.use("x")).digest == (await shelf.use("b")).digest != before.digest
        assert (await shelf.use("y")).digest == before.digest
        (tmp_path / "..data").unlink()
        await shelf.settle()
        assert shelf.state("x") == shelf.state("y") == ""


def mount(root: Path, version: str, names: list[str]) -> None:
    """Have x and y lead through ..data to a hidden directory, swapped in one step."""
    (root / version).mkdir()
    for name, source in zip("xy", names, strict=True):
        shutil.copy(root / f"{source}.safetensors", root / version / f"{name}.safetensors")
    (root / "..data_tmp").symlink_to(version)
    (root / "..data_tmp").rename(root / "..data")
    for name in "xy":
        if not (root / f"{name}.safetensors").is_symlink():
            (root / f"{name}.safetensors").symlink_to(f"..data/{name}.safetensors")


def test_the_directory_itself_may_be_a_link_that_moves(
    on_shelf: Any, tmp_path: Path, outside: Path
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
        root = outside / "root"
        root.symlink_to(tmp_path)
        files = AdapterFiles(root, SPEC, dtype=torch.float32)
        found = files.scan()
        assert files.read("a", found["a"]).digest == files.read("b", found["b"]).digest
        root.unlink()
        root.symlink_to(outside)
        assert files.read("secret", files.scan()["secret"]).digest


def test_a_hard_link_is_a_file_of_the_directory(
    on_shelf: Any, tmp_path: Path, outside: Path
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        os.link(outside / "secret.safetensors", tmp_path / "x.safetensors")
        await shelf.settle()
        assert shelf.state("x") == "resident"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "circle", "no directory", "long"])
def test_what_is_no_file_is_rejected_and_holds_up_nothing(
    on_shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short

    def make(name: str) -> None:
        path = tmp_path / name
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
                unix.bind(name)
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to(
                {"circle": name, "no directory": "a.safetensors/b", "long": 300 * "x"}[kind]
            )

    make("x.safetensors")

    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        make("y.safetensors")
        await shelf.settle()
        for name in "xy":
            (reason,) = [v.reason for v in shelf.store.list() if v.name == name]
            assert reason and str(tmp_path) not in reason
        shelf.write("b")
        await shelf.settle()
        assert shelf.state("a") == "found" and shelf.state("b") == "resident"


def test_a_file_that_turns_into_a_fifo_once_it_was_scanned_does_not_block(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(NotADelta, match="expected a regular file"):
        open_inside(tmp_path, "x.safetensors")
    assert not [
        path for path in map(opened, os.listdir("/proc/self/fd")) if "x.safetensors" in path
    ]


def opened(descriptor: str) -> str:
    """Return the path of what is open; of the list itself, which is closed again, none."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_names_that_no_client_can_write_hold_up_nothing(
    running: Running, make_adapter: MakeAdapter
) -> None:
    payload = (running.directory / "a1.safetensors").read_bytes()
    for name in ("\udcff", "new\nline", "\x1b[31m", "at@name"):  # the first is no UTF-8
        (running.directory / f"{name}.safetensors").write_bytes(payload)
    write_delta(running.directory / "last.safetensors", make_adapter(9))
    eventually(lambda: running.state("last") == "resident")
    eventually(lambda: running.state("at@name").startswith("rejected"))
    listed = {adapter.name: adapter.reason for adapter in running.client.adapters()}
    assert listed.keys() == {"a1", "a2", "a3", "a4", "last", "at@name"}
    assert listed["at@name"] == "expected a name without @, which begins a digest"


NAMES = "../a1 a/b ./a1 . .. .hidden a1\0 \0 \u0430\u0031 a1\u200b".split(" ")
NAMES += ["", "a" * 5000]


def test_names_of_no_file_are_not_found_whoever_asks(running: Running) -> None:
    payload = (running.directory / "a1.safetensors").read_bytes()
    (running.directory / ".hidden.safetensors").write_bytes(payload)
    (running.directory.parent / "a1.safetensors").write_bytes(payload)
    client = running.client
    asks: list[Callable[[str], object]] = [
        running.admin.load,
        client.adapter,
        running.admin.unload,
        lambda adapter: client.generate("x", adapter=adapter),
    ]
    for name in NAMES:
        for ask in asks if name else asks[:-1]:  # no name is the base's
            assert refused(partial(ask, name), running) == grpc.StatusCode.NOT_FOUND


def test_forged_versions_are_not_found(running: Running) -> None:
    digests = {}
    for name in ("a1", "a2"):
        running.client.generate("x", adapter=name, sampling=SHORT)
        digests[name] = running.client.adapter(name).digest
    own = digests["a1"]
    forged = [
        f"a1@{digests['a2']}",
        f"a1@{own[:11]}",
        f"a1@{own[:-1]}{'1' if own[-1] == '0' else '0'}",
        f"a1@{own}0",
        f"a1@{own.upper()}",
        f"a1@{own} ",
        f"a1@@{own}",
        f"a1@{own}@",
        f"@{own}",
        own,
        "a1@",
        f"a1@{12 * '%'}",
    ]
    client = running.client
    asks: list[Callable[[str], object]] = [
        running.admin.load,
        client.adapter,
        lambda adapter: client.generate("x", adapter=adapter),
    ]
    for adapter in forged:
        for ask in asks:
            assert refused(partial(ask, adapter), running) == grpc.StatusCode.NOT_FOUND
    assert all(version.leases == 0 for version in running.server.store.list())
    played = running.client.generate("x", adapter=f"a1@{own[:12]}", sampling=SHORT).adapter
    assert played == f"a1@{own}"


def refused(call: Callable[[], object], running: Running) -> grpc.StatusCode:
    """Return a refusal's code; its text names no path of the server's."""
    with pytest.raises(ClientError) as caught:
        call()
    assert str(running.directory.parent) not in str(caught.value)
    return caught.value.code
