from loguru import logger

from controlplane.clock import utc_now


class WaitingRooms:
    def follow(self, snapshot, now): self.s=snapshot
    def enter(self, model, tenant): return model in self.s.endpoints
    def wait(self, model, tenant, on_turn, on_refused, now, *, is_stream):
        from controlplane.proxy.directory import ModelState, retry_after_seconds, seconds_to_ready
        from controlplane.proxy.errors import model_paused, model_starting
        m=self.s.models[model]; n=utc_now()
        if self.s.state_of(m) is ModelState.PAUSED:
            left = (m.paused_until - n).total_seconds() if m.paused_until else None
            raise model_paused(model, retry_after_seconds(left) if left is not None and left<=60 else None)
        raise model_starting(model, retry_after_seconds(seconds_to_ready(m, n)))
    def leave(self, model, tenant): pass
class Limits:
    def admit(self, *a): return None
class Usage:
    def record(self, *a): pass
class AccessLog:
    def write(self, call, now):
        if call.is_broken or (call.status >= 500 and not call.has_client_left): level="WARNING"
        elif call.status >= 400 and not call.has_client_left: level="INFO"
        else: return
        logger.log(level, "request failed", request_id=call.request.request_id.decode(), tenant=call.tenant, model=call.model, status=call.status, code=call.code,
            upstream=call.endpoint and call.endpoint.url, failure=call.failure and call.failure.value, retries=len(call.retries), client_left=call.has_client_left, seconds=round(now-call.request.started_at,3))
