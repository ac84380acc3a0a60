"""The gateway: an OpenAI-compatible server that groups requests into agents and releases them in a fair order.

The life of a request, in file names: `identify` → `estimate` → `fairness` → `release` → `engine_client` → `relay` →
`usage` → `feedback`. `app` puts them together and is the only place that does.
"""
