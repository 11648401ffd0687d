"""A Hugging Face Hub on 127.0.0.1: the addresses that a client asks, with faults that a test can choose."""

import hashlib
import json
import re
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".gguf", ".safetensors", ".bin", ".pth", ".model")  # stored with Git LFS: the Hub redirects to them


class Request(NamedTuple):
    method: str
    host: str
    path: str
    range: str | None
    authorization: str | None


def checksum(name: str, data: bytes) -> str:
    """SHA-256 of a file in Git LFS, and git's SHA-1 of any other."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """What it has, how it misbehaves, and what it was asked."""

    port: int = 0
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    about: dict[str, dict] = field(default_factory=lambda: defaultdict(dict))  # more of a repository's answer
    announced: dict[str, dict] = field(default_factory=dict)  # more of what is said about a file
    token: str | None = None  # files are sent to this one only
    cuts: dict[str, list[int]] = field(default_factory=dict)  # by file: bytes before each cut
    holds: dict[str, int] = field(default_factory=dict)  # by file: bytes before it waits for `released`
    released: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, bytes] = field(default_factory=dict)  # other bytes than the announced
    ignores_ranges: bool = False
    failure: tuple[int, dict] | None = None  # status and headers of every answer
    answer: bytes | None = None  # the answer about every repository
    redirect: str | None = None  # where every file is said to be
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)  # all of that commit
    requests: list[Request] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def contents(self) -> list[str]:
        """The names of the files whose bytes were asked for, since the last call."""
        asked = [one for one in self.requests if one.method == "GET"]
        self.requests.clear()
        return sorted({one.path.rpartition("/")[2] for one in asked if "/resolve/" in one.path})


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            quoted = urlsplit(self.path).path  # a revision may have slashes
            path = unquote(quoted)
            host, given = self.headers["Host"].partition(":")[0], self.headers["Authorization"]
            hub.requests.append(Request(self.command, host, path, self.headers["Range"], given))
            if hub.failure is not None:
                return self.reply(hub.failure[0], b"{}", hub.failure[1])
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self.describe(found[1], found[2] or "main")
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", quoted):
                return self.resolve(unquote(found[1]), unquote(found[3]), given)
            if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
                return self.send(found[2], hub.repositories[found[1]][found[2]])
            self.reply(404, b"{}")

        def describe(self, repository, revision):
            if hub.answer is not None:
                return self.reply(200, hub.answer)
            if repository not in hub.repositories:
                return self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in (*hub.branches, hub.commit):
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = []
            for name, data in hub.repositories[repository].items():
                one = {"rfilename": name, "size": len(data), "blobId": checksum("", data)}
                if name.endswith(LARGE):
                    one["lfs"] = {"size": len(data), "sha256": checksum(name, data), "pointerSize": 130}
                files.append(one | hub.announced.get(name, {}))
            answer = {"id": repository, "sha": hub.commit, "siblings": files} | hub.about[repository]
            self.reply(200, json.dumps(answer).encode())

        def resolve(self, repository, name, given):
            if hub.token is not None and given != f"Bearer {hub.token}":
                return self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"})
            data = hub.repositories.get(repository, {}).get(name)
            if data is None:
                return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            if hub.redirect is not None:
                return self.reply(302, b"", {"Location": hub.redirect})
            if name.endswith(LARGE):  # another origin than 127.0.0.1
                where = f"http://localhost:{hub.port}/cdn/{repository}/{name}"
                linked = {"X-Linked-Etag": f'"{checksum(name, data)}"', "X-Linked-Size": str(len(data))}
                return self.reply(302, b"", {"Location": where, "X-Repo-Commit": hub.commit} | linked)
            self.send(name, data, {"ETag": f'"{checksum(name, data)}"', "X-Repo-Commit": hub.commit})

        def send(self, name, data, headers=None):
            data = hub.sent.get(name, data)
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            start = int(asked[1]) if asked and not hub.ignores_ranges else 0
            if start and start >= len(data):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers = dict(headers or {})
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cuts = hub.cuts.get(name)
            cut = cuts.pop(0) if cuts and self.command == "GET" else None
            self.reply(206 if start else 200, data[start:], headers, cut, hub.holds.pop(name, None))

        def reply(self, status, body, headers=None, cut=None, hold=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if hold is not None:
                self.wfile.write(body[:hold])
                hub.released.wait()
            elif self.command != "HEAD":
                self.wfile.write(body[:cut])
            if cut is not None or hold is not None:
                self.close_connection = True

    return Handler


@contextmanager
def served():
    """A Hub in a thread."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
