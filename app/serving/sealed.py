"""No surprise reaches a visitor or the log as it is: an unexpected error becomes one sentence for
the one, and its kind and place, without its text, for the other.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Class = TypeVar("Class", bound=type)
SENTENCE = "This request could not be carried out: check its values and their types."


def sealed(told: type[Exception], tell: Callable[[str], Exception]) -> Callable[[Class], Class]:
    """Decorate a class: its public methods raise `told`, or what `tell` makes of a sentence.

    Args:
        told: errors that carry a sentence for the visitor already.
        tell: makes one.
    """

    def surprise(error: Exception, name: str) -> Exception:
        log.error("unexpected error", exc_info=error, extra={"handler": name})
        return tell(SENTENCE)

    def seal(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def later(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                try:
                    async for value in function(*args, **kwargs):
                        yield value
                except told:
                    raise
                except Exception as error:
                    raise surprise(error, name) from None

            return later
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def in_turn(*args: Any, **kwargs: Any) -> Iterator[Any]:
                try:
                    yield from function(*args, **kwargs)
                except told:
                    raise
                except Exception as error:
                    raise surprise(error, name) from None

            return in_turn

        @functools.wraps(function)
        def at_once(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except told:
                raise
            except Exception as error:
                raise surprise(error, name) from None

        return at_once

    def decorate(cls: Class) -> Class:
        for name, member in list(vars(cls).items()):
            if name.startswith("_"):
                continue
            if isinstance(member, staticmethod):
                setattr(cls, name, staticmethod(seal(member.__func__)))
            elif inspect.isfunction(member):
                setattr(cls, name, seal(member))
        return cls

    return decorate
