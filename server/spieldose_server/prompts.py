"""Prompts to token ids: text as it is, token ids checked, messages through a chat template."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from spieldose_server.errors import InvalidRequest
from spieldose_server.request import ROLES, Message, Prompt
from spieldose_server.time_limit import within

TEMPLATE_SECONDS = 2.0  # of an adapter's chat template, which came with a file


class Prompts:
    """Convert and check prompts for one model."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, max_bytes: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._max_bytes = max_bytes

    def tokens(self, field: str, prompt: Prompt, *, template: str = "") -> list[int]:
        """Return a prompt's tokens; `template` is an adapter's, empty for the model's own.

        Takes its time: a second for a megabyte. Raises InvalidRequest, naming `field`.
        """
        tokens = self._converted(field, prompt, template)
        # a tokenizer, too, may have ids that its model has no embedding for
        if (largest := max(tokens, default=0)) >= self._vocabulary:
            raise InvalidRequest(field, f"expected ids below {self._vocabulary}, got {largest}")
        return tokens

    def _converted(self, field: str, prompt: Prompt, template: str) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(field, prompt)
            return list(self._tokenizer(prompt)["input_ids"])
        if not prompt:
            raise InvalidRequest(field, "expected at least one entry, got none")
        if isinstance(prompt[0], Message):
            turns = [message for message in prompt if isinstance(message, Message)]
            return self._render(field, turns, template)
        return [token for token in prompt if isinstance(token, int)]

    def _render(self, field: str, messages: Sequence[Message], template: str) -> list[int]:
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequest(
                    field, f"expected a role of {', '.join(ROLES)}, got {message.role!r}"
                )
        self._check_size(field, "".join(message.content for message in messages))
        if not template and self._tokenizer.chat_template is None:
            raise InvalidRequest(
                field, "expected text or token_ids: neither model nor adapter has a chat template"
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        render = partial(
            self._tokenizer.apply_chat_template,
            turns,
            chat_template=template or None,
            add_generation_prompt=True,
            return_dict=False,
        )
        try:
            return list(within(TEMPLATE_SECONDS, render) if template else render())
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise InvalidRequest(field, f"the chat template refuses it: {error}") from error

    def _check_size(self, field: str, text: str) -> None:
        if (size := len(text.encode())) > self._max_bytes:
            raise InvalidRequest(field, f"expected at most {self._max_bytes} bytes, got {size}")
