"""Origins of web pages, as `--allowed-origins` lists them."""

import re

ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


def read_origins(text: str) -> list[str]:
    """Origins as browsers send them, from a list with commas. Raises ValueError for what no browser sends."""
    origins = []
    for word in (word.strip().lower() for word in text.split(",") if word.strip()):
        if word != "*" and not ORIGIN.fullmatch(word):
            raise ValueError(f"{word!r} is no origin: http:// or https://, a host and perhaps a port, or *")
        https = word.startswith("https:")
        origins.append(word.removesuffix(":443" if https else ":80"))
    return list(dict.fromkeys(origins))
