"""If-Match and If-None-Match, read strictly, as the condition that the registry takes. Knows no route."""

from string import hexdigits
from typing import Annotated

from fastapi import Depends, Request

from server.errors import InvalidRequest, shown

MAX_TAGS = 16
TAG_CHARS = 32  # of an ETag that this server gives
MATCHES_NOTHING = "none"  # a condition equal to no ETag


def condition(request: Request) -> str:
    """The registry's condition: "" without a header, "absent" for `If-None-Match: *`, "*" for `If-Match: *`,
    or the tags of If-Match joined by commas. Raises InvalidRequest.
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
    """The condition for a request that needs an existing object. Raises InvalidRequest for If-None-Match."""
    condition_ = condition(request)
    if condition_ == "absent":
        raise InvalidRequest("This request takes If-Match, not If-None-Match.", param="If-None-Match")
    return condition_


Condition = Annotated[str, Depends(condition)]
MatchOnly = Annotated[str, Depends(match_only)]


def etag_header(etag: str) -> dict[str, str]:
    return {"ETag": f'"{etag}"'} if etag else {}


def _header(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name} came {len(values)} times; send it once.", param=name)
    return values[0].strip() if values else None


def _tags(header: str) -> str:
    """The tags of an If-Match header. Weak tags, and tags that this server never gave, match nothing."""
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
    return ",".join(ours) or MATCHES_NOTHING
