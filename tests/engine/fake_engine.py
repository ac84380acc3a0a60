"""Stands in for vLLM's server where only its process matters: `fake_engine.py SOCKET [how it behaves …]`.

Answers every request on the Unix socket with 200. `fail-3`: ends at once with exit code 3. `mute`: never listens. `stubborn`:
ignores SIGTERM, and so does its child.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

path, *how = sys.argv[1:]
print("Starting to load model nothing", flush=True)
if "fail-3" in how:
    print("the last words", flush=True)
    sys.exit(3)
if "stubborn" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "mute" in how:
    time.sleep(600)
print(f"PYTHONPATH={os.environ.get('PYTHONPATH')} cwd={Path.cwd()}", flush=True)
print("CPU KV cache size: 4,096 tokens, and so on", flush=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(16)
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    connection.close()
