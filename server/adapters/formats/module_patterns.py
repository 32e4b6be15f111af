"""PEFT's rank_pattern and alpha_pattern keys: a subset of regular expressions, matched in linear time.

PEFT evaluates `re.match(r"(.*\\.)?(KEY)$", module)`. An uploaded expression could take exponential time, so
only this subset is read, and a key is matched in one pass over the name:

    x        itself: letters, digits, _ and -       \\.        a dot
    .        any one character                       \\d [0-9]  one digit, or with + several
    .* .+    any characters                          [qkv]     one of these; ranges, too
    (a|b)    one or the other, of anything here      ^ ... $   at the ends only

A key with alternatives is expanded: `layers.(0|1).[qk]_proj` becomes two keys.
"""

from string import ascii_letters, digits

from server.errors import InvalidAdapter, shown

MAX_KEY = 256  # characters
MAX_ALTERNATIVES = 256  # of a key
MAX_DEPTH = 8  # of nested brackets
MAX_KEYS = 1024  # after expansion
MAX_WILD = 64  # of these, with * or +
LITERALS = frozenset(ascii_letters + digits + "_-")
ANY = "any"
QUANTIFIERS = ("*", "+", "?", "{")

Step = tuple[str, str]  # (ANY or the characters it accepts, "" or "*" or "+")
START, END = ("^", ""), ("$", "")


class Chain:
    """A key without alternatives, as bit masks over its steps: which accept a character, which repeat."""

    def __init__(self, steps: list[Step]) -> None:
        """Raises _UnknownError for ^ that is not first or $ that is not last."""
        self.from_start = steps[:1] == [START]
        inner = steps[self.from_start : len(steps) - (steps[-1:] == [END])]
        if START in inner or END in inner:
            raise _UnknownError
        self.size = 0
        self.takes: dict[str, int] = {}  # ANY or a character -> steps that accept it
        self.repeats = 0
        self.optional = 0
        for kind, repeat in inner:
            self._append(kind, repeat)

    @property
    def is_wild(self) -> bool:
        return self.repeats != 0

    def matches(self, name: str) -> bool:
        """Whether PEFT's expression matches. One pass; `reached` is the set of steps that may come next."""
        if not self.is_wild:  # the usual key: a module's name, or its end
            start = len(name) - self.size
            begins = start == 0 or (start > 0 and name[start - 1] == "." and not self.from_start)
            return begins and all(self._takers(name[start + i]) >> i & 1 for i in range(self.size))
        reached = 1
        for character in name:
            taken = self._skip(reached) & self._takers(character)
            reached = taken << 1 | taken & self.repeats
            if character == "." and not self.from_start:
                reached |= 1  # the key may start after any dot
        return bool(self._skip(reached) >> self.size & 1)

    def _append(self, kind: str, repeat: str) -> None:
        step = 1 << self.size
        if repeat == "*" and self.optional & step >> 1:
            return  # ".*.*" is ".*": two adjacent optional steps would need more than one skip
        for taken in [ANY] if kind == ANY else kind:
            self.takes[taken] = self.takes.get(taken, 0) | step
        self.repeats |= step if repeat else 0
        self.optional |= step if repeat == "*" else 0
        self.size += 1

    def _takers(self, character: str) -> int:
        return self.takes.get(ANY, 0) | self.takes.get(character, 0)

    def _skip(self, reached: int) -> int:
        return reached | (reached & self.optional) << 1


class Pattern:
    """One key, as the chains it expands to."""

    def __init__(self, key: str, field: str) -> None:
        """Raises InvalidAdapter for a key outside of the subset."""
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidAdapter(
                f"{field} has a key of {len(key)} characters; it must have 1 to {MAX_KEY}.", param=field
            )
        try:
            self.chains = [Chain(steps) for steps in _Reader(key).whole()]
        except _UnknownError:
            raise InvalidAdapter(
                f"{field} has the key {shown(key)}; a key may hold letters, digits, '_', '-', '.', '\\d', "
                "'[abc]', '(a|b)', '.*', '+' after '.' or '\\d', '^' at its start and '$' at its end, and "
                f"stand for {MAX_ALTERNATIVES} others.",
                param=field,
            ) from None

    def matches(self, name: str) -> bool:
        return any(chain.matches(name) for chain in self.chains)


