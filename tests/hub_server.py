"""A stand-in for the Hugging Face hub's HTTP API on 127.0.0.1, as much of it as its official client asks for here."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from store_servers import Faulty

WRITER, READER = "hf_WRITERTOKENSECRET", "hf_READERTOKENSECRET"
"""Tokens: of a member of "team" who may write there, and of somebody who may not."""
PAGE = 30
"""Entries of a page of a listing; the hub has 1000."""


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Its commits, each a whole tree of contents; ``large`` are the paths that were sent as large files."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, changes: dict[str, bytes]) -> str:
        tree = {**(self.commits[-1][1] if self.commits else {}), **changes}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits.append((sha, tree))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.tags.get(revision, revision)
        if revision == "main":
            return self.commits[-1]
        return next((each for each in self.commits if each[0] == revision), None)


class Hub:
    """Repositories by ``datasets/ORG/NAME`` and ``models/ORG/NAME``; what was uploaded, and refused, is counted."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.tokens_on_cdn = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    # --- answers ---

    def say(self, document: Any, status: int = 200, **headers: str) -> None:
        self.bytes(json.dumps(document).encode(), status, **{"Content-Type": "application/json", **headers})

    def bytes(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.say({"error": message}, status, **headers)

    # --- who asks what ---

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        url, data = urlsplit(self.path), self.body()
        path, query = url.path, parse_qs(url.query)
        if path.startswith("/cdn/"):
            self.hub.tokens_on_cdn += bool(self.token)
            return self.bytes(self.hub.blobs[path[5:]])
        if path.startswith("/lfs/"):
            if hashlib.sha256(data).hexdigest() != path[5:]:
                return self.refuse(400)
            with self.hub.lock:
                self.hub.blobs[path[5:]] = data
                self.hub.sent.append(path[5:])
            return self.bytes(b"")
        if self.token and self.token not in (WRITER, READER):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self.say({"name": "me", "orgs": []}) if self.token else self.refuse(401)
        if path == "/api/validate-yaml":
            return self.validate(json.loads(data))
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        asked = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+?)(?:/(revision|tree|preupload|commit)/(.+))?", path
        )
        if asked:
            return self.api(f"{asked[1]}/{asked[2]}", asked[3], asked[4] or "main", query, data)
        lfs = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if lfs:
            return self.batch(f"{lfs[1] or 'models'}/{lfs[2]}", json.loads(data))
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self.resolve(f"{file[1] or 'models'}/{file[2]}", unquote(file[3]), unquote(file[4]))
        return self.refuse(404)

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository; None when a refusal was answered."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token != WRITER):
            if self.token:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, message="Invalid username or password.")
            return None
        if write and self.token != WRITER:
            self.refuse(
                403 if self.token else 401, message=f"Forbidden: {self.token} has no write access: pass"
            )
            return None
        return found

    # --- what ---

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{name.removeprefix('models/')}"
        if self.token != WRITER or asked["organization"] != "team":
            return self.refuse(403 if self.token else 401, message="You don't have the rights to create it")
        if name in self.hub.repos:
            return self.say({"error": "You already created this repo", "url": url}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        return self.say({"url": url})

    def validate(self, asked: dict[str, Any]) -> None:
        _, matter, _ = asked["content"].split("---\n", 2)
        errors = []
        try:
            front = yaml.safe_load(matter)
            if not re.fullmatch(r"[a-z0-9.+-]+", front["license"]):
                errors.append("license")
            if front["license"] == "other" and not front.get("license_name"):
                errors.append("license_name")
            if not all(isinstance(tag, str) for tag in front["tags"]):
                errors.append("tags")
        except (yaml.YAMLError, KeyError, TypeError) as error:
            errors.append(str(error))
        found = {"errors": [{"message": each} for each in errors], "warnings": []}
        self.say(found, 400 if errors else 200)

    def api(self, name: str, verb: str | None, rest: str, query: dict[str, list[str]], data: bytes) -> None:
        repo = self.repo(name, write=verb in ("commit", "preupload"))
        if repo is None:
            return None
        revision, _, where = rest.partition("/")
        found = repo.at(unquote(revision))
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if verb == "preupload":
            asked = json.loads(data)["files"]
            return self.say({"files": [self.mode(repo, each) for each in asked]})
        if verb == "commit":
            return self.commit(repo, [json.loads(line) for line in data.splitlines()])
        if verb == "tree":
            return self.tree(repo, found[1], unquote(where), query)
        siblings = [{"rfilename": each} for each in found[1]]
        about = {"id": name.partition("/")[2], "sha": found[0], "siblings": siblings, "tags": []}
        return self.say({**about, "cardData": {"license": "cc0-1.0"}})

    def mode(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        large = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10**6
        known = repo.files.get(file["path"])
        oid = None
        if known is not None:
            oid = hashlib.sha256(known).hexdigest() if file["path"] in repo.large else git_sha(known)
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def commit(self, repo: Repo, lines: list[dict[str, Any]]) -> None:
        with self.hub.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != repo.commits[-1][0]:
                return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
            changes = {}
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                    repo.large.discard(value["path"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        return self.refuse(400, message="large file was not sent")
                    changes[value["path"]] = self.hub.blobs[value["oid"]]
                    repo.large.add(value["path"])
            sha = repo.commit(changes)
        url = f"http://{self.headers['Host']}{self.path.removeprefix('/api').removesuffix('/main')}/{sha}"
        return self.say({"commitUrl": url.replace("/models/", "/"), "commitOid": sha, "success": True})

    def batch(self, name: str, asked: dict[str, Any]) -> None:
        if self.repo(name, write=True) is None:
            return None
        objects = []
        for each in asked["objects"]:
            known = each["oid"] in self.hub.blobs
            href = f"http://{self.headers['Host']}/lfs/{each['oid']}?X-Signature=SIGNEDSECRET"
            objects.append({**each, **({} if known else {"actions": {"upload": {"href": href}}})})
        return self.say({"transfer": "basic", "objects": objects})

    def tree(self, repo: Repo, files: dict[str, bytes], below: str, query: dict[str, list[str]]) -> None:
        names = sorted(name for name in files if not below or name.startswith(f"{below}/"))
        if not names:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            for folder in sorted({name.rpartition("/")[0] for name in names if "/" in name})
        ]
        for name in names:
            content = files[name]
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            more = {"lfs": lfs, "oid": "f" * 40} if name in repo.large else {"oid": git_sha(content)}
            entries.append({"type": "file", "path": name, "size": len(content), **more})
        start = int(query.get("cursor", ["0"])[0])
        page, here = entries[start : start + PAGE], urlsplit(self.path).path
        again = f'<http://{self.headers["Host"]}{here}?recursive=True&cursor={start + PAGE}>; rel="next"'
        return self.say(page, **({"Link": again} if start + PAGE < len(entries) else {}))

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return None
        if repo.gated and self.token != WRITER:
            return self.refuse(403 if self.token else 401, "GatedRepo", "Access to it is restricted")
        found = repo.at(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in found[1]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content, sha256 = found[1][path], hashlib.sha256(found[1][path]).hexdigest()
        about = {"X-Repo-Commit": found[0], "ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if path in repo.large:
            more = {
                "Location": f"http://{self.headers['Host'].replace('127.0.0.1', 'localhost')}/cdn/{sha256}"
            }
            about |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self.hub.blobs.setdefault(sha256, content)
            return self.bytes(b"", 302, **about, **more)
        return self.bytes(content, **about)


@contextmanager
def hub() -> Iterator[tuple[Hub, Faulty]]:
    """The stand-in, and the proxy before it, which loses, refuses and cuts as it is told."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": state}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asked was killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = Faulty(server.server_port)
    try:
        yield state, proxy
    finally:
        for each in (proxy.server, server):
            each.shutdown()
            each.server_close()


def environment(url: str, home: object, token: str | None = WRITER) -> dict[str, str]:
    """By which the hub's client finds the stand-in; it reads the endpoint when it is imported."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
