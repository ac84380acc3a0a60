"""What clients and engines send, as data. No I/O.

endpoints, dialects, errors   tables: the engine's endpoints, the three dialects of clients, the tree of errors
body, identify, texts         a request: its fields, the agent it belongs to, its texts for the predictor
usage, sse                    an answer: the usage that the engine reports, whole or in a stream
"""
