"""Turns are fair between tenants and adapters, and what is too much is turned away."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from spieldose_server.admission import Admission, Limits, Tenant
from spieldose_server.errors import Busy
from spieldose_server.store import AdapterStore, Lease
from spieldose_server.threads import LOADERS

from .shelf import Shelf

DEFAULTS: dict[str, Any] = {
    "running": 1,
    "accepted": 1000,
    "tenant_running": 1000,
    "tenant_accepted": 1000,
    "tenant_tokens_per_second": 0.0,
}


class NoSlots:
    """Stand where nothing but the base is played."""

    def dismiss_by(self, dismiss: object) -> None:
        """Dismiss nobody."""


class Hall:
    """Requests that take their turns and are served so many tokens."""

    def __init__(self, residency: Any = None, *, pause: float = 0.0, **limits: Any) -> None:
        """Take, beside limits, the seconds of a switch: a loop that spins starves the loader."""
        self.admission = Admission(Limits(**DEFAULTS | limits), residency or NoSlots())
        self.order: list[str] = []
        self.most = 0  # at once
        self._pause = pause

    async def ask(
        self, tenant: str, lease: Lease | None = None, *, cost: int = 10, name: str = ""
    ) -> None:
        """Come, wait, be served over three switches of tasks, go."""
        with self.admission.accept(tenant) as accepted:
            await self.serve(accepted, lease, cost=cost, name=name or tenant)

    async def serve(self, tenant: Tenant, lease: Lease | None, *, cost: int, name: str) -> None:
        async with self.admission.turn(tenant, lease, tokens=cost) as turn:
            assert turn.version is None or turn.version.slot is not None
            self.order.append(name)
            self.most = max(self.most, self.admission.running)
            for _ in range(3):
                await asyncio.sleep(self._pause)
                assert turn.version is None or turn.version.slot is not None

    async def play(
        self, store: AdapterStore, name: str, *, tenant: str = "", cost: int = 1
    ) -> None:
        with self.admission.accept(tenant) as accepted, store.lease(name) as lease:
            await self.serve(accepted, lease, cost=cost, name=name)

    def at_rest(self) -> bool:
        """Say whether nothing is left of all requests."""
        admission = self.admission
        return (admission.running, admission.accepted, admission._tenants) == (0, 0, {})


def test_no_more_run_than_there_are_places() -> None:
    async def run() -> None:
        hall = Hall(running=3)
        await asyncio.gather(*(hall.ask("a") for _ in range(20)))
        assert hall.most == 3 and len(hall.order) == 20 and hall.at_rest()

    asyncio.run(run())


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    async def run() -> None:
        hall = Hall()
        await asyncio.gather(*map(hall.ask, ["flood"] * 100 + ["small"] * 10))
        last = len(hall.order) - hall.order[::-1].index("small")
        assert last <= 21, "the small tenant is served every other time"

    asyncio.run(run())


def test_places_that_come_free_together_go_to_different_tenants() -> None:
    async def run() -> None:
        hall = Hall(running=4)
        await asyncio.gather(*map(hall.ask, "aaaaaaaabbbbbbbbccccccccdddddddd"))
        later = hall.order[4:]  # the first find four places free, and nobody else there
        waves = [set(later[i : i + 4]) for i in range(0, 12, 4)]
        assert all(len(wave) >= 3 for wave in waves), hall.order

    asyncio.run(run())


def test_idle_time_is_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def run() -> None:
        nonlocal now
        hall = Hall(accepted=1)
        for _ in range(3):
            with hall.admission.accept("a") as tenant:
                async with hall.admission.turn(tenant, None, tokens=1):
                    now += 0.5
            now += 3600.0
        with hall.admission.accept("a") as tenant:
            async with hall.admission.turn(tenant, None, tokens=1):
                with pytest.raises(Busy) as busy, hall.admission.accept("b"):
                    pass
        assert 0.1 <= busy.value.retry <= 0.5

    asyncio.run(run())


def test_turns_are_counted_in_tokens_not_in_requests() -> None:
    async def run() -> None:
        hall = Hall()
        dear = (hall.ask("dear", cost=100) for _ in range(20))
        cheap = (hall.ask("cheap", cost=10) for _ in range(100))
        await asyncio.gather(*dear, *cheap)
        half = Counter(hall.order[:55])
        assert 4 <= half["dear"] <= 6  # 5 of 100 tokens, 50 of 10

    asyncio.run(run())


def test_what_is_generated_counts_too() -> None:
    async def run() -> None:
        hall, order = Hall(), []

        async def ask(name: str, generated: int) -> None:
            with hall.admission.accept(name) as tenant:
                async with hall.admission.turn(tenant, None, tokens=1) as turn:
                    order.append(name)
                    await asyncio.sleep(0)
                    turn.charge(generated)

        await asyncio.gather(
            *(ask("long", 99) for _ in range(20)), *(ask("short", 9) for _ in range(20))
        )
        assert Counter(order[:22])["short"] >= 18

    asyncio.run(run())


def test_who_was_away_neither_saved_turns_nor_shed_a_debt() -> None:
    async def run() -> None:
        hall = Hall()
        steady = [asyncio.create_task(hall.ask("steady")) for _ in range(60)]
        rests = [asyncio.create_task(hall.ask("rests")) for _ in range(3)]
        await asyncio.gather(*rests)
        while len(hall.order) < 30:
            await asyncio.sleep(0)
        begun = len(hall.order)
        late = [asyncio.create_task(hall.ask(name)) for name in ["rests"] * 10 + ["new"] * 10]
        await asyncio.gather(*steady, *late)
        after = Counter(hall.order[begun : begun + 30])
        assert all(9 <= after[name] <= 11 for name in ("steady", "rests", "new"))

        owes = Hall()
        others = [asyncio.create_task(owes.ask("other")) for _ in range(20)]
        await asyncio.sleep(0)
        await owes.ask("debtor", cost=1000)
        await asyncio.gather(owes.ask("debtor"), *others)
        assert owes.order[-1] == "debtor"

    asyncio.run(run())


def test_too_many_requests_are_turned_away_and_told_when_to_come_back() -> None:
    async def run() -> None:
        hall = Hall(accepted=5, tenant_accepted=3)
        tasks = [asyncio.create_task(hall.ask("a")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="at most 3 requests of a tenant") as caught:
            await hall.ask("a")
        assert caught.value.retry > 0
        tasks += [asyncio.create_task(hall.ask("b")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="at most 5 requests at once"):
            await hall.ask("c")
        await asyncio.gather(*tasks)
        await hall.ask("c")
        assert len(hall.order) == 6 and hall.at_rest()

    asyncio.run(run())


def test_a_tenant_runs_no_more_than_it_may_and_leaves_the_rest_to_others() -> None:
    async def run() -> None:
        hall, running = Hall(running=4, tenant_running=2), Counter[str]()

        async def ask(name: str) -> None:
            with hall.admission.accept(name) as tenant:
                async with hall.admission.turn(tenant, None, tokens=1):
                    running[name] += 1
                    assert running[name] <= 2
                    await asyncio.sleep(0)
                    running[name] -= 1

        await asyncio.gather(*(ask("a") for _ in range(10)), *(ask("b") for _ in range(10)))

    asyncio.run(run())


def test_a_tenant_that_used_up_its_tokens_is_told_when_there_are_more() -> None:
    async def run() -> None:
        hall = Hall(tenant_tokens_per_second=100.0)
        await hall.ask("a", cost=1010)  # ten seconds' worth, and a little more
        with pytest.raises(Busy, match="at most 100 tokens a second") as caught:
            await hall.ask("a")
        assert 0 < caught.value.retry <= 0.1
        await hall.ask("b")
        await asyncio.sleep(0.15)
        await hall.ask("a")

    asyncio.run(run())


def test_one_that_stops_waiting_leaves_nothing_behind() -> None:
    async def run() -> None:
        hall = Hall()
        tasks = [asyncio.create_task(hall.ask("a")) for _ in range(50)]
        for victim in tasks[1::2]:
            await asyncio.sleep(0)
            victim.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in done) >= 20
        assert hall.at_rest()

    asyncio.run(run())


def test_one_cancelled_just_before_its_turn_takes_no_place() -> None:
    async def run() -> None:
        hall = Hall()
        with hall.admission.accept("a") as tenant:
            async with hall.admission.turn(tenant, None, tokens=1):
                waits = asyncio.create_task(hall.ask("b"))
                await asyncio.sleep(0)
                waits.cancel()  # and its turn comes before its task can run
        await asyncio.wait([waits])
        assert waits.cancelled()
        await asyncio.wait_for(hall.ask("c"), 5)
        assert hall.order == ["c"] and hall.at_rest()

    asyncio.run(run())


def test_one_cancelled_just_before_its_adapter_leaves_holds_nobody_up(
    on_shelf: Callable[..., Any],
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency)
        await shelf.use("a")
        with hall.admission.accept("") as tenant:
            async with hall.admission.turn(tenant, None, tokens=1):
                waits = asyncio.create_task(hall.play(shelf.store, "a"))
                await asyncio.sleep(0.05)
                waits.cancel()
                shelf.store.retire("a")
        await asyncio.wait([waits])
        assert waits.cancelled() and hall.at_rest()
        assert shelf.store.list() == []


def test_adapters_of_a_tenant_and_the_base_take_turns(on_shelf: Callable[..., Any]) -> None:
    @on_shelf("a", "b", slots=2)
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency)
        names = ["a"] * 30 + ["b"] * 10 + [""] * 10
        for name in "ab":
            await shelf.use(name)
        await asyncio.gather(*(hall.play(shelf.store, name) for name in names))
        first = Counter(hall.order[:30])
        assert all(9 <= first[name] <= 11 for name in ("a", "b", ""))
        assert hall.at_rest()


def test_what_loads_blocks_nobody(on_shelf: Callable[..., Any]) -> None:
    @on_shelf("a", "b", "c")
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency)
        await shelf.use("a")
        gate = threading.Event()
        for _ in range(LOADERS):  # loads that take their time
            shelf.residency._workers.submit(gate.wait, 60)
        waits = asyncio.create_task(hall.play(shelf.store, "b"))
        await asyncio.sleep(0.05)
        for name in ("a", "", "a"):
            await hall.play(shelf.store, name)
        assert hall.order == ["a", "", "a"]
        gate.set()
        await waits


@pytest.mark.parametrize("slots", [1, 2])
def test_steady_streams_do_not_keep_a_waiting_adapter_out(
    on_shelf: Callable[..., Any],
    slots: int,
) -> None:
    @on_shelf("a", "b", "c", "d", slots=slots)
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency, running=4, pause=0.001)
        stop = asyncio.Event()

        async def stream(name: str) -> None:
            while not stop.is_set():
                await hall.play(shelf.store, name)

        streams = [asyncio.create_task(stream(name)) for name in "ab" for _ in range(5)]
        await asyncio.sleep(0.2)
        for name in "cdcd":
            await asyncio.wait_for(hall.play(shelf.store, name), 30)
        played = Counter(hall.order)
        stop.set()
        await asyncio.gather(*streams)
        assert played["a"] > 0 and played["b"] > 0
        assert hall.at_rest()
        assert all(version.leases == version.playing == 0 for version in shelf.store.list())


def test_who_waited_on_a_replaced_version_plays_the_newest(on_shelf: Callable[..., Any]) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        hall, order = Hall(shelf.residency), []

        async def play() -> None:
            with hall.admission.accept("") as tenant, shelf.store.lease("a") as lease:
                async with hall.admission.turn(tenant, lease, tokens=1) as turn:
                    order.append(turn.version)
                    while len(order) == 1 and shelf.store.get("a") is order[0]:
                        await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(play()) for _ in range(3)]
        while not order:
            await asyncio.sleep(0.01)
        shelf.write("a", seed=9)
        await shelf.settle()
        await asyncio.gather(*tasks)
        assert order[0] is not order[1] and order[1] is order[2] is shelf.store.get("a")
        assert order[0].slot is None


def test_an_adapter_that_is_new_among_busy_ones_gets_every_other_turn(
    on_shelf: Callable[..., Any],
) -> None:
    @on_shelf("a")
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency)
        busy = [asyncio.create_task(hall.play(shelf.store, "a")) for _ in range(40)]
        while len(hall.order) < 20:
            await asyncio.sleep(0)
        late = [asyncio.create_task(hall.play(shelf.store, "")) for _ in range(20)]
        await asyncio.gather(*busy, *late)
        assert 4 <= Counter(hall.order[20:30])[""] <= 6


def test_no_adapter_has_to_leave_before_it_has_played(on_shelf: Callable[..., Any]) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency)
        with hall.admission.accept("") as tenant:
            async with hall.admission.turn(tenant, None, tokens=1):
                waiting = [asyncio.create_task(hall.play(shelf.store, "a"))]
                while (version := shelf.store.get("a")).slot is None:
                    await asyncio.sleep(0.01)
                waiting.append(asyncio.create_task(hall.play(shelf.store, "b")))
                await asyncio.sleep(0.2)
                assert version.slot is not None and not version.leaving
        await asyncio.gather(*waiting)
        assert hall.order == ["a", "b"]


def test_one_that_left_because_it_was_asked_to_was_evicted(on_shelf: Callable[..., Any]) -> None:
    @on_shelf("a", "b", slots=1)
    async def _(shelf: Shelf) -> None:
        loads: list[float] = []
        shelf.residency.loaded = loads.append
        hall = Hall(shelf.residency, pause=0.001)

        async def go_on() -> None:
            while "b" not in hall.order:
                await hall.play(shelf.store, "a")

        busy = [asyncio.create_task(go_on()) for _ in range(3)]  # somebody always needs it
        while len(hall.order) < 3:
            await asyncio.sleep(0)
        await asyncio.gather(hall.play(shelf.store, "b"), *busy)
        assert shelf.residency.evictions == len(loads) - 1 >= 1


def test_an_adapter_asked_to_leave_may_stay_if_there_is_room_after_all(
    on_shelf: Callable[..., Any],
) -> None:
    @on_shelf("a", "b", "c", slots=2)
    async def _(shelf: Shelf) -> None:
        hall = Hall(shelf.residency, running=9)
        ends = {name: asyncio.Event() for name in "ab"}

        async def hold(name: str) -> None:
            with hall.admission.accept("") as tenant, shelf.store.lease(name) as lease:
                async with hall.admission.turn(tenant, lease, tokens=1):
                    await ends[name].wait()

        holds = []
        for name in "ab":
            holds.append(asyncio.create_task(hold(name)))
            await asyncio.sleep(0.05)
        waits = asyncio.create_task(hall.play(shelf.store, "c"))
        await asyncio.sleep(0.05)
        assert shelf.store.get("a").leaving
        ends["b"].set()
        await waits
        assert not shelf.store.get("a").leaving
        await asyncio.wait_for(hall.play(shelf.store, "a"), 5)
        ends["a"].set()
        await asyncio.gather(*holds)
