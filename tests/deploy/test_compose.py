"""compose.yaml: valid by the compose specification, hardened, and without a secret in it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from server.settings import Settings
from server.supervisor.system import STOP_SECONDS
from server.tenancy.keys import operator_key
from tests.deploy.prometheus import DEPLOY, ROOT, load

COMPOSE: dict[str, Any] = load(DEPLOY / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_valid(name: str) -> None:
    """The parser knows every field of the specification and refuses others; YAML's merges are made before."""
    PyCompose.from_yaml(yaml.safe_dump(load(DEPLOY / name)))


def test_the_parser_sees_a_mistake() -> None:
    wrong = yaml.safe_dump(COMPOSE).replace("service_healthy", "service_well")
    with pytest.raises(ValueError, match="service_well"):
        PyCompose.from_yaml(wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "healthcheck" in service or name == "server", "the server's is in its image"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert ":" in service["image"]
    assert not service["image"].endswith(":latest")


def test_each_starts_once_what_it_needs_is_healthy() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES
            assert how == {"condition": "service_healthy"}
    assert set(SERVICES["server"]["depends_on"]) == {"valkey", "s3"}
    assert set(SERVICES["worker"]["depends_on"]) == {"valkey", "s3", "server"}


def test_every_setting_is_one_and_the_grace_is_long_enough() -> None:
    known = {f"POLYPEFT_{name.upper()}" for name in Settings.model_fields}
    for name in ("server", "worker"):
        given = {key for key in SERVICES[name]["environment"] if key.startswith("POLYPEFT_")}
        assert given <= known
    grace = float(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings().drain_seconds + 2 * STOP_SECONDS


def test_secrets_are_made_beside_it_and_ignored(tmp_path: Path) -> None:
    """`deploy/up` makes each once, readable by nobody else, and never writes one anew."""
    made = tmp_path / "deploy"
    made.mkdir()
    (made / "up").write_bytes((DEPLOY / "up").read_bytes())
    (made / "up").chmod(0o755)
    subprocess.run([made / "up", "--secrets-only"], check=True)
    first = {path.name: path.read_text() for path in (made / "secrets").iterdir()}
    subprocess.run([made / "up", "--secrets-only"], check=True)
    assert {path.name: path.read_text() for path in (made / "secrets").iterdir()} == first
    assert (made / "secrets").stat().st_mode & 0o077 == 0
    wanted = {secret["file"].removeprefix("secrets/") for secret in COMPOSE["secrets"].values()}
    assert wanted | {"polypeft.env"} <= first.keys()
    for name in ("valkey-password", "s3-secret", "metrics-token", "grafana-password"):
        assert len(first[name]) == 48
        assert first[name] not in (DEPLOY / "compose.yaml").read_text()
    assert first["metrics-token"] in first["polypeft.env"]
    given = Settings(admin_key_file=made / "secrets" / "admin-key")
    assert operator_key(given) == first["admin-key"].strip()
    environment = SERVICES["server"]["environment"]
    assert environment["POLYPEFT_ADMIN_KEY_FILE"] == f"/run/secrets/{SERVICES['server']['secrets'][0]}"
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/secrets/x"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


def test_every_mounted_file_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists()
            assert source.startswith(".") or source in COMPOSE["volumes"]
