"""docker-compose.yml: what the Compose specification asks for, and what we promise beyond it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GATEWAYS = {"gpu": "gateway", "cpu": "gateway-cpu"}
SHARED = {"redis", "prometheus", "grafana"}


def interpolated(text: str, environment: dict[str, str]) -> str:
    """Compose's `${NAME}` and `${NAME:-default}`, the two forms the file uses."""

    def value(match: re.Match[str]) -> str:
        return environment.get(match["name"]) or match["default"] or ""

    replaced = re.sub(r"(?<!\$)\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", value, text)
    assert not re.search(r"(?<!\$)\$(?!\$)[{\w]", replaced), (
        f"a form of interpolation this test does not know: {replaced}"
    )
    return replaced.replace("$$", "$")


def load(**environment: str) -> dict[str, Any]:
    def resolve(node: object) -> Any:
        if isinstance(node, dict):
            return {key: resolve(value) for key, value in node.items()}
        if isinstance(node, list):
            return [resolve(value) for value in node]
        return interpolated(node, environment) if isinstance(node, str) else node

    file: dict[str, Any] = resolve(yaml.safe_load(COMPOSE.read_text()))
    return file


FILE = load()
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
each_service = pytest.mark.parametrize("name", sorted(SERVICES))
each_gateway = pytest.mark.parametrize("name", sorted(GATEWAYS.values()))


def started(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if not service.get("profiles") or profile in service["profiles"]}


def networks(service: dict[str, Any]) -> dict[str, set[str]]:
    """Network → the aliases that the service has there, beside its name."""
    declared = service.get("networks", ["default"])
    if isinstance(declared, list):
        return {network: set() for network in declared}
    return {network: set((options or {}).get("aliases", [])) for network, options in declared.items()}


def reachable(profile: str, client: str, host: str) -> set[str]:
    """The services that answer to `host` when `client` asks, with that profile."""
    own = networks(SERVICES[client])
    found = set()
    for name in started(profile):
        for network, aliases in networks(SERVICES[name]).items():
            if network in own and host in {name, *aliases}:
                found.add(name)
    return found


@pytest.mark.wire
def test_the_file_follows_the_compose_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# Which services start


@pytest.mark.parametrize("profile", sorted(GATEWAYS))
def test_a_profile_starts_its_own_gateway_and_no_other(profile: str) -> None:
    assert started(profile) == {GATEWAYS[profile], *SHARED}


def test_without_a_profile_nothing_starts_half() -> None:
    # Were `.env` lost, `docker compose up` says "no service selected" instead of starting everything but the gateway.
    assert started("") == set()


def test_docker_compose_up_alone_starts_the_gpu_gateway() -> None:
    file = ROOT / ".env"
    assert file.is_file(), "docker-compose.yml needs a committed .env with the line COMPOSE_PROFILES=gpu"
    lines = [line.strip() for line in file.read_text().splitlines()]
    assert "COMPOSE_PROFILES=gpu" in lines


def test_the_committed_defaults_hold_no_secret() -> None:
    file = ROOT / ".env"
    if not file.is_file():
        pytest.skip("no .env")
    assert not re.search(r"^\s*(HF_TOKEN|GRAFANA_ADMIN_PASSWORD)\s*=\s*\S", file.read_text(), re.MULTILINE)


