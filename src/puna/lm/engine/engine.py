"""The engine: many requests at once, each step one forward over what they all need next.

Continuous batching: a step computes one token of every request that decodes, packed without
padding, and up to ``chunk_tokens`` of prompts that are not computed yet. Requests join and leave
between steps. A request is admitted when the cache has room for all it may come to need, so that a
running request never waits for memory.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch

from puna.core.errors import PunaError
from puna.lm.engine.forward import Forward, Result
from puna.lm.engine.memory import default_cache_tokens
from puna.lm.engine.pool import KVPool
from puna.lm.engine.sample import token_logprobs
from puna.lm.engine.sequence import Sequence, Work, check_request
from puna.lm.engine.types import EngineStats, Event, Finish, Request
from puna.model.llama import Llama

Backend = Literal["auto", "torch"]


class Engine:
    """Generates for every caller; one thread drives it.

    Everything but ``stats`` belongs to the thread that calls :meth:`step`; other threads hand their
    requests to that thread.

    Args:
        model: On any device; it may be shared, its parameters must not change.
        max_batch: Most requests that run at once.
        max_cache_tokens: Most tokens in the cache; None: what half of the free memory holds, at
            most what ``max_batch`` requests of full context need.
        chunk_tokens: Most prompt tokens of a step. Bounds the memory of a forward, and how long the
            decoding requests wait for a prompt that comes in.
        batch_invariant: The tokens and logprobs of a request are bitwise those it gets alone. None:
            where this costs less than a tenth (float32 and int8 on a CPU).
        backend: ``auto`` decodes by the compiled step on a CPU; ``torch`` uses PyTorch alone.

    Raises:
        ValueError: A size is below one.
    """

    def __init__(
        self,
        model: Llama,
        *,
        max_batch: int = 64,
        max_cache_tokens: int | None = None,
        chunk_tokens: int = 512,
        batch_invariant: bool | None = None,
        backend: Backend = "auto",
    ) -> None:
        if any(
            size is not None and size < 1 for size in (max_batch, chunk_tokens, max_cache_tokens)
        ):
            raise ValueError("max_batch, chunk_tokens and max_cache_tokens must be at least 1")
        self.model, self.config = model, model.config
        self._max_batch, self._chunk_tokens = max_batch, chunk_tokens
        weight = model.norm.weight
        if max_cache_tokens is None:
            max_cache_tokens = default_cache_tokens(
                model.config, weight.dtype, weight.device, max_batch
            )
        self.pool = KVPool(model.config, weight.dtype, weight.device, max_cache_tokens)
        self._forward = Forward(model, self.pool, backend, batch_invariant)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._known: dict[str, Sequence] = {}
        self._ready: list[Event] = []
        self._n_reserved = 0
        self._totals = EngineStats()

    @property
    def batch_invariant(self) -> bool:
        """Whether results have the same bits whatever else runs."""
        return self._forward.is_invariant

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has something to do or to tell."""
        return bool(self._known or self._ready)

    @property
    def stats(self) -> EngineStats:
        """The counts now."""
        pool, totals = self.pool, self._totals
        return EngineStats(
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            used_blocks=pool.used_blocks,
            reserved_blocks=self._n_reserved,
            total_blocks=pool.max_blocks,
            allocated_blocks=pool.n_blocks,
            block_tokens=pool.block_tokens,
            cache_bytes=pool.n_bytes,
            n_steps_total=totals.n_steps_total,
            prompt_tokens_total=totals.prompt_tokens_total,
            generated_tokens_total=totals.generated_tokens_total,
            finished_total=dict(totals.finished_total),
        )

    def submit(self, request: Request) -> None:
        """Queue a request; first come, first served.

        Raises:
            PunaError: It can never run: the prompt is empty, longer than the context or holds an
                unknown id, or the cache is too small for prompt and ``max_new_tokens``.
            ValueError: The engine already holds a request of this id.
        """
        if request.request_id in self._known:
            raise ValueError(f"request id {request.request_id!r} is in use")
        check_request(request, self.config)
        sequence = Sequence(request, self.config)
        if self.pool.blocks_for(sequence.most_cached) > self.pool.max_blocks:
            room = self.pool.max_blocks * self.pool.block_tokens
            raise PunaError(
                f"prompt and max_new_tokens need {sequence.most_cached} tokens of cache, the "
                f"cache holds {room}",
                "shorten the prompt, lower max_new_tokens, or raise max_cache_tokens",
            )
        self._known[request.request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request now; its cache is free at once, its last event comes with the next step.

        Nothing happens when there is no such request (it may have ended on its own).
        """
        sequence = self._known.get(request_id)
        if sequence is not None:
            self._remove(sequence, "cancelled")
            self._ready.append(Event(request_id, None, finish="cancelled"))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute the next tokens and return what happened; empty when there is no work."""
        self._admit()
        work = self._plan()
        if not work:
            events, self._ready = self._ready, []
            return events
        for item in work:
            self._reserve_slots(item)
        results = self._forward.run(work)
        for item in work:
            sequence = item.sequence
            self._totals.prompt_tokens_total += 0 if sequence.is_decoding else item.n_tokens
            sequence.n_computed += item.n_tokens
        self._totals.n_steps_total += 1
        for result in results:
            self._take(result)
        events, self._ready = self._ready, []
        return events

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_batch:
            n_blocks = self.pool.blocks_for(self._waiting[0].most_cached)
            if self._n_reserved + n_blocks > self.pool.max_blocks:
                return
            self._n_reserved += n_blocks
            self._running.append(self._waiting.popleft())

    def _plan(self) -> list[Work]:
        """Return this step's work: decoding sequences first, then prompts in order of arrival."""
        work = [Work(sequence, 1) for sequence in self._running if sequence.is_decoding]
        budget = self._chunk_tokens
        for sequence in self._running:
            if sequence.is_decoding:
                continue
            n_tokens = sequence.n_pending
            if self._forward.is_invariant:
                # Boundaries at multiples of chunk_tokens, whatever else is computed.
                n_tokens = min(n_tokens, self._chunk_tokens)
                if n_tokens > budget:
                    break
            n_tokens = min(n_tokens, budget)
            if n_tokens:
                work.append(Work(sequence, n_tokens))
            budget -= n_tokens
        return work

    def _reserve_slots(self, item: Work) -> None:
        sequence = item.sequence
        needed = self.pool.blocks_for(sequence.n_computed + item.n_tokens)
        if needed > len(sequence.blocks):
            sequence.add_blocks(self.pool.take(needed - len(sequence.blocks)))

    def _take(self, result: Result) -> None:
        """Choose the next token of a sequence whose known tokens are all computed."""
        sequence = result.sequence
        request = sequence.request
        if not result.is_finite:
            error = PunaError(
                f"the model's logits are not finite (NaN or infinity) after "
                f"{sequence.n_computed} tokens",
                "check the checkpoint: its training diverged, or float16 overflowed (use bfloat16)",
            )
            self._remove(sequence, "error")
            self._ready.append(Event(request.request_id, None, finish="error", error=error))
            return
        if result.logits_V is None:
            return
        if sequence.sampler.is_argmax:
            token = result.best_id
        else:
            token = sequence.sampler.choose(result.logits_V.cpu().numpy())
        logprob = None
        if request.logprobs is not None and token not in request.stop_ids:
            [logprob] = token_logprobs(result.logits_V[None], [token], request.logprobs)
        event = sequence.accept(token, logprob)
        self._totals.generated_tokens_total += event.token is not None
        if event.finish is not None:
            self._remove(sequence, event.finish)
        self._ready.append(event)

    def _remove(self, sequence: Sequence, finish: Finish) -> None:
        del self._known[sequence.request.request_id]
        if sequence in self._running:
            self._running.remove(sequence)
            self._n_reserved -= self.pool.blocks_for(sequence.most_cached)
            self.pool.give_back(sequence.drop_blocks())
        else:
            self._waiting.remove(sequence)
        self._totals.finished_total[finish] += 1
