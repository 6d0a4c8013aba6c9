"""What users of other servers of many adapters suffer, most frequent first, does not happen here.

The numbers are those of our survey of their issues, some of which stand beside the tests. Security
(8) and observability (9) have no test here yet.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.linear import DeltaLinear
from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import ClientError, Reply
from spieldose_server.threads import LOADERS

from ..conftest import Running, eventually, random_adapter
from .dense import assert_greedy, dense_model
from .test_adapters import Stream
from .test_cancel import idle
from .test_prefix_cache import PAGES, PROMPT, ask

NAMES = ("a1", "a2", "a3", "a4")
LONG = pb.SamplingParams(max_tokens=400)

Serving = Callable[..., Any]


@pytest.fixture
def serving(serve_tiny: Any, tmp_path: Path, make_adapter: Callable[..., Adapter]) -> Serving:
    """Return a context manager: a server with the adapters a1 to a4 and these settings."""
    directory = tmp_path / "adapters"
    directory.mkdir()
    for seed, name in enumerate(NAMES, start=1):
        write_delta(directory / f"{name}.safetensors", make_adapter(seed))
    return lambda **settings: contextmanager(serve_tiny)(directory, **settings)


# vllm 30931, 3264, 42125; llama.cpp 26207; sglang 24638
def test_1_kv_is_never_shared_across_adapters_or_after_a_reload(
    running: Running, tiny_directory: Path, make_adapter: Callable[..., Adapter]
) -> None:
    def first_answer(name: str) -> Reply:
        reply, found = ask(running, name)
        assert found == 0
        assert_greedy(dense(running, tiny_directory, name), tokens(running), reply.token_ids)
        return reply

    replies = {name: first_answer(name) for name in ("", *NAMES)}
    assert len({reply.token_ids for reply in replies.values()}) == 5
    assert all(ask(running, name) == (reply, PAGES) for name, reply in replies.items())
    file = running.directory / "a1.safetensors"
    content = file.read_bytes()
    write_delta(file, make_adapter(77))
    eventually(lambda: say(running, "a1").adapter != replies["a1"].adapter)
    assert first_answer("a1").token_ids != replies["a1"].token_ids
    file.write_bytes(content)
    eventually(lambda: say(running, "a1").adapter == replies["a1"].adapter)
    assert ask(running, "a1") == (replies["a1"], PAGES)


# vllm 47724, 34186, 55193; TGI 2441
def test_2_a_request_gets_its_own_adapter_or_an_error_while_others_take_turns_in_the_slots(
    serving: Serving,
) -> None:
    with serving(max_adapters=2) as running:
        alone = {name: say(running, name, max_tokens=120) for name in NAMES}
        assert len({reply.token_ids for reply in alone.values()}) == len(NAMES)
        with Stream(running, "a1") as stream:
            for name in NAMES[1:] * 2:
                assert say(running, name, max_tokens=8).token_ids == alone[name].token_ids[:8]
            assert stream.rest() == alone["a1"].token_ids
        assert running.server.store.residency.evictions >= 5
        running.admin.unload("a2")
        for name in ("a2", "A1", "a1 ", "nobody"):
            assert refusal(running, name).code == grpc.StatusCode.NOT_FOUND


# peft 1294
@pytest.mark.parametrize("kind", ["a module more", "no module", "a tensor more"])
def test_2_an_adapter_of_which_a_part_would_have_no_effect_is_refused(
    running: Running, make_adapter: Callable[..., Adapter], kind: str
) -> None:
    file, adapter = running.directory / "odd.safetensors", make_adapter(9)
    delta = make_adapter(10).modules["model.layers.1.mlp.up_proj"]
    if kind == "a module more":
        adapter = replace(adapter, modules={**adapter.modules, "model.layers.2.mlp.up_proj": delta})
    if kind == "no module":
        adapter = replace(adapter, modules={})
    write_delta(file, adapter)
    if kind == "a tensor more":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file(
            tensors | {"model.layers.1.mlp.up_proj.scale": torch.ones(1)}, file, metadata
        )
    reason = {
        "a module more": "expected a target module of the base, got 'model.layers.2.mlp.up_proj'",
        "no module": "expected at least one module, got none",
        "a tensor more": "got 'model.layers.1.mlp.up_proj.scale'",
    }[kind]
    eventually(lambda: reason in running.state("odd"))
    assert refusal(running, "odd").code == grpc.StatusCode.FAILED_PRECONDITION


# vllm 54839, 33791; trl 2730
def test_3_what_is_unloaded_frees_all_its_bytes_and_what_is_loaded_is_read_once(
    running: Running, make_adapter: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> tuple[int, int, int]:
        store = running.server.store
        free = running.server.engine.slab.arena.free_bytes
        return free, store.residency.host_bytes, len(store.list())

    for name in NAMES:
        say(running, name)
    files, reads = running.server.directory._files, []
    read = files.read
    monkeypatch.setattr(
        files, "read", lambda name, *asked: reads.append(name) or read(name, *asked)
    )
    before = held()
    for seed in range(5):
        write_delta(running.directory / "b.safetensors", make_adapter(10 + seed))
        eventually(lambda: running.state("b") == "resident")
        answers = {say(running, "b", max_tokens=100).token_ids for _ in range(3)}
        assert len(answers) == 1 and held() != before
        (running.directory / "b.safetensors").unlink()
        eventually(lambda: running.state("b") == "")
        assert held() == before
        assert refusal(running, "b").code == grpc.StatusCode.NOT_FOUND
    assert reads == ["b"] * 5


# sglang 13349, 8162
def test_4_a_load_begins_at_arrival_and_only_its_own_requests_wait_for_it(serving: Serving) -> None:
    with serving(max_adapters=2, max_batch_requests=1) as running, ThreadPoolExecutor(1) as pool:
        for name in NAMES[::-1]:
            say(running, name)
        assert [running.state(name) for name in NAMES[:3]] == ["resident"] * 2 + ["on host"]
        with Stream(running, "a1"):  # in the only place
            waits = pool.submit(say, running, "a3")
            eventually(lambda: running.state("a3") == "resident")
            assert running.client.adapter("a1").running == 1 and not waits.done()
        waits.result()
        assert [running.state(name) for name in NAMES[:3]] == ["resident", "on host", "resident"]
        gate = threading.Event()
        for _ in range(LOADERS):  # loads that take their time
            running.server._loaders.submit(gate.wait, 60)
        cold = pool.submit(say, running, "a2")
        eventually(lambda: running.state("a2") == "loading")
        for name in ("a1", "a3", "", "a1"):
            say(running, name)
        assert running.state("a2") == "loading" and not cold.done()
        gate.set()
        assert cold.result().adapter.startswith("a2@")


# lorax 53, 306; vllm 29049
def test_5_memory_is_budgeted_in_bytes_whatever_the_adapters_sizes(
    serving: Serving, make_adapter: Callable[..., Adapter]
) -> None:
    budget = 480 << 10  # a large one takes some 330 kB, a small one 30
    with serving(adapter_memory=budget, host_memory=budget) as running:
        for name, density in (("b1", 0.6), ("b2", 0.6), ("huge", 1.0)):
            write_delta(running.directory / f"{name}.safetensors", make_adapter(9, density=density))
        residency, arena = running.server.store.residency, running.server.engine.slab.arena
        assert arena.memory.nbytes == budget  # taken at the start; there is never more
        eventually(lambda: running.state("huge").startswith("rejected expected an adapter that"))
        for name in ("b1", *NAMES, "b2", "b1", *NAMES):
            assert say(running, name).adapter.startswith(f"{name}@")
            assert residency.host_bytes <= budget
            sizes = [
                adapter.memory_bytes
                for adapter in running.client.adapters()
                if adapter.state == pb.ADAPTER_STATE_RESIDENT
            ]
            assert 0 < sum(sizes) == budget - arena.free_bytes <= budget
        assert len(sizes) == 5  # a large one and four small ones, never both large ones
        assert refusal(running, "huge").code == grpc.StatusCode.FAILED_PRECONDITION


# vllm 25914, 10062; lorax 333
def test_6_a_step_without_adapters_runs_the_bases_own_layers(
    serving: Serving, serve_tiny: Any, tmp_path: Path
) -> None:
    with serving() as running:
        layers: set[type] = set()

        def look(model: torch.nn.Module, *_: object) -> None:
            layers.update(type(model.get_submodule(path)) for path in running.base.layers)

        with running.base.model.register_forward_pre_hook(look):
            say(running, "a1")
            assert layers == {DeltaLinear}
            layers.clear()
            base = say(running, "")
            assert layers == {type(layer) for layer in running.base.layers.values()}
    empty = tmp_path / "empty"
    empty.mkdir()
    with contextmanager(serve_tiny)(empty) as bare:
        assert say(bare, "") == base


# sglang 23141, 15129; vllm 15422
@pytest.mark.parametrize("slots", [2, 4])
def test_7_the_base_and_every_adapter_take_turns_however_many_ask_for_another(
    serving: Serving, slots: int
) -> None:
    with (
        serving(max_adapters=slots, max_batch_requests=1) as running,
        ThreadPoolExecutor(50) as pool,
    ):
        order: list[str] = []

        def play(name: str) -> None:
            say(running, name)
            order.append(name)

        with Stream(running, "a1"):  # in the only place
            flood = [pool.submit(play, "a1") for _ in range(40)]
            eventually(lambda: running.server.admission.accepted == 41)
            others = [pool.submit(play, name) for name in ("", "a2", "a3", "a4")]
            eventually(lambda: running.server.admission.accepted == 45)
        for future in flood + others:
            future.result()
        last = max(order.index(name) for name in ("", "a2", "a3", "a4"))
        assert last < 20  # the flood has twice as many still to come


# vllm 10806; grpc 22874, 36193
def test_10_a_cancelled_or_expired_call_frees_its_kv_and_lease(running: Running) -> None:
    stream = running.client.stream("hello", adapter="a1", sampling=LONG)
    next(stream)
    assert running.client.adapter("a1").running == 1 and running.server.engine.held_pages > 0
    stream.close()
    eventually(lambda: idle(running))
    with Stream(running, "a2"):  # slows the steps down
        with pytest.raises(ClientError) as caught:
            running.client.generate("hello", adapter="a1", sampling=LONG, timeout=0.5)
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: running.client.adapter("a1").running == 0)
        assert running.client.adapter("a2").running == 1
    eventually(lambda: idle(running))


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_11_a_delta_for_the_head_or_the_embedding_is_refused(
    running: Running, make_adapter: Callable[..., Adapter], module: str
) -> None:
    adapter = make_adapter(9)
    height, width = running.base.model.get_submodule(module).weight.shape
    delta = SparseDelta.from_flat(torch.arange(5), torch.ones(5), shape=(height, width))
    adapter = replace(adapter, modules={**adapter.modules, module: delta})
    write_delta(running.directory / "more.safetensors", adapter)
    reason = f"rejected expected a target module of the base, got {module!r}"
    eventually(lambda: running.state("more") == reason)


def test_11_of_a_mixture_of_experts_the_attention_is_adapted_and_the_experts_are_not(
    serve_tiny: Any, experts: Path, tmp_path: Path
) -> None:
    base = load(experts)
    assert {path.rpartition(".")[0].rpartition(".")[2] for path in base.layers} == {"self_attn"}
    adapter = random_adapter(base, seed=1, density=0.05, scale=0.5)
    directory = tmp_path / "adapters"
    directory.mkdir()
    write_delta(directory / "good.safetensors", adapter)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    delta = SparseDelta.from_flat(torch.arange(5), torch.ones(5), shape=(320, 64))
    adapter = replace(adapter, modules={**adapter.modules, name: delta})
    write_delta(directory / "expert.safetensors", adapter)
    with contextmanager(serve_tiny)(directory, base=str(experts)) as running:
        reason = f"rejected expected a target module of the base, got {name!r}"
        eventually(lambda: running.state("expert") == reason)
        replies = {name: say(running, name, PROMPT) for name in ("", "good")}
        assert replies[""].token_ids != replies["good"].token_ids
        for name, reply in replies.items():
            assert_greedy(dense(running, experts, name), tokens(running), reply.token_ids)


def test_11_bases_are_compared_by_their_weights_and_not_by_their_names(
    serving: Serving, tiny_directory: Path, tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_directory, elsewhere)
    with serving() as running, serving(base=str(elsewhere)) as moved:
        assert say(moved, "a1") == say(running, "a1")
        adapter = make_adapter(1)
        same = replace(adapter.info, base_model="/a/path/that/is/gone")
        other = replace(adapter.info, base_fingerprint="0" * 64)
        for name, info in (("same", same), ("other", other)):
            path = running.directory / f"{name}.safetensors"
            write_delta(path, replace(adapter, info=info))
        eventually(lambda: running.state("same") == "resident")
        assert say(running, "same").token_ids == say(running, "a1").token_ids
        eventually(lambda: "got a delta for base 000000000000" in running.state("other"))


@pytest.fixture(scope="session")
def experts(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer mixture of four experts, saved as a checkpoint."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_directory)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("experts")
    MixtralForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load(directory: Path) -> Base:
    return load_base(
        str(directory), device=torch.device("cpu"), compute_dtype=torch.float32, fused=False
    )


def say(running: Running, name: str, prompt: str = "hello", *, max_tokens: int = 24) -> Reply:
    sampling = pb.SamplingParams(max_tokens=max_tokens)
    return running.client.generate(prompt, adapter=name, sampling=sampling)


def refusal(running: Running, name: str) -> ClientError:
    with pytest.raises(ClientError) as caught:
        say(running, name)
    return caught.value


def tokens(running: Running) -> list[int]:
    """Return the prompt's tokens."""
    found: list[int] = running.base.tokenizer(PROMPT)["input_ids"]
    return found


def dense(running: Running, base: Path, name: str) -> Any:
    """Build the dense model that an adapter's file stands for."""
    file = running.directory / f"{name}.safetensors"
    adapter = read_delta(file.read_bytes()) if name else None
    return dense_model(base, running.base, adapter)
