"""Choosing each request's next token from its logits, inside transformers' engine."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from spieldose_server.batch import answer, asked
from spieldose_server.request import GenerationRequest
from spieldose_server.sampling import TokenLogprob, penalise, perturb


class TokenChoice(ContinuousBatchingLogitsProcessorList):
    """Tell of every batch before its forward pass, and choose tokens as each request asks.

    The list's own method is overridden because it alone sees every request of the batch; a single
    processor's sees those that get a token, and would miss requests in chunked prefill.
    """

    TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED_LOW, SEED_HIGH, POSITION = range(7)

    def __init__(
        self,
        prepare: Callable[[list[FutureRequestState]], None],
        end_ids: frozenset[int],
        logprobs: dict[str, deque[TokenLogprob]],
    ) -> None:
        """Append to a request's `logprobs`, if it has any there."""
        super().__init__(LogitsProcessorList())
        self.tensors_required = 7
        self.do_processing = True
        self._prepare = prepare
        self._end_ids = end_ids
        self._logprobs = logprobs
        self._choosing: list[RequestState] = []  # who gets a token in this pass, a row each
        self._sampled = False  # whether any of them is not greedy

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Accept: the engine alone sets them."""

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Let unused places be greedy."""
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Write the sampling parameters of the requests that get a token, [7, requests] int32."""
        self._prepare(requests_in_batch)
        self._choosing = [future.state for future in requests_in_batch if future.has_new_token]
        rows = [_sampling_row(state) for state in self._choosing]
        self._sampled = any(row[0] > 0 for row in rows)
        if self._sampled:
            floats = torch.tensor([row[:3] for row in rows], dtype=torch.float32).view(torch.int32)
            integers = torch.tensor([row[3:] for row in rows], dtype=torch.int64).int()
            packed = torch.cat([floats, integers], dim=1).t()
            arg_storage[:, : len(rows)] = packed.to(arg_storage.device)
        return arg_storage

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        logits_processor_args: torch.Tensor,
    ) -> torch.Tensor:
        """Return scores whose argmax is the next token; a plainly greedy batch passes untouched."""
        raw, scores = scores, self._edit(scores)
        if self._sampled:
            scores = self._perturb(scores, logits_processor_args)
        self._note(raw, scores)
        return scores

    def _edit(self, scores: torch.Tensor) -> torch.Tensor:
        """Let each request's history change its logits, where it asks for that."""
        edited = [
            (row, asked(state), answer(state))
            for row, state in enumerate(self._choosing)
            if asked(state).history_matters
        ]
        if edited:
            scores = scores.clone()
        for row, request, said in edited:
            scores[row] = _edited(scores[row], request, said, self._end_ids)
        return scores

    def _note(self, raw: torch.Tensor, scores: torch.Tensor) -> None:
        """Keep the log-probabilities of those who asked for them."""
        for row, state in enumerate(self._choosing):
            count = asked(state).sampling.logprobs
            wanted = self._logprobs.get(state.request_id)
            if count is not None and wanted is not None:
                logprobs = raw[row].float().log_softmax(-1)
                values, tokens = logprobs.topk(count)
                likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
                chosen = logprobs[scores[row].argmax()].item()
                wanted.append(TokenLogprob(chosen, likeliest))

    def _perturb(self, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        rows = logits_processor_args[:, : scores.shape[0]]
        low, high = rows[self.SEED_LOW].long(), rows[self.SEED_HIGH].long()
        return perturb(
            scores,
            temperature=rows[self.TEMPERATURE].contiguous().view(torch.float32),
            top_p=rows[self.TOP_P].contiguous().view(torch.float32),
            min_p=rows[self.MIN_P].contiguous().view(torch.float32),
            top_k=rows[self.TOP_K].long(),
            seed=(high << 32) | (low & 0xFFFFFFFF),
            position=rows[self.POSITION].long(),
        )


def _edited(
    logits: torch.Tensor, request: GenerationRequest, said: list[int], end_ids: frozenset[int]
) -> torch.Tensor:
    """Return one row of logits after penalties, with what may not come next at -inf."""
    sampling = request.sampling
    logits = penalise(
        logits,
        prompt=request.tokens,
        answer=said,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
    )
    if len(said) < sampling.min_tokens:
        logits[sorted(end_ids.union(sampling.stop_token_ids))] = -torch.inf
    if request.constraint is not None:
        allowed = request.constraint.allowed(said).to(logits.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits


def _sampling_row(state: RequestState) -> tuple[float, float, float, int, int, int, int]:
    request = asked(state)
    # the position in the sequence, not a count of tokens: it survives a request's re-prefill
    return (
        request.sampling.temperature,
        request.sampling.top_p,
        request.sampling.min_p,
        request.sampling.top_k,
        request.seed & 0xFFFFFFFF,
        request.seed >> 32,
        state.position_offset,
    )
