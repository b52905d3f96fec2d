"""Question after question on one compressed cache: each answer stays, nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence

from dynamickv.answer import select
from dynamickv.cache import prune
from dynamickv.decoding.decode import TextStream, decode, extend
from dynamickv.decoding.forgetting import Choice, forgetting_of
from dynamickv.methods import CompressionMethod
from dynamickv.methods.decoding import Decoding, require_decodable
from dynamickv.models import LoadedModel
from dynamickv.models.geometry import require_choosable
from dynamickv.reading.prompt import require_text
from dynamickv.reading.template import follow_up_ids
from dynamickv.records import Prefill


class Conversation:
    """One prompt compressed once by one method, then any number of follow-up questions.

    What the method kept of the prompt stays; answers and follow-up questions are kept whole. With
    `decoding` the method chooses again among all of it as the conversation grows.

    Raises:
        ValueError: a prefill without a question, a choice that the model's cache cannot hold, or a
            method that cannot go on with `decoding`.
    """

    def __init__(
        self,
        llm: LoadedModel,
        prefill: Prefill,
        method: CompressionMethod,
        decoding: Decoding | None = None,
    ) -> None:
        if not prefill.question_aware:
            raise ValueError("a conversation starts with a question; prefill one with the document")
        require_choosable(llm.geometry, method.parameters)
        if method.capabilities.capacity:
            require_decodable(decoding, method, llm.geometry.joint)
        self._llm = llm
        self.retention = select(method if decoding is None else decoding.of_prompt(method), prefill)
        self._cache = prune(prefill, self.retention, room=0)
        self._forgetting = forgetting_of(method, decoding, prefill, self._cache)
        self._logits = prefill.logits
        self._position = prefill.length
        self._last: int | None = None
        """The last answer's last token, which the cache has not seen yet."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held now."""
        return self._cache.nbytes

    @property
    def choices(self) -> list[Choice]:
        """With `decoding`, the choices since the prompt, in order."""
        return [] if self._forgetting is None else self._forgetting.choices

    def answer(self, max_new_tokens: int = 64) -> str:
        """Answer the prompt's own question; call it first, once."""
        if self._last is not None:
            raise ValueError("the first question is answered already; ask a follow-up question")
        return self._decode(max_new_tokens)

    def said(self, token_ids: Sequence[int]) -> None:
        """Take the first answer as given, such as a record's, in one pass instead of decoding it;
        instead of `answer`.

        Raises:
            ValueError: an answer of no tokens, or the first question is answered already.
        """
        if self._last is not None:
            raise ValueError("the first question is answered already; ask a follow-up question")
        if not token_ids:
            raise ValueError("an answer of no tokens cannot be gone on from; call answer()")
        *fed, self._last = token_ids
        if fed:
            extend(self._llm, self._cache, fed, self._position, self._forgetting)
        self._position += len(fed)

    def ask(self, question: str, max_new_tokens: int = 64) -> str:
        """Answer a follow-up question.

        Raises:
            ValueError: an empty question, no first answer yet, or no positions left.
        """
        require_text("question", question)
        if self._last is None:
            raise ValueError("the prompt's own question comes first; call answer()")
        new = follow_up_ids(self._llm.tokenizer, question)
        if new[:1] != [self._last]:
            new = [self._last, *new]
        limit = self._llm.geometry.max_positions
        if self._position + len(new) >= limit:
            raise ValueError(
                f"the conversation has {self._position + len(new):,} tokens and this model reads "
                f"{limit:,}; start a new one"
            )
        self._logits = extend(self._llm, self._cache, new, self._position, self._forgetting)
        self._position += len(new)
        return self._decode(max_new_tokens)

    def _decode(self, max_new_tokens: int) -> str:
        text = TextStream(self._llm)
        steps = decode(
            self._llm,
            self._cache,
            self._logits,
            self._position,
            max_new_tokens,
            forgetting=self._forgetting,
            ahead=True,
        )
        for step in steps:
            text.push(step.token_id, final=step.last is not None)
            self._last = step.token_id
            if step.last is None:
                self._position += 1
                if self._forgetting is not None:
                    self._forgetting.make_room(1)
        return text.text
