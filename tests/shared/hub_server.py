"""A hub on loopback: the endpoints that huggingface_hub uses, over repositories in memory, with faults on demand."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_thisTokenMayShowUpNowhere"
KINDS = {"truncate", "flip", "drop", "status", "wrong-range", "no-range", "redirect", "after"}


@dataclass
class Fault:
    """A fault of the next `times` requests whose method and path contain `match`.

    Attributes:
        match: a part of `METHOD /path`.
        kind: `truncate` (the body ends early), `flip` (one bit), `drop` (the connection ends before an answer), `after`
            (it ends after the request took effect), `status`, `wrong-range`, `no-range`, `redirect`.
        times: the number of requests.
        value: depending on the kind, the bit, the status, the number of bytes sent, or the address.
        headers: the headers of a `status` answer.
    """

    match: str
    kind: str
    times: int = 1
    value: object = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kind in KINDS


class Faulty:
    """A server that checks for each request whether a fault is due."""

    faults: list[Fault]
    lock: threading.Lock

    def fault(self, line: str) -> Fault | None:
        """Return the fault that is due for a request, and reduce its count by one."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match in line:
                    fault.times -= 1
                    return fault
        return None


@dataclass
class Repo:
    """A repository. Commits are whole trees: commit -> path -> bytes; branches and tags refer to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, bytes], branch: str = "main") -> str:
        told = repr((len(self.commits), sorted((path, hashlib.sha1(data).hexdigest()) for path, data in tree.items())))
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid] = dict(tree)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision) or self.tags.get(revision) or revision
        return revision if revision in self.commits else None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_sha1(data: bytes) -> str:
    """Return the object name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


