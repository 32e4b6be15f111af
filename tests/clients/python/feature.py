"""What every client's script has in common: where the server is, and a line for each feature that it tries.

Runs in the client's own environment, with nothing else installed.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

BASE_URL, KEY = os.environ["POLYPEFT_URL"] + "/v1", os.environ["POLYPEFT_KEY"]
MODEL, ADAPTER = os.environ["POLYPEFT_MODEL"], os.environ["POLYPEFT_ADAPTER"]
QUESTION = "What is the capital of France?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def feature(name: str) -> Callable[[Callable[[], Any]], None]:
    """Run the function that this decorates, and write whether it returned a true value, or what it raised."""

    def run(work: Callable[[], Any]) -> None:
        try:
            fault = None if work() else "it returned nothing"
        except Exception as error:  # noqa: BLE001 - whatever a client raises is the result
            fault = f"{type(error).__name__}: {error}"[:300]
        sys.stdout.write(json.dumps({"feature": name, "fault": fault}) + "\n")
        sys.stdout.flush()

    return run
