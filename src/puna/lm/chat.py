"""A conversation with a model: history in the model's chat format, kept inside the context."""

from __future__ import annotations

from collections.abc import Generator

from puna.core.errors import PunaError
from puna.lm.language_model import LanguageModel
from puna.lm.text import Completion
from puna.model.sampling import Sampling


class ChatSession:
    """Keeps the turns of a conversation and streams the answers.

    When the history no longer leaves room for an answer, its oldest turns are forgotten (the system
    message stays).

    Args:
        language_model: With a tokenizer that knows a chat format.
        sampling: How to choose tokens; ``max_new_tokens`` is the room kept for an answer. Turn n
            since the beginning or the last reset draws with ``seed + n``.
        system: System message; empty for none.

    Raises:
        PunaError: The tokenizer has no chat format.
    """

    def __init__(self, language_model: LanguageModel, sampling: Sampling, system: str = "") -> None:
        self.language_model, self.sampling = language_model, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self.n_forgotten = 0  # turns that the last message pushed out of the history
        self._n_asked = 0
        language_model.tokenizer.encode_chat([*self._system, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forget the conversation, not the system message."""
        self.turns, self.n_forgotten, self._n_asked = [], 0, 0

    def ask(self, text: str) -> Generator[str, None, Completion]:
        """Yield the answer to a message piece by piece; return its completion.

        The turn becomes part of the history when the answer has ended, also when the caller stops
        listening early (what was said until then is kept).

        Raises:
            PunaError: The message alone does not fit into the context.
        """
        question = {"role": "user", "content": text}
        history, prompt_ids = self._fit(question)
        self.n_forgotten = len(self.turns) - len(history)
        said: list[str] = []
        seed = (self.sampling.seed + self._n_asked) % 2**63
        self._n_asked += 1
        sampling = self.sampling.model_copy(update={"seed": seed})
        pieces = self.language_model.stream_ids(prompt_ids, sampling)
        try:
            while True:
                piece = next(pieces)
                said.append(piece)
                yield piece
        except StopIteration as end:
            return end.value
        finally:
            answer = {"role": "assistant", "content": "".join(said)}
            self.turns = [*history, question, answer]

    def _fit(self, question: dict[str, str]) -> tuple[list[dict[str, str]], list[int]]:
        limit = self.language_model.max_seq_len
        room = min(self.sampling.max_new_tokens, limit // 2)
        history = self.turns
        while True:
            messages = [*self._system, *history, question]
            prompt_ids = self.language_model.tokenizer.encode_chat(messages)
            if len(prompt_ids) + room <= limit or (not history and len(prompt_ids) <= limit):
                return history, prompt_ids
            if not history:
                raise PunaError(
                    f"the message has {len(prompt_ids)} tokens in chat format, the model's context "
                    f"is {limit}",
                    "write a shorter message",
                )
            history = history[2:]  # a question with its answer
