"""A prompt's tokens, and where each of them and each part stands in the text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A tokenized prompt and the spans of its parts."""

    token_ids: list[int]
    text: str
    offsets: list[tuple[int, int]]
    """[start, end) of every token in `text`, in characters; tokens that share a character
    overlap."""
    document_span: tuple[int, int]
    """[first, last) token that touches the document."""
    document_characters: tuple[int, int]
    question_span: tuple[int, int]
    question: str
    original_length: int
    """Tokens before the middle of the document was cut out."""
    chat_template: bool = True

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        """Whether the middle of the document was cut out."""
        return self.original_length != self.length

    def document_part(self, question: str) -> EncodedPrompt:
        """The prompt up to the end of the document, for a question that is fed later."""
        end = self.document_characters[1]
        count = next(
            (index for index, (_, right) in enumerate(self.offsets) if right > end), self.length
        )
        cut = self.original_length - self.length
        return EncodedPrompt(
            token_ids=self.token_ids[:count],
            text=self.text[:end],
            offsets=self.offsets[:count],
            document_span=(self.document_span[0], count),
            document_characters=self.document_characters,
            question_span=(0, 0),
            question=question,
            original_length=count + cut,
            chat_template=self.chat_template,
        )

    def utf16_offsets(self) -> list[list[int]]:
        """`offsets` in UTF-16 units, which is how browsers count."""
        units = _utf16_positions(self.text)
        return [[units[start], units[end]] for start, end in self.offsets]

    def document_utf16_span(self) -> list[int]:
        """`document_characters` in UTF-16 units."""
        units = _utf16_positions(self.text)
        start, end = self.document_characters
        return [units[start], units[end]]


def _utf16_positions(text: str) -> list[int]:
    """UTF-16 position of every character boundary of `text`, len(text) + 1 numbers."""
    positions = [0]
    for character in text:
        positions.append(positions[-1] + (2 if ord(character) > 0xFFFF else 1))
    return positions