class Patterns:
    """A rank_pattern or alpha_pattern as pairs (key, value). Raises InvalidAdapter for too many."""

    def __init__(self, pairs: list[tuple[str, float]], field: str) -> None:
        self._pairs: list[tuple[Pattern, float]] = []
        count = wild = 0
        for key, value in pairs:
            pattern = Pattern(key, field)
            self._pairs.append((pattern, value))
            count += len(pattern.chains)
            wild += sum(chain.is_wild for chain in pattern.chains)
            if count > MAX_KEYS or wild > MAX_WILD:
                raise InvalidAdapter(
                    f"{field} has too many keys; with alternatives written out it may have {MAX_KEYS}, of "
                    f"which {MAX_WILD} with '*' or '+'.",
                    param=field,
                )

    def value(self, name: str, default: float) -> float:
        """The value of the first key that matches, as PEFT chooses it."""
        return next((value for pattern, value in self._pairs if pattern.matches(name)), default)


class _UnknownError(ValueError):
    """The key is outside of the subset."""


class _Reader:
    """Parses a key from left to right. Each method returns all expansions of the part it reads."""

    def __init__(self, key: str) -> None:
        self.rest = key
        self.depth = 0

    def whole(self) -> list[list[Step]]:
        chains = self._alternatives()
        if self.rest:  # a bracket that closes nothing
            raise _UnknownError
        return chains

    def _alternatives(self) -> list[list[Step]]:
        found = self._sequence()
        while self._took("|"):
            found += self._sequence()
            _check_count(len(found))
        return found

    def _sequence(self) -> list[list[Step]]:
        found: list[list[Step]] = [[]]
        while self.rest and self.rest[0] not in "|)":
            if self.rest[0] == "(":
                parts = self._group()
                _check_count(len(found) * len(parts))
                found = [before + part for before in found for part in parts]
            else:
                step = self._step()
                for chain in found:
                    chain.append(step)
        return found

    def _group(self) -> list[list[Step]]:
        if not self._took("(?:"):
            self._took("(")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _UnknownError
        found = self._alternatives()
        self.depth -= 1
        if not self._took(")") or self.rest.startswith(QUANTIFIERS):
            raise _UnknownError
        return found

    def _step(self) -> Step:
        kind = self._kind()
        repeats = {ANY: ("*", "+"), digits: ("+",)}.get(kind, ())
        repeat = next((sign for sign in repeats if self._took(sign)), "")
        if self.rest.startswith(QUANTIFIERS):
            raise _UnknownError
        return kind, repeat

    def _kind(self) -> str:
        """ANY, or the characters that may stand here; or an anchor."""
        if self._took("\\d"):
            return digits
        if self._took("\\."):
            return "."
        if self._took("["):
            return self._class()
        if self._took("."):
            return ANY
        character, self.rest = self.rest[0], self.rest[1:]
        if character not in LITERALS and character not in "^$":
            raise _UnknownError
        return character

    def _class(self) -> str:
        inner, bracket, self.rest = self.rest.partition("]")
        found: set[str] = set()
        while inner:
            first, sign, last = inner[0], inner[1:2], inner[2:3]
            if sign != "-":
                sign, last = "", first
            if not {first, last} <= LITERALS - {"-"} or last < first:
                raise _UnknownError
            found.update(map(chr, range(ord(first), ord(last) + 1)))
            inner = inner[3 if sign else 1 :]
        if not bracket or not found:
            raise _UnknownError
        return "".join(sorted(found))

    def _took(self, text: str) -> bool:
        rest = self.rest.removeprefix(text)
        taken, self.rest = rest != self.rest, rest
        return taken


def _check_count(count: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise _UnknownError
