"""Tasks and their answers between clients and the engine: asyncio, and the engine's HTTP.

dispatcher      drives flow control: futures, the real clock, the link, the journal
relay           one task: from its turn to the last byte of its answer
responses       responses that the engine makes in the background
engine_client   requests to the engine
engine_http     HTTP/1.1 over the connections to it
engine_monitor  is the engine up, and what does it report
stock_metrics   a stock engine's `/metrics`, as the reports of our own scheduler
"""
