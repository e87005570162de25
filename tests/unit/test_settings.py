"""Settings: the names and defaults that are promised, and every wrong key named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane import app, proxy, web
from controlplane.db import DatabaseOptions
from controlplane.reconcile.alerts import AlertPullOptions, AlertSource
from controlplane.reconcile.endpoints import EndpointOptions
from controlplane.reconcile.loop import RunnerOptions
from controlplane.reconcile.replicas import ReplicaOptions
from controlplane.reconcile.staleness import StalenessOptions
from controlplane.settings import Settings, SettingsError, variables
from controlplane.slurm.tokens import MintedToken, StaticToken, TokenCommand, TokenFile, TokenSource

URL = "postgresql://someone:hunter2@db:5432/controlplane"
SLURM = {
    "CONTROLPLANE_SLURM__URL": "http://slurm:6820",
    "CONTROLPLANE_SLURM__USER_NAME": "vllm",
    "CONTROLPLANE_SLURM__TOKEN_FILE": "/run/token",
    "CONTROLPLANE_SLURM__JOB_DIRECTORY": "/scratch/controlplane",
}


def load(**given: str) -> Settings:
    return Settings.load({"DATABASE_URL": URL, **given})


def faults(**given: str) -> dict[str, str]:
    with pytest.raises(SettingsError) as raised:
        load(**given)
    return {fault.variable: str(fault) for fault in raised.value.faults}


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load()
    assert settings.database_url.get_secret_value() == URL
    assert (settings.web.host, settings.web.port) == ("127.0.0.1", 9100)
    assert (settings.proxy.host, settings.proxy.port, settings.proxy.workers) == ("127.0.0.1", 8080, 1)
    assert settings.webhook.hmac_header == "X-Grafana-Alerting-Signature"
    assert settings.webhook.hmac_timestamp_header is None
    assert settings.webhook.bearer_tokens == settings.webhook.basic_credentials == settings.webhook.hmac_secrets == ()
    assert settings.slurm.api_version == "auto"
    assert settings.slurm.port_range == (20000, 29999)
    assert settings.slurm.url is settings.grafana.url is settings.alertmanager.url is None
    assert (settings.log.level, settings.log.format) == ("info", "json")


def test_every_kind_of_value_is_read() -> None:
    settings = load(
        **SLURM,
        CONTROLPLANE_WEB__PORT="9101",
        CONTROLPLANE_RECONCILE__INTERVAL_SECONDS="0.5",
        CONTROLPLANE_WEBHOOK__BEARER_TOKENS="old, new,",
        CONTROLPLANE_OPERATOR__TOKENS="ann:a:b,bob:c",
        CONTROLPLANE_SLURM__PORT_RANGE="30000-30010",
        CONTROLPLANE_GRAFANA__URL="https://grafana.example/sub/",
        CONTROLPLANE_LOG__LEVEL="",
    )
    assert settings.web.port == 9101
    assert settings.reconcile.interval_seconds == 0.5
    assert [token.get_secret_value() for token in settings.webhook.bearer_tokens] == ["old", "new"]
    named = {token.name: token.secret.get_secret_value() for token in settings.operator.tokens}
    assert named == {"ann": "a:b", "bob": "c"}
    assert settings.slurm.port_range == (30000, 30010)
    assert settings.slurm.token_file == Path("/run/token")
    assert settings.grafana.url == "https://grafana.example/sub"
    assert settings.log.level == "info", "set to nothing is not set"


def test_a_command_is_split_into_words() -> None:
    given = {**SLURM, "CONTROLPLANE_SLURM__TOKEN_FILE": "", "CONTROLPLANE_SLURM__TOKEN_COMMAND": "scontrol token 'a b'"}
    assert load(**given).slurm.token_command == ("scontrol", "token", "a b")


def test_a_secret_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("ann:topsecret\n")
    settings = load(CONTROLPLANE_OPERATOR__TOKENS_FILE=str(file))
    assert settings.operator.tokens[0].secret.get_secret_value() == "topsecret"


def test_the_database_url_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"{URL}\n")
    assert Settings.load({"DATABASE_URL_FILE": str(file)}).database_url.get_secret_value() == URL


def test_every_wrong_key_is_named_at_once_with_what_is_wrong_and_what_to_do() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.load(
            {
                "CONTROLPLANE_WEB__PORT": "abc",
                "CONTROLPLANE_PROXY__HOST": "two words",
                "CONTROLPLANE_LOG__LEVEL": "loud",
                "CONTROLPLANE_SLURM__URL": "ftp://slurm",
                "CONTROLPLANE_SLURM__PORT_RANGE": "9-1",
                "CONTROLPLANE_SLURM__JOB_DIRECTORY": "relative",
                "CONTROLPLANE_PROBE__TIMEOUT_SECONDS": "nan",
                "CONTROLPLANE_GRAFANA__TOKEN_FILE": "/no/such/file",
                "CONTROLPLANE_WEB__PROT": "1",
            }
        )
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "CONTROLPLANE_GRAFANA__TOKEN_FILE",
        "CONTROLPLANE_LOG__LEVEL",
        "CONTROLPLANE_PROBE__TIMEOUT_SECONDS",
        "CONTROLPLANE_PROXY__HOST",
        "CONTROLPLANE_SLURM__JOB_DIRECTORY",
        "CONTROLPLANE_SLURM__PORT_RANGE",
        "CONTROLPLANE_SLURM__URL",
        "CONTROLPLANE_SLURM__URL",
        "CONTROLPLANE_SLURM__USER_NAME",
        "CONTROLPLANE_WEB__PORT",
        "CONTROLPLANE_WEB__PROT",
        "DATABASE_URL",
    ]
    assert all("; " in line for line in lines), "each line says what to do"
    assert "CONTROLPLANE_WEB__PORT: 'abc' is not a port from 1 to 65535; correct it, or remove it" in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("CONTROLPLANE_WEB_PORT", "CONTROLPLANE_WEB__PORT"),
        ("CONTROLPLANE_WEBHOOK__BEARER_TOKEN", "CONTROLPLANE_WEBHOOK__BEARER_TOKENS"),
        ("CONTROLPLANE_OPERATOR__TOKEN_FILE", "CONTROLPLANE_OPERATOR__TOKENS_FILE"),
    ],
)
def test_a_misspelt_variable_is_wrong_and_the_right_one_is_suggested(variable: str, suggestion: str) -> None:
    assert f"did you mean {suggestion}?" in faults(**{variable: "1"})[variable]


def test_variables_that_kubernetes_makes_for_a_service_are_not_wrong() -> None:
    load(
        CONTROLPLANE_PORT="tcp://10.0.0.1:9100",
        CONTROLPLANE_PORT_9100_TCP="tcp://10.0.0.1:9100",
        CONTROLPLANE_PORT_9100_TCP_ADDR="10.0.0.1",
        CONTROLPLANE_SERVICE_HOST="10.0.0.1",
        CONTROLPLANE_SERVICE_PORT_HTTP="9100",
        CONTROLPLANE_PROXY_SERVICE_HOST="10.0.0.1",
    )


@pytest.mark.parametrize(
    "given",
    [
        {"DATABASE_URL": "mysql://someone:hunter2@db/x"},
        {"DATABASE_URL": "postgres:/someone:hunter2@db/x"},
        {"DATABASE_URL": "postgresql://someone:100%hunter2@db/x"},
        {"CONTROLPLANE_OPERATOR__TOKENS": "hunter2"},
        {"CONTROLPLANE_WEBHOOK__BASIC_CREDENTIALS": "grafana:x,hunter2"},
        {"CONTROLPLANE_GRAFANA__URL": "http://admin:hunter2@grafana:3000"},
        {"CONTROLPLANE_SLURM__TOKEN": "hunter2", "CONTROLPLANE_SLURM__TOKEN_FILE": "/x"},
        {"CONTROLPLANE_GRAFANA__TOKEN": "hunter2", "CONTROLPLANE_GRAFANA__TOKEN_FILE": "/x"},
    ],
)
def test_no_fault_shows_a_secret(given: dict[str, str]) -> None:
    assert "hunter2" not in "".join(faults(**given).values())


def test_no_secret_is_shown_by_the_settings_themselves() -> None:
    settings = load(CONTROLPLANE_OPERATOR__TOKENS="ann:topsecret", CONTROLPLANE_GRAFANA__TOKEN="topsecret")
    assert "topsecret" not in repr(settings)
    assert "hunter2" not in repr(settings)


def test_a_secret_given_twice_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x")
    found = faults(CONTROLPLANE_GRAFANA__TOKEN="y", CONTROLPLANE_GRAFANA__TOKEN_FILE=str(file))
    assert "CONTROLPLANE_GRAFANA__TOKEN is set as well" in found["CONTROLPLANE_GRAFANA__TOKEN_FILE"]


def test_slurm_over_http_wants_exactly_one_way_to_a_token() -> None:
    load(**SLURM)
    two = faults(**SLURM, CONTROLPLANE_SLURM__JWT_KEY_FILE="/key")
    assert "together with CONTROLPLANE_SLURM__JWT_KEY_FILE" in two["CONTROLPLANE_SLURM__TOKEN_FILE"]
    none = faults(**{**SLURM, "CONTROLPLANE_SLURM__TOKEN_FILE": ""})
    assert "set one of CONTROLPLANE_SLURM__TOKEN, CONTROLPLANE_SLURM__TOKEN_FILE" in none["CONTROLPLANE_SLURM__URL"]


def test_slurm_over_a_unix_socket_needs_no_token() -> None:
    load(**{**SLURM, "CONTROLPLANE_SLURM__TOKEN_FILE": "", "CONTROLPLANE_SLURM__URL": "unix:/run/slurmrestd.sock"})


def test_slurm_needs_a_user_and_a_directory() -> None:
    found = faults(CONTROLPLANE_SLURM__URL="unix:/run/slurmrestd.sock")
    assert set(found) == {"CONTROLPLANE_SLURM__USER_NAME", "CONTROLPLANE_SLURM__JOB_DIRECTORY"}


def test_a_token_without_slurm_is_wrong() -> None:
    assert "CONTROLPLANE_SLURM__URL" in faults(CONTROLPLANE_SLURM__TOKEN="t")


@pytest.mark.parametrize("count", ["0", "129", "many"])
def test_a_number_of_workers_that_makes_no_sense_is_refused(count: str) -> None:
    assert "from 1 to 128" in faults(CONTROLPLANE_PROXY__WORKERS=count)["CONTROLPLANE_PROXY__WORKERS"]


# --- what the rooms are given ----------------------------------------------------------------------------


def test_without_settings_every_room_has_its_own_defaults() -> None:
    settings = load()
    assert app.database_options(settings) == DatabaseOptions(URL)
    assert app.web_options(settings) == web.WebOptions()
    assert app.proxy_options(settings) == proxy.ProxyOptions()
    assert app.endpoint_options(settings) == EndpointOptions()
    assert app.replica_options(settings, "i") == ReplicaOptions("i")
    assert app.alert_sources(settings) == []
    assert app.script_options(settings) is None
    assert settings.reconcile.lease_seconds == RunnerOptions("h").lease_seconds
    assert app.pull_options(settings, []) == AlertPullOptions([])
    assert app.stale_after(settings) == StalenessOptions().stale_after


def test_a_drain_is_not_over_before_a_proxy_that_is_not_told_has_read_of_it() -> None:
    settings = load(CONTROLPLANE_PROXY__REFRESH_SECONDS="60")
    assert app.replica_options(settings, "i").rules.drain_settle.total_seconds() > 60


def test_credentials_reach_the_web_room() -> None:
    settings = load(
        CONTROLPLANE_WEBHOOK__BEARER_TOKENS="a,b",
        CONTROLPLANE_WEBHOOK__BASIC_CREDENTIALS="grafana:c:d",
        CONTROLPLANE_WEBHOOK__HMAC_SECRETS="e",
        CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER="X-Time",
        CONTROLPLANE_OPERATOR__TOKENS="ann:f",
    )
    assert app.web_options(settings) == web.WebOptions(
        webhook=web.WebhookCredentials(("a", "b"), ("grafana:c:d",), ("e",), hmac_timestamp_header="X-Time"),
        operators=(web.OperatorToken("ann", "f"),),
    )


def test_alerts_are_pulled_from_where_a_url_is_set() -> None:
    settings = load(
        CONTROLPLANE_GRAFANA__URL="http://grafana:3000",
        CONTROLPLANE_GRAFANA__TOKEN="t",
        CONTROLPLANE_ALERTMANAGER__URL="http://alertmanager:9093",
    )
    assert app.alert_sources(settings) == [
        AlertSource("grafana", "http://grafana:3000", "t", org_id=1),
        AlertSource("alertmanager", "http://alertmanager:9093"),
    ]


@pytest.mark.parametrize(
    ("variable", "value", "source"),
    [
        ("TOKEN", "t", StaticToken("t")),
        ("TOKEN_FILE", "/run/token", TokenFile(Path("/run/token"))),
        ("TOKEN_COMMAND", "scontrol token", TokenCommand(("scontrol", "token"))),
        ("JWT_KEY_FILE", "/run/key", MintedToken(Path("/run/key"), "vllm")),
    ],
)
def test_each_way_to_a_slurm_token_is_one_source(variable: str, value: str, source: TokenSource) -> None:
    given = {**SLURM, "CONTROLPLANE_SLURM__TOKEN_FILE": "", f"CONTROLPLANE_SLURM__{variable}": value}
    assert app.token_source(load(**given)) == source


def test_the_documentation_lists_every_variable_with_its_default_and_meaning() -> None:
    expected = []
    for variable in variables().values():
        default = f"`{variable.default}`" if variable.default else "required" if variable.info.is_required() else ""
        meaning = f"{variable.info.description}{' (*secret*)' if variable.is_secret else ''}"
        expected.append(f"| `{variable.name}` | {default} | {meaning} |")
    document = Path(__file__).parents[2] / "docs" / "configuration.md"
    rows = [line for line in document.read_text().splitlines() if line.startswith(("| `CONTROLPLANE_", "| `DATABASE_"))]
    assert rows == expected
