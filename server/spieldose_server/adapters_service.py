"""The gRPC service that shows and steers adapters."""

from collections.abc import AsyncIterator

from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server import wire
from spieldose_server.access import CALLER
from spieldose_server.directory import AdapterDirectory
from spieldose_server.errors import InvalidRequest, UnknownAdapter
from spieldose_server.statuses import Context, answering
from spieldose_server.store import AdapterStore

PAGE_SIZE = 1000  # of at most 3.3 kB each, a name and three texts: below gRPC's 4 MiB


class AdaptersService(rpc.AdaptersServicer):
    """Show, load and unload adapters."""

    def __init__(self, store: AdapterStore, directory: AdapterDirectory) -> None:
        self._store = store
        self._directory = directory

    async def List(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """Return a page of the versions that the caller may know of."""
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE)
        caller, after = CALLER.get(), request.page_token
        rest = [v for v in self._store.list() if v.name > after and caller.may_see(v.name)]
        last = rest[size - 1].name if len(rest) > size else ""
        page = [version for version in rest if version.name <= last] if last else rest
        return pb.ListAdaptersResponse(
            adapters=map(wire.adapter, page),
            next_page_token=last if len(page) < len(rest) else "",
        )

    async def Get(self, request: pb.GetAdapterRequest, context: Context) -> pb.Adapter:
        """Return one adapter."""
        async with answering(context):
            CALLER.get().check_see(request.adapter_id)
            return wire.adapter(self._store.get(request.adapter_id))
        raise AssertionError("aborted")

    async def Load(self, request: pb.LoadAdapterRequest, context: Context) -> pb.Adapter:
        """Take up an adapter's file now."""
        async with answering(context):
            CALLER.get().check_admin()
            await self._directory.load(request.adapter_id)
            return wire.adapter(self._store.newest(request.adapter_id))
        raise AssertionError("aborted")

    async def Unload(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Stop serving an adapter."""
        async with answering(context):
            CALLER.get().check_admin()
            await self._directory.unload(request.adapter_id)
            return pb.UnloadAdapterResponse()
        raise AssertionError("aborted")

    async def Watch(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.AdapterEvent]:
        """Stream the state of every version the caller may know of, then what changes."""
        caller = CALLER.get()
        with self._store.watching() as watcher:
            async for version, gone in watcher:
                if caller.may_see(version.name):
                    yield pb.AdapterEvent(adapter=wire.adapter(version), gone=gone)

    async def Pin(self, request: pb.PinAdapterRequest, context: Context) -> pb.Adapter:
        """Bring an adapter to the device and keep it there."""
        async with answering(context):
            CALLER.get().check_admin()
            with self._store.lease(_named(request.adapter_id)) as lease:
                assert lease is not None
                version = await lease.ready()
                self._store.pin(version.name, pinned=True)
            return wire.adapter(version)
        raise AssertionError("aborted")

    async def Unpin(self, request: pb.UnpinAdapterRequest, context: Context) -> pb.Adapter:
        """Let an adapter be evicted again."""
        async with answering(context):
            CALLER.get().check_admin()
            name, _, _ = _named(request.adapter_id).partition("@")
            was_pinned = self._store.pin(name, pinned=False)
            try:
                return wire.adapter(self._store.get(request.adapter_id))
            except UnknownAdapter:  # its file has gone
                if not was_pinned:
                    raise
                return pb.Adapter(name=name)
        raise AssertionError("aborted")


def _named(adapter_id: str) -> str:
    """Return an adapter's name, which the base has none of. Raises InvalidRequest."""
    if not adapter_id:
        raise InvalidRequest("adapter_id", "expected an adapter's name, got none")
    return adapter_id
