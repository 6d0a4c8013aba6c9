"""What clients may send, and what of it is asked of the server.

What would change an answer and is not served is refused by name, never ignored.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, MaxLen, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spieldose_server.errors import InvalidRequest
from spieldose_server.request import DEFAULT_MAX_TOKENS, MAX_MESSAGES, Message, Prompt
from spieldose_server.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKENS, SamplingParams

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


HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a character, perhaps, as JSON escapes it

MAX_PARTS = 1024  # of one message


class First(FailFast):
    """Tell one wrong entry of a list: a message may hold millions."""

    def __hash__(self) -> int:  # a union's parts need one
        return hash(self.fail_fast)


T = TypeVar("T")
Listed = Annotated[list[T], First()]


class Strict(BaseModel):
    """Take no other keys, and nothing for something else; null says what absence says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: value for key, value in given.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in said:
            if key not in known:
                raise PydanticCustomError("extra_forbidden", "no {key} is served", {"key": key})
        return said


class TextPart(Strict):
    """Hold a part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """Hold one turn of a chat."""

    role: str
    content: str | Annotated[Listed[TextPart], MaxLen(MAX_PARTS)]

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
    stop: str | Annotated[Listed[str], MaxLen(MAX_STOP_STRINGS)] = []
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    response_format: ResponseFormat | None = None

    # vLLM's
    top_k: Annotated[int, Ge(-1)] = 0  # -1 keeps all, too
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: NonNegativeInt = 0
    stop_token_ids: Annotated[Listed[NonNegativeInt], MaxLen(MAX_STOP_TOKENS)] = []
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

    @property
    def constraint_field(self) -> str:
        """Return the name of the field that holds a constraint, if one does."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

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

    default_tokens: ClassVar[int] = COMPLETION_TOKENS

    prompt: str | Listed[str] | Listed[NonNegativeInt] | Listed[Listed[NonNegativeInt]]
    max_tokens: int | None = None
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

    default_tokens: ClassVar[int] = DEFAULT_MAX_TOKENS

    messages: Annotated[Listed[ChatMessage], MinLen(1), MaxLen(MAX_MESSAGES)]
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
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", f"expected JSON, got: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest("body", f"expected a JSON object, got {type(given).__name__}")
    said = {
        key: value
        for key, value in given.items()
        if value is not None and not (key in NEUTRAL and value == NEUTRAL[key])
    }
    halves = HALF.search(sent) is not None
    for key, value in said.items():
        if key not in kind.model_fields:
            raise InvalidRequest(key, "expected no such field: it is not served")
        if halves and not _is_text(value):
            raise InvalidRequest(key, "expected Unicode text, got half of a character")
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise _first(error) from None


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _first(invalid: ValidationError) -> InvalidRequest:
    """Return what is wrong with a body in one line; rather a value than that it is of no type."""
    errors = invalid.errors(include_url=False, include_context=False)
    found = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    field = str(found["loc"][0]) if found["loc"] else "body"
    inner = ".".join(map(str, found["loc"][1:]))
    where = f" at {inner}" if inner else ""
    return InvalidRequest(field, f"expected another value{where}: {found['msg']}")