class HubServer(Faulty):
    """The hub; `requests` records (method, path, headers) of all requests, `sent` the bytes of files sent."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent, self.xet = 0, False
        self.chunk_delay: Callable[[int], None] = lambda _: None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def add(self, name: str, tree: dict[str, bytes], **attributes: bool) -> str:
        """Create a repository with one commit; return the commit's oid."""
        repo = self.repos.setdefault(name, Repo(**attributes))
        return repo.commit(tree)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.resolve(revision) or ""]

    def asked(self, part: str) -> list[tuple[str, str, dict[str, str]]]:
        return [request for request in self.requests if part in f"{request[0]} {request[1]}"]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.path = urllib.parse.unquote(self.path) if "/resolve/" not in self.path else self.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunked()
        line = f"{self.command} {self.path}"
        self.hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        self.fault = self.hub.fault(line)
        if self.fault and self.fault.kind == "drop":
            self.close_connection = True
            return
        if self.fault and self.fault.kind == "status":
            self._send(int(self.fault.value), {"error": f"asked to fail, {TOKEN}"}, self.fault.headers)  # type: ignore[call-overload]
            return
        if self.fault and self.fault.kind == "redirect":
            self._send(302, {}, {"Location": str(self.fault.value)})
            return
        self._route()

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        parts = [part for part in path.split("/") if part]
        if path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/agent-harnesses":
            self._send(200, {})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create()
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._model("/".join(parts[2:4]), parts[4:])
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch()
        elif parts[:1] == ["lfs"]:
            self._upload(parts[-1])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(
                "/".join(parts[:2]), urllib.parse.unquote(parts[3]), urllib.parse.unquote("/".join(parts[4:]))
            )
        else:
            self._send(404, {"error": "no such route"})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        with self.hub.lock:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "Invalid username or password."})
            elif name in self.hub.repos:
                self._send(409, {"error": "You already created this model repo", **answer})
            else:
                private = bool(asked.get("private")) or asked.get("visibility") == "private"
                self.hub.repos[name] = Repo(private)
                self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
                self._send(200, answer)

    def _allowed(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            self._send(401, {"error": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not known):
            status = 404 if known else 401
            self._send(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return repo
        return None

    def _model(self, name: str, rest: list[str]) -> None:
        repo = self._allowed(name)
        if repo is None:
            return
        verb = rest[0] if rest else "revision"
        given = "/".join(rest[1:]) if rest else "main"
        with self.hub.lock:
            if verb in ("tag", "branch"):
                self._ref(repo, verb, given)
            elif verb == "refs":
                named = {"branches": repo.branches, "tags": repo.tags}
                lists = {
                    kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]
                    for kind, refs in named.items()
                }
                self._send(200, {**lists, "converts": []})
            else:
                revision = given.partition("/")[0] if verb == "tree" else given
                oid = repo.resolve(revision)
                if oid is None:
                    self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
                else:
                    self._at(repo, name, verb, revision, oid)

    def _at(self, repo: Repo, name: str, verb: str, revision: str, oid: str) -> None:
        tree = repo.commits[oid]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in tree]
            told = {"gated": "manual" if repo.gated else False, "private": repo.private, "tags": [], "downloads": 0}
            self._send(200, {"_id": "1", "id": name, "modelId": name, "sha": oid, "siblings": siblings, **told})
        elif verb == "tree":
            self._tree(tree)
        elif verb == "preupload":
            self._preupload(tree)
        elif verb == "commit":
            self._commit(repo, name, revision, oid)
        else:
            self._send(404, {"error": "no such route"})

    def _tree(self, tree: dict[str, bytes]) -> None:
        """Return results in pages of three."""
        query = urllib.parse.parse_qs(self.path.partition("?")[2])
        start, paths = int(query.get("cursor", ["0"])[0]), sorted(tree)
        entries = []
        for path in paths[start : start + 3]:
            data = tree[path]
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_sha1(data)}
            if is_lfs(path):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
                entry |= {"xetHash": sha256(data[::-1])} if self.hub.xet else {}
            entries.append(entry)
        more = start + 3 < len(paths)
        url = f"{self.hub.url}{self.path.partition('?')[0]}?recursive=true&expand=false&cursor={start + 3}"
        self._send(200, entries, {"Link": f'<{url}>; rel="next"'} if more else {})

    def _preupload(self, tree: dict[str, bytes]) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if is_lfs(file["path"]) else "regular"
            oid = None if path not in tree else sha256(tree[path]) if mode == "lfs" else blob_sha1(tree[path])
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def _batch(self) -> None:
        objects = []
        for blob in json.loads(self.body)["objects"]:
            oid, entry = blob["oid"], dict(blob)
            if oid not in self.hub.blobs:
                urls = {"upload": f"{self.hub.url}/lfs/{oid}", "verify": f"{self.hub.url}/lfs/verify/{oid}"}
                entry["actions"] = {action: {"href": url} for action, url in urls.items()}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if self.command == "PUT":
            if sha256(self.body) != oid:
                self._send(400, {"error": "digest mismatch"})
                return
            self.hub.blobs[oid] = self.body
        self._send(200, {})

    def _commit(self, repo: Repo, name: str, branch: str, head: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        told = {line["key"]: line["value"] for line in lines if line["key"] == "header"}
        parent = told["header"].get("parentCommit")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, {"error": "You don't have the required permissions"})
            return
        if branch not in repo.branches or (parent and parent != head):
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        tree = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.commit(tree, branch)
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _ref(self, repo: Repo, verb: str, name: str) -> None:
        asked = json.loads(self.body or b"{}")
        if verb == "tag":
            oid, refs, key = repo.resolve(name), repo.tags, asked["tag"]
        else:
            oid, refs, key = repo.resolve(asked.get("startingPoint") or "main"), repo.branches, name
        if oid is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif key in refs:
            self._send(409, {"error": "Reference already exists"})
        else:
            refs[key] = oid
            self._send(200, {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._allowed(name)
        if repo is None:
            return
        if repo.gated:
            self._send(403, {"error": "Access to this model is restricted"}, {"X-Error-Code": "GatedRepo"})
            return
        oid = repo.resolve(revision)
        if oid is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif path not in repo.commits[oid]:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self._file(repo.commits[oid][path], oid, path)

    def _file(self, data: bytes, commit: str, path: str) -> None:
        kind = self.fault.kind if self.fault else ""
        start, end, status = 0, len(data), 200
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{blob_sha1(data)}"'}
        if is_lfs(path):
            headers |= {
                "ETag": f'"{sha256(data)}"',
                "X-Linked-Etag": f'"{sha256(data)}"',
                "X-Linked-Size": str(len(data)),
            }
            headers |= {"X-Xet-Hash": sha256(data[::-1])} if self.hub.xet else {}
        asked = self.headers.get("Range")
        if asked and kind != "no-range":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or len(data) - 1) + 1, len(data)), 206
            if start >= len(data):
                self._send(416, {"error": "no such range"}, {"Content-Range": f"bytes */{len(data)}"})
                return
            if kind == "wrong-range":
                start = max(0, start - 7)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        body = bytearray(data[start:end])
        if kind == "flip":
            bit = int(self.fault.value) % (8 * len(body))  # type: ignore[union-attr,call-overload]
            body[bit // 8] ^= 1 << bit % 8
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self._stream(bytes(body[: int(self.fault.value)] if kind == "truncate" else body))  # type: ignore[union-attr,call-overload]
        if kind == "truncate":
            self.close_connection = True

    def _stream(self, body: bytes) -> None:
        try:
            for at in range(0, len(body), 1 << 16):
                part = body[at : at + (1 << 16)]
                self.hub.sent += len(part)
                self.wfile.write(part)
                self.hub.chunk_delay(self.hub.sent)
        except OSError:
            self.close_connection = True

    def _send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.kind == "after":
            self.close_connection = True
            return
        body = json.dumps(answer).encode()
        self.send_response(status)
        for header, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(header, value)
        message = answer.get("error") if isinstance(answer, dict) else None
        if message:
            self.send_header("X-Error-Message", str(message))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
