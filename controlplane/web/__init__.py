"""The control plane's HTTP, on its private port: webhooks, the operators' API, Prometheus' targets, health and metrics.

Nothing here acts: webhooks and verbs are written down, and the reconciler is woken. PostgreSQL away is 503 everywhere
but on `/health`; Slurm's state changes no answer but that of `/ready`, which tells it.
"""

from controlplane.web.app import WebOptions, create_app
from controlplane.web.credentials import OperatorToken, WebhookCredentials
from controlplane.web.health import Part, PartStatus

__all__ = ["OperatorToken", "Part", "PartStatus", "WebOptions", "WebhookCredentials", "create_app"]
