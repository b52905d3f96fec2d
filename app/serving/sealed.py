"""No surprise reaches a visitor or the log as it is: an unexpected error becomes one sentence for
the one, and its kind and place, without its text, for the other.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Sealed = TypeVar("Sealed", bound=Callable[..., Any])
SENTENCE = "This request could not be carried out: check its values and their types."


def sealed(told: type[Exception], tell: Callable[[str], Exception]) -> Callable[[Sealed], Sealed]:
    """Decorate a class, or a function: its public methods raise `told`, or what `tell` makes of a
    sentence.

    Args:
        told: errors that carry a sentence for the visitor already.
        tell: makes one.
    """

    @contextmanager
    def guard(name: str) -> Iterator[None]:
        try:
            yield
        except told:
            raise
        except Exception as error:
            log.error("unexpected error", exc_info=error, extra={"handler": name})
            raise tell(SENTENCE) from None

    def seal(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def later(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                with guard(name):
                    async for value in function(*args, **kwargs):
                        yield value

            return later
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def in_turn(*args: Any, **kwargs: Any) -> Iterator[Any]:
                with guard(name):
                    yield from function(*args, **kwargs)

            return in_turn

        @functools.wraps(function)
        def at_once(*args: Any, **kwargs: Any) -> Any:
            with guard(name):
                return function(*args, **kwargs)

        return at_once

    def decorate(found: Any) -> Any:
        if not inspect.isclass(found):
            return seal(found)
        for name, member in list(vars(found).items()):
            if name.startswith("_"):
                continue
            if isinstance(member, staticmethod):
                setattr(found, name, staticmethod(seal(member.__func__)))
            elif inspect.isfunction(member):
                setattr(found, name, seal(member))
        return found

    return decorate
