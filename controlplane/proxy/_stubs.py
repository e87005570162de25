from loguru import logger


class AccessLog:
    def write(self, call, now):
        if call.is_broken or (call.status >= 500 and not call.has_client_left): level="WARNING"
        elif call.status >= 400 and not call.has_client_left: level="INFO"
        else: return
        logger.log(level, "request failed", request_id=call.request.request_id.decode(), tenant=call.tenant, model=call.model, status=call.status, code=call.code,
            upstream=call.endpoint and call.endpoint.url, failure=call.failure and call.failure.value, retries=len(call.retries), client_left=call.has_client_left, seconds=round(now-call.request.started_at,3))
