"""A server's life: load the base, take up the adapters, serve, drain on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
from functools import partial
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from grpc_health.v1 import _async as aio_health
from grpc_health.v1 import health_pb2
from prometheus_client import start_http_server

from spieldose_kernels.base import Base, load_base, pick_compute_dtype, pick_device
from spieldose_kernels.checkpoint import first_line
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server.access import Access
from spieldose_server.adapters_service import AdaptersService
from spieldose_server.admission import Admission, Limits
from spieldose_server.callers import Callers
from spieldose_server.config import ServerConfig
from spieldose_server.directory import AdapterDirectory
from spieldose_server.engine import Engine
from spieldose_server.errors import ConfigError, EngineStopped
from spieldose_server.files import AdapterFiles
from spieldose_server.generation import Generation
from spieldose_server.measured import introduce, measure
from spieldose_server.memory_budgets import budgeted
from spieldose_server.metrics import Metrics
from spieldose_server.observer import Observer
from spieldose_server.openai_http.app import OpenAI
from spieldose_server.openai_http.listener import Listener
from spieldose_server.port import Port, Services
from spieldose_server.residency import Residency
from spieldose_server.service import InferenceService
from spieldose_server.store import AdapterStore
from spieldose_server.threads import Rest, apart, loaders
from spieldose_server.tracing import Tracing
from spieldose_server.trusted_keys import TrustedKeys

log = logging.getLogger(__name__)

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS = pb.DESCRIPTOR.services_by_name["Adapters"].full_name
LAST_SECONDS = 0.5  # that short calls have to end in when no request runs any more


async def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    Raises BaseError or ConfigError before serving, EngineStopped if the engine dies.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    base = await asyncio.to_thread(apart, partial(load, config))
    server = Server(base, config)
    try:
        await server.start()
        while not stop.is_set():
            server.check()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=1.0)
    finally:
        await server.stop()


def load(config: ServerConfig) -> Base:
    """Load the base a configuration asks for."""
    device = pick_device(config.device)
    dtype = pick_compute_dtype(config.compute_dtype, device)
    log.info("loading %s in NF4, computing in %s on %s", config.base, dtype, device)
    return load_base(config.base, device=device, compute_dtype=dtype, fused=True)


class Server:
    """Hold one base's engine, store, directory and gRPC server."""

    def __init__(self, base: Base, config: ServerConfig) -> None:
        self.config = config = budgeted(config, base.model)
        access = Access(Path(config.access)) if config.access else None
        try:
            self.engine = apart(partial(Engine, base, config))
        except (RuntimeError, MemoryError) as error:  # PyTorch's, of memory that is not there
            raise ConfigError(
                f"adapter_memory, kv_tokens: expected memory for {config.adapter_memory} bytes of "
                f"adapters and {config.kv_tokens} tokens, got: {first_line(error)}"
            ) from error
        self._loaders = loaders()
        slab = self.engine.slab
        keys = TrustedKeys.of(config)
        rest = Rest(lambda: self.admission.running > 0)
        pinned = base.model.device.type == "cuda"
        files = AdapterFiles(
            config.adapters, base.spec, dtype=slab.dtype, pinned=pinned, keys=keys, rest=rest
        )
        residency = Residency(slab, files, self._loaders, host_memory=config.host_memory)
        self.store = AdapterStore(residency)
        self.directory = AdapterDirectory(files, self.store, self._loaders, keys=keys)
        limits = Limits(
            running=config.max_batch_requests,
            accepted=config.max_requests,
            tenant_running=config.max_tenant_running,
            tenant_accepted=config.max_tenant_requests,
            tenant_tokens_per_second=config.tenant_tokens_per_second,
        )
        self.admission = Admission(limits, residency)
        self.metrics = Metrics()
        measure(self.metrics, self.engine, self.store, self.admission)
        introduce(self.metrics, base.spec)
        self._tracing = Tracing.of(config, base=base.spec.name)
        observer = Observer(self.metrics, self._tracing)
        generation = Generation(
            base, self.engine, self.store, self.admission, config.max_prompt_bytes
        )
        inference = InferenceService(base, self.engine, generation, observer)
        adapters = AdaptersService(self.store, self.directory)
        self._health = aio_health.HealthServicer()
        self._ports = self._make_ports(inference, adapters, access, observer)
        self._openai: Listener | None = None
        if config.http_listen:
            callers = Callers(access, steers=False)
            openai = OpenAI(base, generation, self.store, observer, callers)
            self._openai = Listener(openai, config)
        self._watching: asyncio.Task[None] | None = None
        self._metrics_server: WSGIServer | None = None
        self.metrics_port = 0  # known once started

    def _make_ports(
        self,
        inference: InferenceService,
        adapters: AdaptersService,
        access: Access | None,
        observer: Observer,
    ) -> list[Port]:
        """Return the clients' port and, if there is one, the administrators'."""
        steer: Services = {ADAPTERS: partial(rpc.add_AdaptersServicer_to_server, adapters)}
        offer: Services = {
            INFERENCE: partial(rpc.add_InferenceServicer_to_server, inference),
            **steer,
        }
        config, rest = self.config, (self._health, access, observer, self.config)
        if not config.admin_listen:
            return [Port(config.listen, offer, *rest, steers=access is not None)]
        return [
            Port(config.listen, offer, *rest, steers=False),
            Port(config.admin_listen, steer, *rest, steers=True),
        ]

    async def start(self) -> None:
        """Take up the adapters, open the port, report healthy. Raises ConfigError."""
        for port in self._ports:
            port.open()
        self._serve_metrics()
        self.engine.start()
        try:
            await self.directory.take_up()
        except OSError as error:
            raise ConfigError(f"adapters: expected a readable directory, got: {error}") from error
        self._watching = asyncio.create_task(self.directory.watch())
        for service in ("", INFERENCE, ADAPTERS):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        for port in self._ports:
            await port.start()
        if self._openai is not None:
            await self._openai.start()
        log.info("listening on %s with %d adapters", self._ports[0], len(self.store.list()))
        for port in self._ports[1:]:
            log.info("administrators on %s", port)

    @property
    def port(self) -> int:
        """Return the port that clients use, known once started."""
        return self._ports[0].number

    @property
    def admin_port(self) -> int:
        """Return the port that administrators use, known once started."""
        return self._ports[-1].number

    @property
    def http_port(self) -> int:
        """Return the port that OpenAI's clients use, known once started."""
        return 0 if self._openai is None else self._openai.port

    def _serve_metrics(self) -> None:
        if not self.config.metrics_listen:
            return
        host, _, port = self.config.metrics_listen.rpartition(":")
        try:
            self._metrics_server, _ = start_http_server(
                int(port), host.strip("[]"), self.metrics.registry
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"metrics_listen: expected a free address, got {self.config.metrics_listen}"
            ) from error
        self.metrics_port = self._metrics_server.server_port

    def check(self) -> None:
        """Raise what ended the directory watch, or EngineStopped, if either is over."""
        if self._watching is not None and self._watching.done():
            self._watching.result()
        if not self.engine.running:
            raise EngineStopped("the engine stopped; its error is in the log above")

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish for `drain_seconds`, stop the engine."""
        log.info("draining")
        await self._health.enter_graceful_shutdown()
        self.store.close()
        await self._drain()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        await asyncio.to_thread(partial(self._loaders.shutdown, cancel_futures=True))
        await asyncio.to_thread(self.engine.stop)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        log.info("stopped")

    async def _drain(self) -> None:
        """Take no more calls; once no request runs, do not wait for who watches."""
        seconds = self.config.drain_seconds
        refusing = [asyncio.create_task(port.stop(seconds)) for port in self._ports]
        if self._openai is not None:
            refusing.append(asyncio.create_task(self._openai.stop()))
        while self.admission.accepted and not all(task.done() for task in refusing):
            await asyncio.sleep(0.05)
        await asyncio.gather(*(port.stop(min(LAST_SECONDS, seconds)) for port in self._ports))
        await asyncio.gather(*refusing)
