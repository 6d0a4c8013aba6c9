"""What clients may send, and what of it is asked of the server.

What would change an answer and is not served is refused by name, never ignored.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from spieldose_server.errors import InvalidRequest
from spieldose_server.request import Message, Prompt
from spieldose_server.sampling_params import SamplingParams

COMPLETION_TOKENS = 16  # OpenAI's default of a completion; a chat's is the server's own

# What says the same as its absence.
NEUTRAL: Mapping[str, Any] = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "logit_bias": {},
    "modalities": ["text"],
    "echo": False,
    "best_of": 1,
    "suffix": "",
}


class Strict(BaseModel):
    """Take no other keys, and nothing for something else."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """Hold a part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """Hold one turn of a chat."""

    role: str
    content: str | list[TextPart]

    def message(self) -> Message:
        """Return it in the server's terms; a developer speaks as the system."""
        whole = self.content
        text = whole if isinstance(whole, str) else "".join(part.text for part in whole)
        return Message("system" if self.role == "developer" else self.role, text)


class JsonSchema(Strict):
    """Hold a named schema; `strict` asks for what always holds here."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Say what an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """Say what an answer must be, in vLLM's terms."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None


class StreamOptions(Strict):
    """Say what a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # pads nothing here


class Body(Strict):
    """Hold what both kinds of requests have."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | list[str] = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    response_format: ResponseFormat | None = None

    # vLLM's
    top_k: int = 0  # -1 keeps all, too
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: NonNegativeInt = 0
    stop_token_ids: list[NonNegativeInt] = []
    structured_outputs: StructuredOutputs | None = None

    # what changes no answer here
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: Any = None

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        schema, regex = self._constraint()
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            seed=None if self.seed is None else self.seed % (1 << 64),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            n=self.n,
            logprobs=logprobs,
            json_schema=schema,
            regex=regex,
        )

    def _constraint(self) -> tuple[str | None, str | None]:
        """Return the JSON schema and the regex of the answer; at most one is there."""
        schemas: list[str] = []
        regexes: list[str] = []
        if (wanted := self.response_format) is not None and wanted.type != "text":
            if wanted.type == "json_schema" and wanted.json_schema is None:
                raise InvalidRequest("response_format", "expected a json_schema, got none")
            given = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
            schemas.append(json.dumps(given))
        if (vllm := self.structured_outputs) is not None:
            if vllm.json_ is not None:
                schemas.append(
                    vllm.json_ if isinstance(vllm.json_, str) else json.dumps(vllm.json_)
                )
            if vllm.regex is not None:
                regexes.append(vllm.regex)
        if len(schemas) + len(regexes) > 1:
            raise InvalidRequest("structured_outputs", "expected one constraint, got several")
        return next(iter(schemas), None), next(iter(regexes), None)


class CompletionBody(Body):
    """Hold a request to `/v1/completions`."""

    prompt: str | list[str] | list[NonNegativeInt] | list[list[NonNegativeInt]]
    max_tokens: int = COMPLETION_TOKENS
    logprobs: NonNegativeInt | None = None

    def prompts(self) -> tuple[str, list[Prompt]]:
        """Return the prompts and the name of their field. Raises InvalidRequest."""
        given = self.prompt
        several = isinstance(given, list) and not all(isinstance(part, int) for part in given)
        prompts: list[Any] = list(given) if several else [given]
        if not given or not all(prompts):
            raise InvalidRequest("prompt", "expected a prompt, got an empty one")
        return "prompt", prompts

    def sampling(self) -> SamplingParams:
        """Return how tokens are chosen. Raises InvalidRequest."""
        return self._sampling(self.max_tokens, self.logprobs)


class ChatBody(Body):
    """Hold a request to `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: NonNegativeInt = 0

    def prompts(self) -> tuple[str, list[Prompt]]:
        """Return the messages as the one prompt, and the name of their field."""
        return "messages", [[message.message() for message in self.messages]]

    def sampling(self) -> SamplingParams:
        """Return how tokens are chosen. Raises InvalidRequest."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs", "expected logprobs beside it, got none")
        limit = self.max_completion_tokens
        limit = self.max_tokens if limit is None else limit
        return self._sampling(limit, self.top_logprobs if self.logprobs else None)


def read(kind: type[Body], sent: bytes) -> Body:
    """Return a request's body. Raises InvalidRequest."""
    try:
        given: Any = json.loads(sent)
    except ValueError as error:
        raise InvalidRequest("body", f"expected JSON, got: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest("body", f"expected a JSON object, got {type(given).__name__}")
    said = {
        key: value
        for key, value in given.items()
        if value is not None and not (key in NEUTRAL and value == NEUTRAL[key])
    }
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise _first(error) from None


def _first(invalid: ValidationError) -> InvalidRequest:
    """Return what is wrong with a body in one line."""
    found = invalid.errors(include_url=False, include_context=False)[0]
    field = str(found["loc"][0]) if found["loc"] else "body"
    if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
        return InvalidRequest(field, "expected no such field: it is not served")
    inner = ".".join(map(str, found["loc"][1:]))
    where = f" at {inner}" if inner else ""
    return InvalidRequest(field, f"expected another value{where}: {found['msg']}")
