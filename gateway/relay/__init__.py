"""Tasks and their answers between clients and the engine: asyncio, and the engine's HTTP.

dispatcher      futures around flow control
relay           one task: from its turn to the last byte of its answer
responses       responses that the engine makes in the background
engine_client   requests to the engine; `engine_http` is HTTP/1.1 over its connections
"""
