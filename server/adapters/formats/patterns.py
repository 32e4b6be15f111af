"""PEFT's rank_pattern and alpha_pattern keys: regular expressions, matched without an engine for them.

PEFT asks `re.match(r"(.*\\.)?(KEY)$", module)`. A tenant's regular expression can take exponential time, so
only what people write is understood, and it is matched in one pass over the name, whatever the key:

    x        itself: letters, digits, _ and -       \\.        a dot
    .        any one character                       \\d [0-9]  one digit, or with + several
    .* .+    any characters                          ^ ... $   at the ends only
"""

from string import ascii_letters, digits

from server.errors import InvalidAdapter, shown

MAX_KEY = 128  # characters
MAX_KEYS = 1024
MAX_WILD = 64  # keys with * or +
LITERALS = frozenset(ascii_letters + digits + "_-")
DIGIT_CLASSES = ("\\d", "[0-9]")
ANY, DIGIT = "any", "digit"


class Pattern:
    """One key. Bit i of every mask is about step i: which characters it takes, whether it repeats."""

    def __init__(self, key: str, field: str) -> None:
        """Raises InvalidAdapter for a key that uses more of the regular expressions than this."""
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidAdapter(
                f"{field} has a key of {len(key)} characters; it must have 1 to {MAX_KEY}.", param=field
            )
        rest = key.removeprefix("^")
        self.from_start = rest != key
        rest = rest if rest.endswith("\\$") else rest.removesuffix("$")
        self.size = 0
        self.takes: dict[str, int] = {}  # by ANY, DIGIT, or the character
        self.repeats = 0
        self.optional = 0
        while rest:
            kind, rest = _next_kind(rest, key, field)
            repeat = (
                rest[:1]
                if rest[:1] in ("*", "+") and (kind == ANY or (kind, rest[0]) == (DIGIT, "+"))
                else ""
            )
            rest = rest.removeprefix(repeat)
            self._append(kind, repeat)

    @property
    def is_wild(self) -> bool:
        return self.repeats != 0

    def matches(self, name: str) -> bool:
        """Whether PEFT's expression would. One pass: `reached` is the set of steps that may come next."""
        if not self.is_wild:  # the usual key: a module's name, or its end
            start = len(name) - self.size
            begins = start == 0 or (start > 0 and name[start - 1] == "." and not self.from_start)
            return begins and all(self._takers(name[start + i]) >> i & 1 for i in range(self.size))
        reached = 1
        for character in name:
            taken = self._skip(reached) & self._takers(character)
            reached = taken << 1 | taken & self.repeats
            if character == "." and not self.from_start:
                reached |= 1  # the key may begin anew behind a dot
        return bool(self._skip(reached) >> self.size & 1)

    def _append(self, kind: str, repeat: str) -> None:
        step = 1 << self.size
        if repeat == "*" and self.optional & step >> 1:
            return  # ".*.*" is ".*": so that no two optional steps stand together
        self.takes[kind] = self.takes.get(kind, 0) | step
        self.repeats |= step if repeat else 0
        self.optional |= step if repeat == "*" else 0
        self.size += 1

    def _takers(self, character: str) -> int:
        by_class = self.takes.get(ANY, 0) | (self.takes.get(DIGIT, 0) if character in digits else 0)
        return by_class | self.takes.get(character, 0)

    def _skip(self, reached: int) -> int:
        return reached | (reached & self.optional) << 1


class Patterns:
    """A whole rank_pattern or alpha_pattern, as (key, value) pairs in the order they were written."""

    def __init__(self, pairs: list[tuple[str, float]], field: str) -> None:
        self._pairs = [(Pattern(key, field), value) for key, value in pairs]
        wild = sum(pattern.is_wild for pattern, _ in self._pairs)
        if len(self._pairs) > MAX_KEYS or wild > MAX_WILD:
            allowed = f"it may have {MAX_KEYS}, of which {MAX_WILD} with '*' or '+'"
            raise InvalidAdapter(
                f"{field} has {len(self._pairs)} and {wild} such keys; {allowed}.", param=field
            )

    def value(self, name: str, default: float) -> float:
        """The value of the first key that matches, as PEFT chooses it."""
        return next((value for pattern, value in self._pairs if pattern.matches(name)), default)


def _next_kind(rest: str, key: str, field: str) -> tuple[str, str]:
    """The class or character that the key begins with, and what follows it."""
    for digit_class in DIGIT_CLASSES:
        if rest.startswith(digit_class):
            return DIGIT, rest.removeprefix(digit_class)
    if rest.startswith("\\."):
        return ".", rest[2:]
    if rest[0] == ".":
        return ANY, rest[1:]
    if rest[0] in LITERALS:
        return rest[0], rest[1:]
    raise InvalidAdapter(
        f"{field} has the key {shown(key)}; a key may hold letters, digits, '_', '-', '.', '\\d', '[0-9]', "
        "'.*', '+' after a class, '^' at its start and '$' at its end.",
        param=field,
    )
