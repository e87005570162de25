"""The data plane: OpenAI's API in front of every routable endpoint.

Reading order: `api` (routes, what a request goes through), `auth` (who asks), `directory` (what there is, from the
database, kept in memory), `forward` (one request to one upstream and its answer back), `upstreams` (connections and
requests in flight), `waiting` (who has to wait, and for how long), `pressure` (asks for a replica meanwhile), `models`
(`/v1/models`), `request` and `errors` (what comes in, and every refusal that goes out), `access_log` (a line
a request).
"""

from controlplane.proxy.api import Proxy, create_app
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.waiting import WaitingOptions

__all__ = ["Proxy", "ProxyOptions", "WaitingOptions", "create_app"]
