"""The overlays as kustomize makes them: valid by the schemas of Kubernetes, restricted, draining in time."""

import os
import re
import shutil
import subprocess
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.settings import Settings
from server.supervisor.system import STOP_SECONDS
from server.tenancy.keys import WRITABLE_BY_OTHERS
from tests.deploy.prometheus import DEPLOY, load, rules

OVERLAYS = ("cpu", "gpu")
FOLDERS = (*OVERLAYS, "valkey")
VERSIONS = ("1.31", "1.34")
KUBECTL = shutil.which("kubectl") or shutil.which("kustomize")

pytestmark = pytest.mark.skipif(
    KUBECTL is None and "CI" not in os.environ, reason="needs kubectl or kustomize; CI must have one"
)


@cache
def built(folder: str) -> list[dict[str, Any]]:
    """Every object of an overlay."""
    assert KUBECTL is not None, "CI needs kubectl or kustomize"
    verb = "build" if KUBECTL.endswith("kustomize") else "kustomize"
    command = [KUBECTL, verb, str(DEPLOY / "kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def only(folder: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in built(folder) if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pods(folder: str) -> dict[str, dict[str, Any]]:
    """Pod templates, by the name of what makes them."""
    return {
        o["metadata"]["name"]: o["spec"]["template"] for o in built(folder) if "template" in o.get("spec", {})
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(folder: str, version: str) -> None:
    assert built(folder)
    for found in built(folder):
        kubernetes_validate.validate(found, version, strict=True)


def test_the_validator_sees_a_mistake() -> None:
    wrong = only("cpu", "StatefulSet", "polypeft") | {"spec": {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_pod_meets_the_restricted_standard(folder: str) -> None:
    """Pod Security's "restricted", and a root file system that nobody writes."""
    for template in (built_pods := pods(folder)).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} <= container["resources"].keys()
    assert built_pods


@pytest.mark.parametrize("folder", OVERLAYS)
def test_secrets_are_named_and_never_there(folder: str) -> None:
    assert not [found for found in built(folder) if found["kind"] == "Secret"]
    for template in pods(folder).values():
        for entry in template["spec"]["containers"][0]["env"]:
            if re.search(r"TOKEN|SECRET|KEY|REDIS_URL", entry["name"]):
                assert entry["valueFrom"]["secretKeyRef"]["name"] == "polypeft"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_all_pods_take_the_operators_key_of_one_secret(folder: str) -> None:
    spec = pods(folder)["polypeft"]["spec"]
    (server,) = spec["containers"]
    given = server["args"][server["args"].index("--admin-key-file") + 1]
    (mount,) = (mount for mount in server["volumeMounts"] if given.startswith(mount["mountPath"] + "/"))
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["secretName"] == "polypeft"
    assert given == f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}"
    assert not volume["secret"]["defaultMode"] & WRITABLE_BY_OTHERS


@pytest.mark.parametrize("folder", OVERLAYS)
def test_every_setting_is_one(folder: str) -> None:
    """A name that the server does not read would be a setting without effect."""
    known = {f"POLYPEFT_{name.upper()}" for name in Settings.model_fields}
    given = set(only(folder, "ConfigMap", "polypeft")["data"])
    for template in pods(folder).values():
        given |= {entry["name"] for entry in template["spec"]["containers"][0]["env"]}
    assert {name for name in given if name.startswith("POLYPEFT_")} <= known


@pytest.mark.parametrize("folder", OVERLAYS)
def test_a_pod_may_drain_before_it_is_killed(folder: str) -> None:
    """The hook, drain_seconds, then STOP_SECONDS for the API's and for the engine's end."""
    spec = pods(folder)["polypeft"]["spec"]
    hook = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(only(folder, "ConfigMap", "polypeft")["data"]["POLYPEFT_DRAIN_SECONDS"])
    assert spec["terminationGracePeriodSeconds"] > hook + drain + 2 * STOP_SECONDS
    assert pods(folder)["polypeft-worker"]["spec"]["terminationGracePeriodSeconds"] > STOP_SECONDS


def test_only_the_gpu_overlay_asks_for_gpus() -> None:
    for folder, wanted in (("cpu", None), ("gpu", "1")):
        for template in pods(folder).values():
            limits = template["spec"]["containers"][0]["resources"]["limits"]
            assert limits.get("nvidia.com/gpu") == wanted


def test_the_autoscaler_asks_for_what_the_rules_record() -> None:
    """HPA <- prometheus-adapter <- recording rule, by name."""
    metric = only("cpu", "HorizontalPodAutoscaler", "polypeft")["spec"]["metrics"][0]["pods"]["metric"][
        "name"
    ]
    (adapter,) = load(DEPLOY / "kubernetes" / "prometheus-adapter.yaml")["rules"]["custom"]
    assert adapter["name"]["as"] == metric
    recorded = {rule["record"] for rule in rules("rules")}
    assert adapter["seriesQuery"].partition("{")[0] in recorded


@pytest.mark.parametrize("folder", OVERLAYS)
def test_selectors_find_their_pods(folder: str) -> None:
    """Services, budgets and policies by label: one that selects nothing says nothing."""
    labels = {name: template["metadata"]["labels"] for name, template in pods(folder).items()}
    for found in built(folder):
        selector = found["spec"].get("selector") if "spec" in found else None
        if not selector:
            continue
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= own.items() for own in labels.values()), found["metadata"]["name"]