def test_only_the_gpu_gateway_reserves_gpus() -> None:
    reserving = {name for name, service in SERVICES.items() if "deploy" in service}
    assert reserving == {"gateway"}
    (device,) = SERVICES["gateway"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


# How they find each other


@each_service
def test_every_dependency_exists_starts_too_and_can_become_healthy(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert other in SERVICES
        for profile in GATEWAYS:
            assert name not in started(profile) or other in started(profile)
        assert how["condition"] == "service_healthy"
        assert "healthcheck" in SERVICES[other]


@pytest.mark.parametrize("profile", sorted(GATEWAYS))
def test_prometheus_finds_the_gateway_of_each_profile_under_one_name(profile: str) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert reachable(profile, "prometheus", host) == {GATEWAYS[profile]}
    assert int(port) == SERVICES[GATEWAYS[profile]]["environment"]["JUSTITIA_PORT"]


@pytest.mark.parametrize("profile", sorted(GATEWAYS))
def test_grafana_finds_prometheus(profile: str) -> None:
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert reachable(profile, "grafana", "prometheus") == {"prometheus"}


@pytest.mark.parametrize("profile", sorted(GATEWAYS))
def test_only_the_gateway_can_reach_redis(profile: str) -> None:
    assert {name for name in started(profile) if reachable(profile, name, "redis")} == {GATEWAYS[profile], "redis"}
    assert "ports" not in SERVICES["redis"]
    assert FILE["networks"]["state"]["internal"] is True


@each_service
def test_networks_and_volumes_are_declared_and_mounted_files_exist(name: str) -> None:
    assert set(networks(SERVICES[name])) <= set(FILE["networks"])
    for mount in SERVICES[name].get("volumes", []):
        source, target, *mode = mount.split(":")
        assert target.startswith("/")
        if source.startswith("."):
            assert (ROOT / source).is_dir(), f"{source} is mounted and does not exist"
            assert mode == ["ro"]
        else:
            assert source in FILE["volumes"]


def test_every_declared_volume_is_used() -> None:
    used = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    assert set(FILE["volumes"]) <= used


# What is open, and to whom


@each_service
def test_ports_are_published_on_loopback_unless_opened(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@pytest.mark.parametrize("name", ["gateway", "gateway-cpu", "prometheus", "grafana"])
def test_one_variable_opens_one_service(name: str) -> None:
    variable = f"{name.removesuffix('-cpu').upper()}_BIND"
    services = load(**{variable: "0.0.0.0"})["services"]
    opened = {
        other for other, service in services.items() for port in service.get("ports", []) if port.startswith("0.0.0.0:")
    }
    assert opened == ({"gateway", "gateway-cpu"} if name.startswith("gateway") else {name})


def test_no_two_services_of_a_profile_publish_the_same_port() -> None:
    for profile in GATEWAYS:
        ports = [port.split(":")[1] for name in started(profile) for port in SERVICES[name].get("ports", [])]
        assert len(ports) == len(set(ports))


def test_grafana_shows_and_changes_nothing_by_default() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


# How they run


@each_service
def test_images_are_pinned_or_built_here(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        # Without a name for the image there is nothing that could be pulled in its place.
        assert "image" not in service
        assert service["pull_policy"] == "build"
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    else:
        assert re.fullmatch(r"(redis|prom/prometheus|grafana/grafana):v?\d+\.\d+\.\d+", service["image"])


@each_service
def test_every_service_restarts_stops_in_time_logs_within_bounds_and_has_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")


@each_service
def test_every_service_has_a_health_check_and_a_user_other_than_root(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert "\nHEALTHCHECK " in dockerfile
        assert "\nUSER 10001:10001\n" in dockerfile
    else:
        assert service["healthcheck"]["test"]
        assert service["user"] not in {"root", "0"}
        assert service["read_only"] is True


@each_gateway
def test_the_gateway_is_given_time_to_drain(name: str) -> None:
    settings = pytest.importorskip("gateway.config.settings").ServeSettings
    grace = SERVICES[name]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > settings.model_fields["drain_s"].default


# What the gateway is told


@each_gateway
def test_the_environment_names_settings_that_exist(name: str) -> None:
    settings = pytest.importorskip("gateway.config.settings").ServeSettings
    prefix = settings.model_config["env_prefix"]
    known = {prefix + field.upper() for field in settings.model_fields}
    given = {key for key in SERVICES[name]["environment"] if key.startswith(prefix)}
    assert given
    assert given <= known


def mounted(name: str, path: str) -> Path:
    """What the service finds there, of this repository."""
    for volume in SERVICES[name]["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith("./") and Path(path).is_relative_to(target):
            return ROOT / source / Path(path).relative_to(target)
    raise AssertionError(f"{path} is not mounted")


@each_gateway
def test_the_settings_file_can_be_changed_under_the_gateway(name: str) -> None:
    """A folder is mounted: of a file alone a container keeps the old one, when an editor or git puts a new one in its place."""
    file = mounted(name, SERVICES[name]["environment"]["JUSTITIA_CONFIG"])
    assert file.is_file()
    assert not any(str(file.relative_to(ROOT)) in volume for volume in SERVICES[name]["volumes"])


@each_gateway
def test_the_environment_is_valid_as_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, settings = pytest.importorskip("gateway.config.sources"), pytest.importorskip("gateway.config.settings")
    for key, value in SERVICES[name]["environment"].items():
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("JUSTITIA_CONFIG", str(mounted(name, os.environ["JUSTITIA_CONFIG"])))
    loaded = sources.read(settings.ServeSettings, [], program="justitia serve").settings
    assert loaded.host == "0.0.0.0"
    assert loaded.state == "redis://redis:6379/0"
    assert loaded.port == int(SERVICES[name]["ports"][0].split(":")[-1])


def test_the_cpu_gateway_serves_the_tiny_model_whatever_the_gpu_gateway_is_told() -> None:
    services = load(JUSTITIA_MODEL="some/large-model", JUSTITIA_ENGINE_ARGS="--tensor-parallel-size 8")["services"]
    assert services["gateway"]["environment"]["JUSTITIA_MODEL"] == "some/large-model"
    assert services["gateway-cpu"]["environment"]["JUSTITIA_MODEL"] == "tiny"
    assert "JUSTITIA_ENGINE_ARGS" not in services["gateway-cpu"]["environment"]


def test_the_how_to_names_variables_that_exist() -> None:
    text = (ROOT / "docs/how-to/deploy.md").read_text()
    named = set(re.findall(r"\b(?:JUSTITIA|GATEWAY|PROMETHEUS|GRAFANA)_[A-Z_]+\b|\bHF_TOKEN\b", text))
    settings = pytest.importorskip("gateway.config.settings").ServeSettings
    known = {settings.model_config["env_prefix"] + field.upper() for field in settings.model_fields}
    assert named
    assert {name for name in named - known if not re.search(rf"\b{name}\b", COMPOSE.read_text())} == set()
