"""Answers to questions, whatever wire they come by: adapter leased, turn taken, tokens as text."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from spieldose_kernels.base import Base
from spieldose_server.access import CALLER
from spieldose_server.admission import Admission, Tenant, Turn
from spieldose_server.constraint import Constraint, Grammars
from spieldose_server.engine import Engine
from spieldose_server.errors import InvalidRequest
from spieldose_server.merged import merged
from spieldose_server.observed import Observed
from spieldose_server.preparation import Preparation
from spieldose_server.prompts import Prompts
from spieldose_server.request import GenerationRequest, Prompt, Question, fit
from spieldose_server.sampling import TokenLogprob
from spieldose_server.store import AdapterStore, Lease
from spieldose_server.text import TextStream
from spieldose_server.versions import Version


@dataclass(frozen=True, slots=True)
class Piece:
    """Hold what is new in an answer. The text may lag behind the tokens."""

    index: int  # of the answer
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]  # one for each token, if asked for


@dataclass(frozen=True, slots=True)
class Completed:
    """Hold how an answer came to its end."""

    index: int  # of the answer
    stopped: bool  # where it should; else at its limit of tokens
    prompt_tokens: int
    completion_tokens: int
    version: Version | None  # that played; None: the base


@dataclass(frozen=True, slots=True)
class Prepared:
    """Hold a question in the engine's terms."""

    tokens: list[int]
    template: str  # that messages went through
    constraint: Constraint | None  # of one answer
    max_tokens: int


class Generation:
    """Answer questions in the name of CALLER."""

    def __init__(
        self, base: Base, engine: Engine, store: AdapterStore, admission: Admission, max_bytes: int
    ) -> None:
        """Take the parts together; prompts may have `max_bytes`."""
        table: Any = base.model.get_input_embeddings()
        self.vocabulary = int(table.num_embeddings)
        self._tokenizer = base.tokenizer
        self._engine = engine
        self._store = store
        self._admission = admission
        self.max_prompt = engine.max_context - 1  # tokens: one has to follow
        self.max_questions = admission.most  # at once
        self._preparation = Preparation()
        self._prompts = Prompts(base.tokenizer, vocabulary=self.vocabulary, max_bytes=max_bytes)
        self._grammars = Grammars(
            base.tokenizer, vocabulary=self.vocabulary, end_ids=engine.end_ids
        )

    async def tokens(self, adapter_id: str, field: str, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt that `field` held. Raises ServerError."""
        caller = CALLER.get()
        with self._admission.accept(caller.tenant):
            if adapter_id:
                caller.check_play(adapter_id)
            template = _template(self._store.resolve(adapter_id) if adapter_id else None)
            return await self._preparation.run(
                caller.tenant,
                partial(self._prompts.tokens, field, prompt, template=template),
            )

    async def answers(
        self, question: Question, observed: Observed
    ) -> AsyncGenerator[Piece | Completed]:
        """Yield the pieces of each answer as its tokens come, then its end. Raises ServerError.

        The adapter begins to load before anything else is done, and a reader that is slow keeps
        nothing from its end.
        """
        observed.asks(question)
        caller = CALLER.get()
        with self._admission.accept(caller.tenant) as tenant, ExitStack() as stack:
            caller.check_play(question.adapter_id)
            leases = [
                stack.enter_context(self._store.lease(question.adapter_id))
                for _ in range(question.sampling.n)
            ]
            held = leases[0].version if leases[0] else None
            observed.plays(held)
            prepared = await self._prepare(question, template=_template(held))
            answers = [
                self._answer(tenant, lease, question, prepared, index, observed)
                for index, lease in enumerate(leases)
            ]
            async with aclosing(merged(answers)) as events:
                async for event in events:
                    yield event

    async def _answer(
        self,
        tenant: Tenant,
        lease: Lease | None,
        question: Question,
        prepared: Prepared,
        index: int,
        observed: Observed,
    ) -> AsyncGenerator[Piece | Completed]:
        """Wait for a turn, then play one answer."""
        async with self._admission.turn(tenant, lease, tokens=len(prepared.tokens)) as turn:
            if _template(turn.version) != prepared.template:  # replaced while it waited
                prepared = await self._prepare(question, template=_template(turn.version))
            observed.began(
                index, turn.version, ready=turn.ready, prompt_tokens=len(prepared.tokens)
            )
            generation = GenerationRequest(
                id=secrets.token_hex(8),
                tokens=prepared.tokens,
                slot=None if turn.version is None else turn.version.slot,
                plays=b"" if turn.version is None else turn.version.digest.encode(),
                sampling=question.sampling,
                seed=question.sampling.seed_of(index),
                max_tokens=prepared.max_tokens,
                constraint=prepared.constraint and prepared.constraint.another(),
            )
            async with aclosing(self._play(generation, turn, index)) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        observed.finished(index, stopped=event.stopped)
                    elif event.token_ids:
                        observed.got(index, len(event.token_ids))
                    yield event

    async def _play(
        self, generation: GenerationRequest, turn: Turn, index: int
    ) -> AsyncGenerator[Piece | Completed]:
        """Have the engine generate an answer, and read its tokens as text."""
        sampling = generation.sampling
        text = TextStream(self._tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        count, stopped = 0, False
        async with aclosing(self._engine.generate(generation)) as stream:
            async for tokens in stream:
                turn.charge(len(tokens.ids))
                silent = 1 if tokens.hit_end else 0  # what ends the answer is not part of its text
                piece, taken = text.push(tokens.ids, silent=silent)
                if tokens.finished:
                    piece += text.finish()
                count += len(taken)
                stopped = text.stopped or tokens.hit_end
                yield Piece(index, piece, taken, tokens.logprobs[: len(taken)])
                if text.stopped:
                    break
        if generation.constraint is not None:
            generation.constraint.check()
        yield Completed(index, stopped, len(generation.tokens), count, turn.version)

    async def _prepare(self, question: Question, *, template: str) -> Prepared:
        """Convert and check a question. Raises InvalidRequest."""
        prepare = partial(self._prepared, question, template=template)
        return await self._preparation.run(CALLER.get().tenant, prepare)

    def _prepared(self, question: Question, *, template: str) -> Prepared:
        field, sampling = question.field, question.sampling
        tokens = self._prompts.tokens(field, question.prompt, template=template)
        limit = fit(len(tokens), question, max_context=self._engine.max_context)
        if max(sampling.stop_token_ids, default=0) >= self.vocabulary:
            raise InvalidRequest(
                "sampling_params.stop_token_ids",
                f"expected ids below {self.vocabulary}, got {max(sampling.stop_token_ids)}",
            )
        constraint = self._grammars.constraint(sampling, question.constraint_field)
        return Prepared(tokens, template, constraint, limit)


def _template(version: Version | None) -> str:
    """Return an adapter's own chat template, "" if it has none."""
    description = None if version is None else version.description
    return "" if description is None else description.info.chat_template
