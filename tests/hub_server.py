"""A hub on this machine for tests: the endpoints of Hugging Face's that ``huggingface_hub`` asks for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name: commits with their files, branches; who may read and write them."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.token = "hf_secret"
        self.down = False
        self.asked: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def put(self, name: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Commit ``files`` over what the branch has; the commit's name."""
        before = self.commits.setdefault(name, {}).get(self.branches.setdefault(name, {}).get(branch, ""), {})
        after = {**before, **files}
        content = "".join(f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(after.items()))
        commit = hashlib.sha1(f"{name} {content}".encode()).hexdigest()
        self.commits[name][commit] = after
        self.branches[name][branch] = commit
        return commit

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch has."""
        return self.commits[name][self.branches[name][branch]]

    def fetched(self) -> list[str]:
        """The files that were downloaded, in order."""
        return [
            path.rpartition("/resolve/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path
        ]


class RefusalError(Exception):
    """An answer that is no success, as the hub gives it."""

    def __init__(self, status: int, code: str, text: str, *, url: str = "") -> None:
        super().__init__(text)
        self.status, self.code, self.text, self.url = status, code, text, url


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            if self.hub.down:
                raise RefusalError(503, "", "down")
            headers, answer = self._route(path, body)
            status = 200
        except RefusalError as refusal:
            status = refusal.status
            answer = json.dumps({"error": refusal.text, "url": refusal.url}).encode()
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.text} if refusal.code else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    @property
    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _commit(self, name: str, revision: str) -> str:
        if name not in self.hub.commits or (name in self.hub.private and not self._has_token):
            raise RefusalError(401, "RepoNotFound", "Repository not found")
        commit = self.hub.branches[name].get(revision, revision)
        if commit not in self.hub.commits[name] and self.hub.commits[name]:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _route(self, path: str, body: bytes) -> tuple[dict[str, str], bytes]:  # noqa: PLR0911, PLR0912
        hub = self.hub
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/((?:refs/\w+/)?[^/]+)/(.+)", path):
            name, revision, file = found.groups()
            commit = self._commit(name, revision)
            if name in hub.gated and not self._has_token:
                raise RefusalError(401, "GatedRepo", "Access to model is restricted")
            if file not in hub.commits[name][commit]:
                raise RefusalError(404, "EntryNotFound", "Entry not found")
            data = hub.commits[name][commit][file]
            return {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name = found[1]
            commit = self._commit(name, found[2] or "main")
            files = hub.commits[name].get(commit, {})
            info = {"id": name, "sha": commit, "private": name in hub.private, "tags": [], "downloads": 0, "likes": 0}
            return {}, json.dumps({**info, "siblings": [{"rfilename": file} for file in files]}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            files = hub.commits[found[1]][self._commit(found[1], found[2])]
            return {}, json.dumps(
                [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()]
            ).encode()
        if re.fullmatch(r"/lfs/[0-9a-f]{64}", path) and self.command == "PUT":
            hub.blobs[path[5:]] = body
            return {}, b"{}"
        if path == "/api/validate-yaml":
            return {}, json.dumps({"errors": [], "warnings": []}).encode()
        if not self._has_token:
            raise RefusalError(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return {}, self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(("safetensors", "pt2", "onnx")) else "regular"}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return {}, json.dumps({"files": modes}).encode()
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return {}, json.dumps({"transfer": "basic", "objects": objects}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            added = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = hub.blobs[value["oid"]]
            commit = hub.put(found[1], added)
            url = f"{hub.url}/{found[1]}/commit/{commit}"
            return {}, json.dumps({"success": True, "commitOid": commit, "commitUrl": url}).encode()
        raise RefusalError(404, "", f"no such endpoint: {path}")

    def _create(self, asked: dict[str, str]) -> bytes:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("organization") == "forbidden":
            raise RefusalError(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.hub.commits:
            raise RefusalError(409, "", "You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.put(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return json.dumps({"url": f"{self.hub.url}/{name}", "name": name, "id": name}).encode()


def client_settings(url: str, cache: Path) -> dict[str, object]:
    """Values of ``huggingface_hub.constants`` for a client of this hub, which it reads from variables only once."""
    return {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers on 127.0.0.1 at ``hub.url`` until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
