"""What can be set, room by room, with defaults. The descriptions are what docs/configuration.md says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from controlplane.settings.forms import (
    AbsolutePath,
    Command,
    Count,
    FilePath,
    Form,
    HeaderName,
    HttpUrl,
    NamedSecrets,
    Port,
    PortRange,
    Seconds,
    Secret,
    Secrets,
    SlurmUrl,
    Word,
)

MAX_WORKERS = 128


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DatabaseSettings(Section):
    max_connections: Count = Field(default=10, description="connections that one process opens at most")
    timeout_seconds: Seconds = Field(default=5.0, description="how long to wait for a connection")
    statement_timeout_seconds: Seconds = Field(default=30.0, description="how long one statement may take")


class WebSettings(Section):
    host: Word = Field(default="127.0.0.1", description="address that the control plane listens on; keep it private")
    port: Port = Field(default=9100, description="port of the control plane")


class ProxySettings(Section):
    host: Word = Field(default="127.0.0.1", description="address that the proxy listens on")
    port: Port = Field(default=8080, description="port of the proxy")
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS), Form(f"a number from 1 to {MAX_WORKERS}")] = Field(
        default=1, description="processes that serve the proxy's port: about one for each core"
    )
    access_log_sample: Annotated[float, Field(ge=0, le=1), Form("a share from 0 to 1")] = Field(
        default=0.0, description="share of the requests that went well that is logged; failures always are"
    )
    max_body_bytes: Count = Field(default=32 * 1024 * 1024, description="larger requests are refused with 413")
    refresh_seconds: Seconds = Field(
        default=10.0, description="time between two full reads of endpoints and keys; changes are heard of at once"
    )
    connect_timeout_seconds: Seconds = Field(default=2.0, description="how long a connection to an endpoint may take")
    first_byte_timeout_seconds: Seconds = Field(
        default=600.0, description="how long an endpoint may take to begin its answer: all of it, if it is not streamed"
    )
    idle_timeout_seconds: Seconds = Field(
        default=300.0, description="how long an endpoint may be silent between two pieces of an answer"
    )
    hold_seconds: Seconds = Field(
        default=600.0, description="how long a stream may wait for a model of which no replica is routable"
    )
    hold_seconds_without_stream: Seconds = Field(
        default=50.0,
        description="how long a request that is not streamed may wait; "
        "many a proxy before it gives up after 60 s in which it hears nothing",
    )
    queue_seconds: Seconds = Field(
        default=60.0, description="how long a request may wait while every replica has as many as it may"
    )
    queue_pressure_seconds: Seconds = Field(
        default=5.0, description="a queue that lasts so long asks for one more replica"
    )
    max_waiting_per_model: Count = Field(
        default=1000, description="requests that wait for one model at most, in one worker; more are refused with 429"
    )
    max_waiting_per_tenant: Count = Field(default=500, description="the same, of one tenant")
    drain_timeout_seconds: Seconds = Field(
        default=60.0, description="how long answers under way may take to end after SIGTERM, before they are broken off"
    )


class WebhookSettings(Section):
    bearer_tokens: Secrets = Field(default=(), description="bearer tokens that senders of alerts may use")
    basic_credentials: NamedSecrets = Field(
        default=(), description="`user:password` pairs that senders of alerts may use"
    )
    hmac_secrets: Secrets = Field(default=(), description="secrets that Grafana may sign with (HMAC-SHA256)")
    hmac_header: HeaderName = Field(
        default="X-Grafana-Alerting-Signature", description="header that holds the signature"
    )
    hmac_timestamp_header: HeaderName | None = Field(
        default=None, description="header that holds the time that is signed with the body"
    )
    max_body_bytes: Count = Field(default=4 * 1024 * 1024, description="larger deliveries are refused with 413")
    max_waiting: Count = Field(
        default=2000, description="deliveries that wait to be stored at most; more are refused with 503"
    )


class OperatorSettings(Section):
    tokens: NamedSecrets = Field(
        default=(), description="`name:token` pairs for the operators' API; the name is the actor in the audit"
    )


class SlurmSettings(Section):
    url: SlurmUrl | None = Field(
        default=None, description="slurmrestd; without it, only replica sets with `endpoints` are served"
    )
    user_name: Word | None = Field(default=None, description="the Slurm user whom the jobs belong to")
    user_id: Count | None = Field(
        default=None, description="that user's id; needed only where slurmrestd shows no user names"
    )
    token: Secret | None = Field(default=None, description="way to a token: the token itself")
    token_file: FilePath | None = Field(
        default=None, description="way to a token: a file, read again for every request"
    )
    token_command: Command | None = Field(
        default=None, description="way to a token: a command that prints one; it is run without a shell"
    )
    jwt_key_file: FilePath | None = Field(
        default=None, description="way to a token: the cluster's HS256 key, of which short-lived ones are made"
    )
    api_version: Annotated[
        str, Field(pattern=r"^(auto|v0\.0\.(38|4[0-5]))$"), Form("auto, v0.0.38, or one of v0.0.40 to v0.0.45")
    ] = Field(default="auto", description="version of slurmrestd's API; `auto`: the newest that it serves")
    timeout_seconds: Annotated[
        float,
        Field(ge=25, allow_inf_nan=False),
        Form("a number of seconds, 25 or more: slurmrestd retries for up to 20"),
    ] = Field(default=30.0, description="how long one request to slurmrestd may take")
    submit_grace_seconds: Seconds = Field(
        default=120.0,
        description="how late a submit whose answer was lost may still act; not used with `JWT_KEY_FILE`",
    )
    job_directory: AbsolutePath | None = Field(
        default=None, description="directory on the compute nodes where jobs work and write their logs"
    )
    template_directory: FilePath | None = Field(
        default=None, description="directory of the `*.sbatch` templates; by default those of this version"
    )
    port_range: PortRange = Field(default=(20000, 29999), description="ports that replicas are given")


class ReconcileSettings(Section):
    interval_seconds: Seconds = Field(default=5.0, description="time between two rounds, if nothing wakes it before")
    lease_seconds: Seconds = Field(
        default=10.0, description="how long a control plane that fell silent keeps the others waiting"
    )


class NodesSettings(Section):
    failed_starts: Count = Field(
        default=3, description="starts that fail in a row on a node, while others start elsewhere: one strike"
    )
    first_exclusion_seconds: Seconds = Field(
        default=600.0, description="how long a node is kept out after its first strike; doubles with each further one"
    )
    longest_exclusion_seconds: Seconds = Field(default=21600.0, description="how long at most")
    most_excluded_share: Annotated[
        float, Field(ge=0, lt=1, allow_inf_nan=False), Form("a share: 0 or more, and less than 1")
    ] = Field(
        default=0.5, description="share of a partition's usable nodes that alerts and failures may keep out together"
    )


class ProbeSettings(Section):
    interval_seconds: Seconds = Field(
        default=5.0, description="time between two probes of an endpoint that serves; others are probed each second"
    )
    timeout_seconds: Seconds = Field(default=3.0, description="how long an endpoint may take to list its models")
    completion_timeout_seconds: Seconds = Field(
        default=10.0, description="how long an endpoint may take to generate the probe's one token"
    )


class AlertsSettings(Section):
    stale_after_seconds: Seconds = Field(
        default=900.0, description="a firing alert that was not confirmed for so long no longer presses"
    )
    pull_interval_seconds: Seconds = Field(default=15.0, description="time between two pulls of the active alerts")
    absence_seconds: Seconds = Field(
        default=90.0,
        description="how long a firing alert must be missing from every pull to be resolved: "
        "a source that has just started lists none",
    )


class GrafanaSettings(Section):
    url: HttpUrl | None = Field(default=None, description="Grafana, to pull the active alerts from")
    token: Secret | None = Field(default=None, description="Grafana's service account token for the pull")
    org_id: Count = Field(default=1, description="the Grafana organization that the token belongs to")


class AlertmanagerSettings(Section):
    url: HttpUrl | None = Field(default=None, description="Alertmanager, to pull the active alerts from")


class LogSettings(Section):
    level: Annotated[Literal["debug", "info", "warning", "error"], Form("debug, info, warning or error")] = Field(
        default="info", description="the least important lines that are written"
    )
    format: Annotated[Literal["json", "text"], Form("json or text")] = Field(
        default="json", description="`json`: one object a line; `text`: for people"
    )
