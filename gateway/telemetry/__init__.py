"""What operators see: metrics, the request log, traces, and the gateway's own log.

metrics        every metric, declared once; `counters` makes the frequent ones cheap
request_span   one request: metrics, a line of the request log and a trace follow from it
request_log    one line of JSON for each request
tracing        spans for OpenTelemetry; `trace_context` reads the client's
logs           the gateway's own log on standard error
"""
