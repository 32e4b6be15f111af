"""The command line: every command's help, and what the commands print that ask a running server."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.same_answers import adapters
from tests.same_answers.serving import Checkout
from tests.same_answers.session import Session

LISTED = re.compile(r"^│ ([a-z][a-z-]*) ", re.MULTILINE)  # in the box of commands
BOX = re.compile(r"╭─ Commands ─.*?╰─", re.DOTALL)


def helps(checkout: Checkout, to: Session) -> None:
    """Of the program, of each command, and of each command below it."""
    ahead: list[tuple[str, ...]] = [()]
    with ThreadPoolExecutor(2) as pool:
        while ahead:
            said = list(pool.map(lambda command: checkout.run(*command, "--help").stdout, ahead))
            for command, text in zip(ahead, said, strict=True):
                to.write(f"$ polypeft {' '.join(command)} --help\n{text}")
            ahead = [
                (*command, name) for command, text in zip(ahead, said, strict=True) for name in _listed(text)
            ]


def commands(checkout: Checkout, to: Session, folder: Path) -> None:
    """Exit status, output and errors of commands that end by themselves."""
    mine, operator = str(to.keys["acme"]), str(to.keys["operator"])
    adapter, texts = folder / "adapter", folder / "texts.jsonl"
    adapter.mkdir()
    for name, content in adapters.lora(3).items():
        (adapter / name).write_bytes(content)
    texts.write_text("nonsense\n")
    for key, stdin, command in (
        (mine, "", ["--version"]),
        (mine, "", ["nonsense"]),
        (mine, "", ["serve", "--max-seqs", "0"]),
        (mine, "", ["serve", "--model", "/nowhere", "--data-dir", str(folder / "other")]),
        (mine, "", ["size", "--model", str(checkout.model)]),
        (mine, "", ["size", "--model", str(checkout.model), "--context", "1000000"]),
        (mine, "", ["adapters", "push", "pushed", str(adapter)]),
        (mine, "", ["adapters", "list"]),
        (mine, "", ["adapters", "show", "pushed"]),
        (mine, "", ["adapters", "alias", "pushed", "live", "1"]),
        (mine, "", ["adapters", "alias", "pushed", "live", "1=x"]),
        (mine, "", ["adapters", "rollback", "pushed", "live"]),
        (mine, "", ["adapters", "rm", "pushed"]),
        (mine, "", ["adapters", "list", "--deleted"]),
        (mine, "", ["adapters", "restore", "pushed"]),
        (mine, "", ["adapters", "history", "pushed"]),
        (mine, "", ["adapters", "show", "nobody"]),
        (mine, "", ["jobs", "list"]),
        (mine, "", ["jobs", "show", "ftjob-nothing"]),
        (mine, "", ["tune", str(texts), "--name", "refused"]),
        (mine, "", ["complete", "The capital of France is", "--temperature", "0", "--max-tokens", "4"]),
        (mine, "", ["complete", "x", "--adapter", "nobody"]),
        (mine, "Name a colour.\n", ["chat", "--temperature", "0", "--max-tokens", "4"]),
        ("pp-wrong", "", ["adapters", "list"]),
        (operator, "", ["tenants", "list"]),
        (operator, "", ["tenants", "add", "fourth"]),
        (operator, "", ["tenants", "keys", to.ids["zeta"]]),
        (operator, "", ["tenants", "revoke", to.ids["zeta"], "key_nothing"]),
        (operator, "", ["admin", "gc", "--dry-run"]),
        (operator, "", ["admin", "verify"]),
        (operator, "", ["admin", "rebuild-index"]),
    ):
        environment = {"POLYPEFT_API_KEY": key, "POLYPEFT_URL": to.url}
        done = checkout.run(*command, stdin=stdin, **environment)
        shown = " ".join(command)
        to.write(f"$ polypeft {shown}\nstatus {done.returncode}\n{done.stdout}--- stderr\n{done.stderr}")


def _listed(text: str) -> list[str]:
    return [name for box in BOX.findall(text) for name in LISTED.findall(box)]
