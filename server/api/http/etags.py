"""If-Match and If-None-Match, strictly, and what the registry takes them as. Knows no route."""

from string import hexdigits
from typing import Annotated

from fastapi import Depends, Request

from server.errors import InvalidRequest, shown

MAX_TAGS = 16
TAG_CHARS = 32
NOTHING = "none"  # no thing's tag


def condition(request: Request) -> str:
    """ "" without a header, "absent" for `If-None-Match: *`, "*", or the tags of If-Match joined by commas.

    Raises InvalidRequest.
    """
    match, none_match = (_header(request, name) for name in ("if-match", "if-none-match"))
    if none_match is None:
        return "" if match is None else _tags(match)
    if match is not None or none_match != "*":
        raise InvalidRequest(
            "If-None-Match can only be *, without an If-Match, on a request that changes something.",
            param="If-None-Match",
        )
    return "absent"


def match_only(request: Request) -> str:
    """The same for what must be there anyway: If-None-Match is refused."""
    found = condition(request)
    if found == "absent":
        raise InvalidRequest("This request takes If-Match, not If-None-Match.", param="If-None-Match")
    return found


Condition = Annotated[str, Depends(condition)]
MatchOnly = Annotated[str, Depends(match_only)]


def etag_header(etag: str) -> dict[str, str]:
    return {"ETag": f'"{etag}"'} if etag else {}


def _header(request: Request, name: str) -> str | None:
    found = request.headers.getlist(name)
    if len(found) > 1:
        raise InvalidRequest(f"{name} came {len(found)} times; send it once.", param=name)
    return found[0].strip() if found else None


def _tags(header: str) -> str:
    """A weak tag, or one that we never gave, matches nothing."""
    if header == "*":
        return header
    tags = [tag.strip() for tag in header.split(",")]
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"If-Match has {len(tags)} tags, more than {MAX_TAGS}.", param="If-Match")
    for tag in tags:
        bare = tag.removeprefix("W/")
        if len(bare) < 2 or bare[0] + bare[-1] != '""' or '"' in bare[1:-1]:
            raise InvalidRequest(
                f'If-Match must be * or ETags in quotes, like "abc", not {shown(header)}.', param="If-Match"
            )
    ours = [tag[1:-1] for tag in tags if len(tag) == TAG_CHARS + 2 and not set(tag[1:-1]) - set(hexdigits)]
    return ",".join(ours) or NOTHING
