"""The data plane: OpenAI's API in front of every routable endpoint.

Reading order: `api` (what is put together, and the routes without a prompt), `protocol` (a client's connection),
`call` (one request with a prompt, from its body to the end of its answer), `upstreams` (endpoints, and connections to
them). What a call asks on its way: `auth` (who asks), `directory` (what there is, from the database, kept in memory),
`request` (what is read of a body), `limits` (what its tenant may use), `waiting` (who has to wait, and for how long),
`routing` (which endpoint), `tokens` (what the answer says it cost), `usage` (where that is kept), `access_log` (a line
a request), `errors` (every refusal) and `wire` (how they are written). Beside it: `heads` (of requests that were read
before), `pressure` (asks for a replica while requests wait), `models` (`/v1/models`), `multipart` (the model of a
form), `plane` (what one worker's requests share).
"""

from controlplane.proxy.api import Proxy, create_app
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.waiting import WaitingOptions

__all__ = ["Proxy", "ProxyOptions", "WaitingOptions", "create_app"]
