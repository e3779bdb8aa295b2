"""prepare_data.py as a command line, and a stand-in for huggingface.co."""

import hashlib
import http.server
import json
import os
import resource
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_script(out, *arguments, check=0, wait=True, limit=None, **env):
    """prepare_data.py into the folder `out` -> (stdout, stderr), or the Popen with wait=False

    check: its exit code; limit: (RLIMIT_..., n) for resource.setrlimit.
    """
    command = [sys.executable, ROOT / "prepare_data.py", *map(str, arguments), f"--out_dir={out}"]
    limited = lambda: limit and resource.setrlimit(limit[0], (limit[1], limit[1]))
    process = subprocess.Popen(
        command, env=os.environ | env, cwd=ROOT, text=True, preexec_fn=limited,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    assert process.returncode == check, out + err
    return out, err


class HubServer(http.server.ThreadingHTTPServer):
    """Lists and serves the files of a dataset as huggingface.co does; `files` is {path: bytes}.

    stall: the end of the name of a file that never arrives whole; damage: of a damaged one.
    """

    daemon_threads = True

    def __init__(self, files, stall="", damage=""):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.requests, self.stall, self.damage = files, [], stall, damage
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def env(self):
        """What points huggingface_hub at this server, and past the user's cache and token."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def entry(name, data):
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            half = len(body) // 2
            self.wfile.write(body[:half])
            time.sleep(60 if self.is_file(self.server.stall) else 0)
            self.wfile.write(body[half:])

    def is_file(self, name):
        return bool(name) and "/resolve/" in self.path and self.path.endswith(name)

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if "/tree/main" in path:
            folder = path.partition("/tree/main")[2].strip("/")
            files = {k: v for k, v in self.server.files.items() if k.startswith(folder)}
            body = json.dumps([entry(name, data) for name, data in files.items()]).encode()
            return self.reply(200, body, {"Content-Type": "application/json"})
        data = self.server.files.get(path.partition("/resolve/main/")[2])
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": "1" * 40,
            "Accept-Ranges": "bytes",
        }
        if self.is_file(self.server.damage):
            data = data[:-9] + b"!" + data[-8:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if start else 200, data[start:], headers)

    do_HEAD = do_GET
