"""Answers that a JSON schema or a regular expression describes: every other token is masked.

llguidance keeps the grammar's state; what it allows depends on the answer so far alone.
"""

import re
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from spieldose_server.errors import InvalidRequest
from spieldose_server.sampling_params import SamplingParams

# Between any two tokens of JSON, unless the schema's x-guidance says otherwise: room for a new line
# and indentation, but a weak model cannot go on with blanks until its tokens are used up.
BLANKS = r"\n?[ ]{0,32}"

# As JSON schema's own patterns have them. Taken as Unicode, which digits there are would depend on
# the age of the table: llguidance's knows some that Python's does not.
ASCII = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[\t\n\v\f\r ]"}

# Whoever asks for a step that takes long lets all others wait. At llguidance's own limits, four and
# ten times these, (a{1000}){1000} takes as long as many steps of a model.
LIMITS = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=50_000, step_max_items=5_000)


class Constraint:
    """Say which tokens may come next in one answer."""

    def __init__(
        self, field: str, matcher: LLMatcher, first: torch.Tensor, end_ids: frozenset[int]
    ) -> None:
        self._field = field
        self._matcher = matcher
        self._first = first  # what may begin an answer, [V] bool
        self._end_ids = end_ids
        self._consumed = 0

    @classmethod
    def of(cls, field: str, matcher: LLMatcher, end_ids: frozenset[int]) -> "Constraint":
        """Find out what may begin an answer, which takes the longest. Raises InvalidRequest."""
        constraint = cls(field, matcher, _mask(matcher), end_ids)
        constraint.check()
        return constraint

    def another(self) -> "Constraint":
        """Return the constraint of a further answer, to be used before either has begun."""
        return Constraint(self._field, self._matcher.deep_copy(), self._first, self._end_ids)

    def allowed(self, answer: list[int]) -> torch.Tensor:
        """Return what may follow an answer that has grown since the last call, [V] bool.

        An end-of-sequence token may where the answer is complete. Once llguidance has given up, it
        is all that may: `check` tells.
        """
        if not answer:
            return self._first
        self._matcher.consume_tokens(answer[self._consumed :])
        self._consumed = len(answer)
        allowed = _mask(self._matcher)
        if self._matcher.is_error():
            allowed.fill_(False)
            allowed[sorted(self._end_ids)] = True
        return allowed

    def check(self) -> None:
        """Raise InvalidRequest if the grammar is wrong, or was too complex to follow."""
        if self._matcher.is_error():
            problem, _, _ = self._matcher.get_error().partition("<state>")  # a dump follows
            raise InvalidRequest(self._field, " ".join(problem.split()))


class Grammars:
    """Make constraints over one model's tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, end_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = end_ids

    def constraint(self, sampling: SamplingParams, field: str = "") -> Constraint | None:
        """Return the constraint that a request asks for, if any, in a field of its own or `field`.

        That takes milliseconds, of a hostile grammar a second. An answer matches a regular
        expression as a whole. Raises InvalidRequest.
        """
        if sampling.json_schema is not None:
            field = field or "sampling_params.json_schema"
            try:
                grammar = LLMatcher.grammar_from_json_schema(
                    sampling.json_schema, defaults={"whitespace_pattern": BLANKS}
                )
            except ValueError as error:
                raise InvalidRequest(field, f"expected a JSON schema: {error}") from None
        elif sampling.regex is not None:
            field = field or "sampling_params.regex"
            grammar = LLMatcher.grammar_from_regex(_ascii(sampling.regex))
        else:
            return None
        if not self._end_ids:
            raise InvalidRequest(field, "the model has no token that could end the answer")
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LIMITS)
        return Constraint.of(field, matcher, self._end_ids)

    @cached_property
    def _tokens(self) -> LLTokenizer:  # 0.4 s for 49,152 tokens: not before it is needed
        fast: Any = self._tokenizer
        return from_tokenizer(fast, n_vocab=self._vocabulary, eos_token=sorted(self._end_ids))


def _mask(matcher: LLMatcher) -> torch.Tensor:
    return torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0


def _ascii(pattern: str) -> str:
    """Have the classes that `ASCII` names, inside brackets or not, match ASCII only."""
    return re.sub(
        r"\\(.)", lambda escape: ASCII.get(escape[1], escape[0]), pattern, flags=re.DOTALL
    )
