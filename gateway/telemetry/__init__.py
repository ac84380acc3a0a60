"""What operators see: metrics, the request log, traces, and the gateway's own log.

metrics        every metric, by subject; `counters` makes the frequent ones cheap
request_span   the facts of one request, read at its end by metrics, request log and trace
request_log    one line of JSON for each request
tracing        spans for OpenTelemetry; `trace_context` reads the client's headers
logs           the gateway's own log on standard error
"""
