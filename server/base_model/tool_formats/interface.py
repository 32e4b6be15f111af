"""What a format of function calls says: the texts before, between and after calls, as a model writes them.

prefix [before HEAD arguments TAIL after] separator [before HEAD arguments TAIL after] ... suffix
"""

from collections.abc import Sequence
from dataclasses import dataclass

NAME = "NAME"  # stands for the function's name in `head`


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes function calls. `head` and `tail` enclose the arguments, a JSON object.

    A head that starts with "{" makes the whole call one JSON object, whose fields may come in any order; any
    other head stands before the arguments alone.
    """

    name: str
    head: str
    tail: str = ""
    prefix: str = ""  # before all calls
    suffix: str = ""
    before: str = ""  # before each call
    after: str = ""
    separator: str = ""  # between two calls
    markers: tuple[str, ...] = ()  # tokens among these texts, which a tokenizer may call special
    begin: str = ""  # by which calls are found within a text: prefix or before starts with it
    bare: bool = False  # an answer that starts with "{" or "[" is calls, without `begin`
    call_id: str = ""  # may stand before an id, between the name and the rest of the head
    in_template: tuple[
        str, ...
    ] = ()  # all of these are in the source of a chat template that has this format
    not_in_template: tuple[str, ...] = ()  # ... and none of these
    id_chars: int | None = None  # a template of this format takes ids of so many letters and digits only

    def fits(self, template: str) -> bool:
        """Whether a chat template, by its source, writes calls in this format."""
        return (
            bool(self.in_template)
            and all(mark in template for mark in self.in_template)
            and not any(mark in template for mark in self.not_in_template)
        )

    @property
    def wrapped(self) -> bool:
        """A call is one JSON object."""
        return self.head.startswith("{")

    def head_of(self, name: str) -> str:
        return self.head.replace(NAME, name)

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, each (name, arguments as JSON), as the model writes them."""
        each = [
            f"{self.before}{self.head_of(name)}{arguments}{self.tail}{self.after}"
            for name, arguments in calls
        ]
        return f"{self.prefix}{self.separator.join(each)}{self.suffix}"
