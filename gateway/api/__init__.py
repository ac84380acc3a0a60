"""The HTTP endpoints, a file each.

inference     the engine's endpoints that use KV cache: every request becomes a task of an agent
passthrough   the engine's endpoints that use none, forwarded without queuing
agents        `/v1/agents`: the agents that have not ended
usage         `GET /v1/usage`: what each tenant used
operations    `/health`, `/ready`, `/metrics`
instrumented  the base of endpoints that the gateway answers by itself
openapi       the OpenAPI document of all of them
"""
