"""What `spieldose generate` and `spieldose chat` are told alike."""

from dataclasses import dataclass

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client.requests import message
from spieldose_server.config import DEFAULT_ADDRESS
from spieldose_server.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AskArguments:
    """Say who answers, and how."""

    adapter: str = ""  # name of the adapter; empty plays the base
    server: str = DEFAULT_ADDRESS  # its address and port, or unix:PATH
    max_tokens: int | None = None  # 256, or what the context has room for
    temperature: float | None = None  # 0, the default, takes the likeliest token
    top_p: float | None = None  # share of the likeliest tokens to choose from
    top_k: int | None = None  # number of them
    seed: int | None = None  # the same one makes the same choices
    stop: tuple[str, ...] = ()  # texts that end the answer
    json_schema: str | None = None  # the schema itself, that the answer fulfils
    regex: str | None = None  # that the answer matches as a whole
    timeout: float | None = None  # seconds of an answer

    def sampling(self) -> pb.SamplingParams:
        """Return what was given; the server knows the defaults.

        Raises ConfigError for two constraints, InvalidArgument for what no message holds.
        """
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError("expected json_schema or regex, got both")
        names = "max_tokens temperature top_p top_k seed stop json_schema regex".split()
        return message(pb.SamplingParams, **{name: getattr(self, name) for name in names})
