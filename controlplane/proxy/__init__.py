"""The data plane: OpenAI's API in front of every routable endpoint.

Reading order: `api` (routes, what a request goes through), `auth` (who asks), `directory` (what there is, from the
database, kept in memory), `forward` (one request to one upstream and its answer back), `upstreams` (connections and
requests in flight), `request` and `errors` (what comes in, and every refusal that goes out), `access_log` (a line a
request).
"""

from controlplane.proxy.api import Proxy, create_app
from controlplane.proxy.options import ProxyOptions

__all__ = ["Proxy", "ProxyOptions", "create_app"]
