"""Adapters move between disk, host and device; names lead to versions, leases hold them."""

import asyncio
import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from spieldose_server.errors import NoRoom, RejectedAdapter, UnknownAdapter, UnreadableAdapter
from spieldose_server.files import AdapterFiles, FileChanged
from spieldose_server.stamp import Stamp
from spieldose_server.store import Lease, Watcher
from spieldose_server.threads import LOADERS
from spieldose_server.versions import Version

from .shelf import ENTRIES, ONE, SPEC, Shelf


def test_at_start_headers_are_read_and_nothing_is_held(on_shelf: Any) -> None:
    @on_shelf("a", "b", "c")
    async def _(shelf: Shelf) -> None:
        assert [shelf.state(name) for name in "abc"] == ["found"] * 3
        version = shelf.store.get("a")
        assert version.description is not None and version.description.nnz == ENTRIES
        assert version.digest == ""
        assert shelf.residency.host_bytes == 0
        assert shelf.slab.arena.free_bytes == shelf.slab.budget


def test_ten_thousand_idle_adapters_are_listed_and_cost_no_tensor_memory(
    on_shelf: Any, tmp_path: Path
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        for i in range(10_000):
            os.link(tmp_path / "a.safetensors", tmp_path / f"b{i}.safetensors")
        await shelf.directory.take_up()
        assert len(shelf.store.list()) == 10_001
        assert shelf.residency.host_bytes == 0
        assert (await shelf.use("b9999")).name == "b9999"


def test_the_least_recently_used_leaves_for_the_next(on_shelf: Any) -> None:
    @on_shelf("a", "b", "c")
    async def _(shelf: Shelf) -> None:
        for name in ("a", "b", "a", "c"):
            await shelf.use(name)
        assert [shelf.state(name) for name in "abc"] == ["resident", "on host", "resident"]
        assert shelf.residency.evictions == 1


def test_what_is_leased_stays_and_the_first_that_was_read_gets_room_first(on_shelf: Any) -> None:
    @on_shelf("a", "b", "c", "d")
    async def _(shelf: Shelf) -> None:
        order: list[str] = []

        async def take(name: str) -> None:
            await shelf.use(name)
            order.append(name)

        with shelf.store.lease("a") as a, shelf.store.lease("b") as b:
            await ready(a, b)
            waiting = []
            for name in "cd":
                waiting.append(asyncio.create_task(take(name)))
                while not shelf.store.get(name).on_host:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert order == [] and shelf.state("c") == "loading"
            assert [shelf.state(name) for name in "ab"] == ["resident"] * 2
        await asyncio.gather(*waiting)
        assert order == ["c", "d"]


def test_a_large_adapter_that_waits_is_not_overtaken_by_small_ones(on_shelf: Any) -> None:
    @on_shelf("a", "b", "c", slots=8, room=3)
    async def _(shelf: Shelf) -> None:
        with shelf.store.lease("c") as c:
            await ready(c)
            with shelf.store.lease("b") as b:
                await ready(b)
                with shelf.store.lease("a") as a:
                    await ready(a)
                    shelf.write("large", entries=2 * ENTRIES)
                    shelf.write("small", entries=ENTRIES // 2)
                    await shelf.settle()
                    large = asyncio.create_task(shelf.use("large"))
                    await asyncio.sleep(0.1)
                    small = asyncio.create_task(shelf.use("small"))
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.1)
                assert not large.done() and not small.done()
            await large
        await small


def test_whoever_gives_up_waiting_does_not_hold_up_the_next(on_shelf: Any) -> None:
    @on_shelf("a", "b", "c", slots=1)
    async def _(shelf: Shelf) -> None:
        with shelf.store.lease("a") as a:
            await ready(a)
            gives_up = asyncio.create_task(shelf.use("b"))
            await asyncio.sleep(0.1)
            waits = asyncio.create_task(shelf.use("c"))
            await asyncio.sleep(0.1)
            gives_up.cancel()
        await waits
        assert shelf.state("c") == "resident"
        assert shelf.residency.evictions == 1  # of a; b never came
        assert all(version.leases == 0 for version in shelf.store.list())


def test_two_requests_for_one_adapter_load_it_once(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        first, second = await asyncio.gather(shelf.use("a"), shelf.use("a"))
        assert first is second
        assert len(shelf.slab._extents) == 1


def test_a_pinned_adapter_is_not_evicted_until_it_is_unpinned(on_shelf: Any) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        await shelf.use("a")
        shelf.store.pin("a", pinned=True)
        with pytest.raises(NoRoom, match=r"adapter 'b': expected .* beside 1 pinned adapters, got"):
            await shelf.use("b")
        assert shelf.state("a") == "resident"
        shelf.store.pin("a", pinned=False)
        await shelf.use("b")
        assert shelf.state("a") == "on host"


def test_what_pinned_adapters_leave_no_room_for_holds_up_nothing_smaller(on_shelf: Any) -> None:
    @on_shelf("pinned", "small", slots=8, room=3)
    async def _(shelf: Shelf) -> None:
        await shelf.use("pinned")
        await shelf.use("small")
        shelf.store.pin("pinned", pinned=True)
        shelf.write("large", entries=3 * ENTRIES)
        await shelf.settle()
        with pytest.raises(NoRoom):
            await asyncio.wait_for(shelf.use("large"), 5)
        assert shelf.state("small") == "resident"  # nobody left in vain
        shelf.write("other", seed=3)
        await shelf.settle()
        await asyncio.wait_for(shelf.use("other"), 5)


def test_a_pinned_adapter_that_is_replaced_leaves_its_room_to_the_next_version(
    on_shelf: Any,
) -> None:
    @on_shelf("a", slots=1)
    async def _(shelf: Shelf) -> None:
        shelf.store.pin("a", pinned=True)
        with shelf.store.lease("a") as held:
            await ready(held)
            held.version.playing += 1
            shelf.write("a", seed=7)
            await shelf.settle()
            new = asyncio.create_task(shelf.use("a"))
            await asyncio.sleep(0.1)
            assert not new.done()
            held.version.playing -= 1
        assert (await new).pinned


def test_the_same_content_read_again_is_held_once(on_shelf: Any) -> None:
    @on_shelf("a", "b", slots=8, room=8)
    async def _(shelf: Shelf) -> None:
        version = await shelf.use("a")
        held = shelf.slab.arena.free_bytes, shelf.residency.host_bytes
        with shelf.store.watching() as watcher:
            for _ in range(3):
                await shelf.directory.load("a")
                os.utime(shelf.path / "a.safetensors")
                await shelf.settle()
            shelf.store.close()
            news = [(told, gone) async for told, gone in watcher]
        assert (shelf.slab.arena.free_bytes, shelf.residency.host_bytes) == held
        assert await shelf.use("a") is version
        assert {told.name for told, gone in news if not gone} == {"a", "b"}
        assert [told for told, gone in news if gone] == []  # never told of, never gone


def test_a_rewrite_of_the_same_size_whose_time_was_set_back_is_noticed(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        file = shelf.path / "a.safetensors"
        old, before = await shelf.use("a"), file.stat()
        shelf.write("other", seed=7)
        with open(file, "r+b") as opened:
            opened.write((shelf.path / "other.safetensors").read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_ino == before.st_ino and file.stat().st_size == before.st_size
        await shelf.settle()
        assert (await shelf.use("a")).digest != old.digest


def test_a_rejected_version_is_gone_once_a_good_file_takes_its_place(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        file = shelf.path / "b.safetensors"
        file.write_bytes(b"no delta at all")
        await shelf.settle()
        rejected = shelf.store.get("b")
        watcher, told = Watcher(), []
        shelf.store._watchers.add(watcher)
        watcher.tell(rejected, gone=False)

        async def follow() -> None:
            told.extend([(v, gone) async for v, gone in watcher])

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.05)
        shelf.write("b")
        await shelf.settle()
        shelf.store.close()
        await following
        assert (rejected, True) in told


def test_a_file_that_changes_while_it_is_loaded_by_call_is_said_to(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        def changes(*_: object) -> None:
            raise FileChanged

        shelf.directory._files.read = changes  # type: ignore[method-assign]
        with pytest.raises(UnreadableAdapter, match=r"file at rest, got a\.safetensors changing"):
            await shelf.directory.load("a")


def test_a_bad_replacement_of_what_is_in_no_memory_is_said_to_be_bad(
    on_shelf: Any, tmp_path: Path
) -> None:
    @on_shelf("a", "b", slots=1, host=0.01)
    async def _(shelf: Shelf) -> None:
        await shelf.use("a")
        await shelf.use("b")
        assert shelf.state("a") == "found"
        (tmp_path / "a.safetensors").write_bytes(b"no delta at all")
        waits = asyncio.create_task(shelf.use("a"))  # the directory has not looked yet
        await asyncio.sleep(0.1)
        shelf.write("c")  # and others come meanwhile
        await shelf.settle()
        for use in (waits, shelf.use("a")):
            with pytest.raises(RejectedAdapter, match="expected a safetensors file"):
                await use
        assert shelf.state("a") == "rejected"
        shelf.write("a")
        await shelf.settle()
        assert (await shelf.use("a")).digest


@pytest.mark.parametrize("part", ["read", "put"])
def test_a_load_goes_on_when_who_called_for_it_goes_away(on_shelf: Any, part: str) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        begun, go_on = threading.Event(), threading.Event()
        owner: Any = shelf.directory._files if part == "read" else shelf.slab
        work = getattr(owner, part)

        def slow(*arguments: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return work(*arguments)

        setattr(owner, part, slow)
        await shelf.directory.unload("a")
        call = asyncio.create_task(shelf.directory.load("a"))
        assert await asyncio.to_thread(begun.wait, 10)
        call.cancel()
        await asyncio.wait([call])
        go_on.set()
        while shelf.state("a") != "resident":
            await asyncio.sleep(0.02)
        await shelf.use("b")  # there is no slot that nobody owns
        assert (shelf.state("a"), shelf.state("b")) == ("on host", "resident")


def test_a_copy_that_fails_gives_its_room_back(on_shelf: Any, monkeypatch: Any) -> None:
    @on_shelf("a", slots=1)
    async def _(shelf: Shelf) -> None:
        def fails(*_: object) -> None:
            raise RuntimeError("no copy")

        free = shelf.slab.arena.free_bytes
        with monkeypatch.context() as broken:
            broken.setattr(shelf.slab, "_write", fails)
            with pytest.raises(RuntimeError, match="no copy"):
                await shelf.use("a")
        assert shelf.slab.arena.free_bytes == free
        assert (await shelf.use("a")).slot is not None


def test_what_nobody_waits_for_any_more_is_not_read(on_shelf: Any) -> None:
    @on_shelf(*"abcdefgh")
    async def _(shelf: Shelf) -> None:
        begun, go_on, read = threading.Semaphore(0), threading.Event(), []
        work = shelf.directory._files.read

        def slow(name: str, *arguments: Any) -> Any:
            read.append(name)
            begun.release()
            assert go_on.wait(10)
            return work(name, *arguments)

        shelf.residency._files.read = slow  # type: ignore[method-assign]
        tasks = [asyncio.create_task(shelf.use(name)) for name in "abcdefgh"]
        for _ in range(LOADERS):
            assert await asyncio.to_thread(begun.acquire, True, 10)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        go_on.set()
        while shelf.residency._loads:
            await asyncio.sleep(0.02)
        assert len(read) == LOADERS


def test_removed_files_count_while_many_are_read(
    on_shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_shelf("gone")
    async def _(shelf: Shelf) -> None:
        monkeypatch.setattr("spieldose_server.directory.RESCAN_MILLISECONDS", 0)  # after each file
        work, read, go_on = shelf.directory._files.read, [], threading.Event()

        def slow(name: str, *arguments: Any) -> Any:
            read.append(name)
            assert go_on.wait(10)
            return work(name, *arguments)

        shelf.directory._files.read = slow  # type: ignore[method-assign]
        for number in range(8):
            shelf.write(f"new{number}", seed=number)
        taken = asyncio.create_task(shelf.settle())
        while not read:
            await asyncio.sleep(0.01)
        (tmp_path / "gone.safetensors").unlink()
        go_on.set()
        while shelf.state("gone"):
            await asyncio.sleep(0.01)
        assert len(read) < 4
        await taken
        assert len(read) == 8


def test_a_file_that_is_back_as_it_was_has_nothing_to_settle(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a", "b")
    async def _(shelf: Shelf) -> None:
        link = tmp_path / "x.safetensors"
        link.symlink_to("a.safetensors")
        await shelf.settle()
        (tmp_path / "to-b").symlink_to("b.safetensors")
        (tmp_path / "to-b").rename(link)
        assert await shelf.directory.reconcile()
        (tmp_path / "to-a").symlink_to("a.safetensors")
        (tmp_path / "to-a").rename(link)
        assert not await shelf.directory.reconcile()


def test_a_slot_that_is_played_is_not_freed_even_if_nobody_leases_it(on_shelf: Any) -> None:
    @on_shelf("a", slots=1)
    async def _(shelf: Shelf) -> None:
        version = await shelf.use("a")
        version.playing = 1
        assert not shelf.residency._evict()
        version.playing = 0
        assert shelf.residency._evict()


def test_a_pin_outlives_the_version(on_shelf: Any) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        shelf.store.pin("a", pinned=True)
        old = await shelf.use("a")
        shelf.write("a", seed=7)
        await shelf.settle()
        new = await shelf.use("a")
        assert new is not old and new.pinned and old.slot is None


def test_host_memory_keeps_to_its_budget_and_lost_copies_are_read_again(on_shelf: Any) -> None:
    @on_shelf(*"abcd", slots=1, host=1.5)
    async def _(shelf: Shelf) -> None:
        digests = []
        for name in "abcdabcd":
            digests.append((await shelf.use(name)).digest)
            assert 0 < shelf.residency.host_bytes <= 1.5 * ONE
        assert digests[:4] == digests[4:] and len(set(digests)) == 4
        assert shelf.state("a") == "found"


def test_an_adapter_larger_than_all_the_memory_is_rejected(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        shelf.slab.arena = type(shelf.slab.arena)(1024, torch.device("cpu"))
        with pytest.raises(RejectedAdapter, match="expected an adapter that takes at most 1024"):
            await shelf.use("a")
        assert shelf.state("a") == "rejected"


def test_a_file_that_turns_out_bad_at_its_first_use_is_rejected(
    on_shelf: Any, tmp_path: Path
) -> None:
    @on_shelf("a", "b")
    async def _(shelf: Shelf) -> None:
        file = tmp_path / "a.safetensors"
        payload = bytearray(file.read_bytes())
        payload[-4:] = b"\xff" * 4  # what is wrong with the last columns, no header tells
        file.write_bytes(payload)
        os.utime(file, (1e9, 1e9))
        shelf.directory._taken.clear()
        await shelf.directory.take_up()
        assert shelf.state("a") == "found"
        for _ in range(2):
            with pytest.raises(RejectedAdapter, match="expected indices below 64"):
                await shelf.use("a")
        assert (await shelf.use("b")).name == "b"


def test_a_version_replaced_before_it_was_loaded_gives_way_to_the_newest(on_shelf: Any) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        with shelf.store.lease("b") as b:
            await ready(b)
            waits = asyncio.create_task(shelf.use("a"))
            await asyncio.sleep(0.1)
            shelf.write("a", seed=9)
            await shelf.settle()
        got = await waits
        assert got is shelf.store.get("a")
        assert shelf.state("a") == "resident"


def test_a_file_replaced_unseen_is_noticed_when_it_is_read(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        shelf.write("a", seed=9)  # the directory has not looked yet
        waits = asyncio.create_task(shelf.use("a"))
        await asyncio.sleep(0.1)
        await shelf.settle()
        assert (await waits) is shelf.store.get("a")


def test_a_file_overwritten_without_a_trace_is_not_taken_for_the_version_it_was(
    on_shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_shelf("a", "b", slots=1, host=0.01)
    async def _(shelf: Shelf) -> None:
        def traceless(kind: type[Stamp], status: os.stat_result) -> Stamp:
            return kind(status.st_ino, status.st_size, status.st_mtime_ns, 0)

        monkeypatch.setattr(Stamp, "of", classmethod(traceless))  # as some file systems are
        await shelf.directory.load("a")
        await shelf.use("a")
        file = tmp_path / "a.safetensors"
        payload = file.read_bytes().replace(b"random", b"modnar")
        file.write_bytes(payload)
        os.utime(file, (1e9, 1e9))
        await shelf.settle()
        await shelf.use("b")
        monkeypatch.setattr("spieldose_server.store.NOTICE_SECONDS", 0.1)
        with pytest.raises(UnreadableAdapter):
            await shelf.use("a")
        await shelf.directory.load("a")
        assert (await shelf.use("a")).digest == hashlib.sha256(payload).hexdigest()


def test_what_changes_while_it_is_read_is_not_taken(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        files = AdapterFiles(tmp_path, SPEC, dtype=torch.float32)
        stamp = files.scan()["a"]
        shelf.write("a", seed=3)
        for read in (files.read, files.describe):
            with pytest.raises(FileChanged):
                read("a", stamp)


def test_a_removed_file_fails_only_those_who_still_wait(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        with shelf.store.lease("b") as b:
            await ready(b)
            b.version.playing += 1
            awaited = shelf.store.get("a")
            waits = asyncio.create_task(shelf.use("a"))
            await asyncio.sleep(0.1)
            for name in "ab":
                (tmp_path / f"{name}.safetensors").unlink()
            await shelf.settle()
            with pytest.raises(UnknownAdapter):
                await waits
            assert awaited.leases == 0
            assert shelf.state("b") == "draining" and b.version.slot is not None
            b.version.playing -= 1
        assert shelf.store.list() == []
        assert shelf.slab.arena.free_bytes == shelf.slab.budget


def test_a_digest_names_that_version_or_none(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        first = await shelf.use("a")
        for digest in (first.digest, first.digest[:12]):
            assert await shelf.use(f"a@{digest}") is first
        shelf.write("a", seed=5)
        await shelf.settle()
        second = await shelf.use("a")
        assert await shelf.use(f"a@{second.digest}") is second
        for unknown in (f"a@{first.digest}", f"a@{second.digest[:11]}", "a@", "b@" + first.digest):
            with pytest.raises(UnknownAdapter):
                await shelf.use(unknown)


def test_a_digest_is_checked_even_before_the_file_was_ever_read(on_shelf: Any) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        with pytest.raises(UnknownAdapter):
            await shelf.use("a@" + "0" * 64)
        assert shelf.store.get("a").leases == 0


def test_the_same_content_again_is_the_same_version(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a", slots=1, host=0.01)
    async def _(shelf: Shelf) -> None:
        before = await shelf.use("a")
        shutil.copy(tmp_path / "a.safetensors", tmp_path / "x")
        (tmp_path / "x").rename(tmp_path / "a.safetensors")
        await shelf.settle()
        assert shelf.store.get("a") is before and shelf.state("a") == "resident"
        shelf.write("b", seed=3)
        await shelf.settle()
        await shelf.use("b")
        assert await shelf.use("a") is before  # read anew, from the file as it is now


@pytest.mark.parametrize("seconds", [-3600, 0, 3600])
def test_a_replacement_is_seen_whatever_the_clock_of_its_file_system(
    on_shelf: Any, tmp_path: Path, seconds: int
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        before = await shelf.use("a")
        time = (tmp_path / "a.safetensors").stat().st_mtime
        shelf.write("a", seed=5)
        os.utime(tmp_path / "a.safetensors", (time + seconds,) * 2)
        await shelf.settle()
        assert await shelf.use("a") is not before


def test_renaming_a_file_renames_the_adapter(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        before = await shelf.use("a")
        (tmp_path / "a.safetensors").rename(tmp_path / "z.safetensors")
        await shelf.settle()
        assert (await shelf.use("z")).digest == before.digest
        assert shelf.state("a") == ""


def test_a_link_leads_to_the_file_it_names_now(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a", "b")
    async def _(shelf: Shelf) -> None:
        link = tmp_path / "newest.safetensors"
        link.symlink_to("a.safetensors")
        await shelf.settle()
        assert (await shelf.use("newest")).digest == (await shelf.use("a")).digest
        link.unlink()
        link.symlink_to("b.safetensors")
        await shelf.settle()
        assert (await shelf.use("newest")).digest == (await shelf.use("b")).digest
        (tmp_path / "dangling.safetensors").symlink_to("nowhere")
        await shelf.settle()
        assert shelf.state("dangling") == ""


def test_while_the_directory_is_gone_what_was_read_is_served(
    on_shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        before = await shelf.use("a")
        tmp_path.rename(tmp_path.with_name("away"))
        await shelf.settle()
        assert await shelf.use("a") is before
        monkeypatch.setattr("spieldose_server.store.NOTICE_SECONDS", 0.1)
        with pytest.raises(UnreadableAdapter):
            await shelf.use("b")
        tmp_path.with_name("away").rename(tmp_path)
        await shelf.settle()
        assert (await shelf.use("b")).name == "b"


def test_watching_tells_what_there_is_and_what_becomes_of_it(on_shelf: Any, tmp_path: Path) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        seen: list[tuple[str, str]] = []

        async def watch() -> None:
            with shelf.store.watching() as watcher:
                async for version, gone in watcher:
                    seen.append((version.name, "gone" if gone else version.state.value))

        task = asyncio.create_task(watch())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == [("a", "found")]
        await shelf.use("a")
        (tmp_path / "a.safetensors").unlink()
        await shelf.settle()
        await asyncio.sleep(0.05)
        assert ("a", "resident") in seen
        assert seen[-1] == ("a", "gone")
        shelf.write("b")
        await shelf.settle()
        assert [state for name, state in seen if name == "b"][:1] == ["validating"]
        shelf.store.close()
        await task


def test_who_does_not_keep_up_is_not_told_of_versions_that_came_and_went() -> None:
    watcher, (a, b, c) = Watcher(), (Version(name=name) for name in "abc")

    async def follow() -> None:
        watcher.tell(a, gone=False)
        watcher.tell(b, gone=False)
        seen = []
        async for version, gone in watcher:
            seen.append((version, gone))
            if len(seen) == 1:
                watcher.tell(b, gone=True)  # on its way: it has to be told that, too
                for _ in range(1000):
                    watcher.tell(passing := Version(name="passing"), gone=False)
                    watcher.tell(passing, gone=True)
                watcher.tell(c, gone=False)
                watcher.close()
                assert len(watcher._news) == 2
        assert seen == [(a, False), (b, False), (b, True), (c, False)]

    asyncio.run(follow())


async def ready(*leases: Lease | None) -> None:
    """Wait for adapters to be on the device."""
    for lease in leases:
        assert lease is not None
        await lease.ready()
