"""A Hub on the loopback interface: what huggingface_hub asks of the real one, over real HTTP, without a network.

- Accounts by token; public and private repositories; commits that never change; branches and pull requests.
- Large files are stored at another origin (`localhost` instead of `127.0.0.1`) and served from there, also by range.
- Faults on request: answers such as 503, and a download that breaks off.

A route is a function `(hub, request) -> Response`; what goes wrong is a [`Refusal`], answered as the Hub answers it.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ATTRIBUTES = ".gitattributes"
LARGE = re.compile(r"\.(safetensors|bin|pt|png|model)$")
RANGE = re.compile(r"bytes=(\d+)-")


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and where it may write."""

    name: str
    orgs: tuple[str, ...] = ()
    can_write: bool = True

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass(frozen=True)
class File:
    """A file's bytes, in git or in the storage of large files."""

    data: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """What git calls the file, or the pointer that stands for a large one."""
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = lines.encode() if self.is_large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.blob_id


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    message: str
    parent: str | None
    files: dict[str, File]

    @property
    def sha(self) -> str:
        names = {path: file.blob_id for path, file in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([self.message, self.parent, names]).encode()).hexdigest()


@dataclass
class Repo:
    """Commits by their sha, and the branches and pull requests that point to them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, message: str, parent: str | None, files: dict[str, File]) -> str:
        commit = Commit(message, parent, files)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def sha_of(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclass(frozen=True)
class Request:
    """What a client asks."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    account: Account | None = None
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Response:
    """An answer; `cut` breaks the connection after that number of bytes of the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None

    @classmethod
    def of(cls, content: object, status: int = 200, **headers: str) -> "Response":
        return cls(status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode())


class Refusal(Exception):
    """An error as the Hub words it."""

    def __init__(self, status: int, code: str, message: str, **content: object):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.response = Response.of({"error": message, **content}, status, **headers)


class LoopbackHub:
    """The server; `with LoopbackHub({token: account}) as hub` runs it at `hub.url`."""

    def __init__(self, accounts: dict[str, Account]):
        self.accounts = accounts
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.signature = secrets.token_hex(8)
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.lock = threading.RLock()
        self.heal()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        port = self.server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def heal(self) -> None:
        """No faults from here on."""
        self.faults: list[tuple[str, int]] = []
        self.cut_download: int | None = None
        self.before_commit: Callable[[], None] | None = None

    def fail(self, pattern: str, times: int, status: int = 503) -> None:
        """The next requests whose `METHOD path` contains the pattern get this status, up to the given number."""
        self.faults += [(pattern, status)] * times

    def state(self) -> dict[str, dict[str, str]]:
        """Every branch of every repository with its commit."""
        return {name: dict(repo.refs) for name, repo in self.repos.items()}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        repository = self.repos[repo]
        return {path: file.data for path, file in repository.commits[repository.sha_of(revision)].files.items()}

    def answer(self, request: Request) -> Response:
        """Finds the route of a request and follows it."""
        with self.lock:
            try:
                response = self.fault(request) or self.follow_route(request)
            except Refusal as refusal:
                response = refusal.response
            self.requests.append((request.method, request.path, response.status))
            return response

    def fault(self, request: Request) -> Response | None:
        for fault in self.faults:
            if fault[0] in f"{request.method} {request.path}":
                self.faults.remove(fault)
                return Response.of({"error": "Service unavailable"}, fault[1], **{"Retry-After": "0"})
        return None

    def follow_route(self, request: Request) -> Response:
        for methods, pattern, route in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods.split():
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                account = None if route is stored else self.account_of(request)
                return route(self, Request(**{**vars(request), "parts": parts, "account": account}))
        raise Refusal(404, "", "Sorry, we can't find the page you are looking for.")

    def account_of(self, request: Request) -> Account | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.accounts:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.accounts.get(token)

    def repo(self, request: Request, to_write: bool = False) -> Repo:
        """The repository of a request, if its account may see it, and write to it."""
        name, account = request.parts["repo"], request.account
        repo = self.repos.get(name)
        namespace = name.split("/")[0]
        if repo is None or (repo.private and not (account and account.belongs_to(namespace))):
            raise Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
        if to_write:
            self.check_writes(account, namespace)
        return repo

    def check_writes(self, account: Account | None, namespace: str) -> None:
        if account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not (account.can_write and account.belongs_to(namespace)):
            raise Refusal(403, "", f"You don't have the rights to write under the namespace {namespace}")


class Handler(BaseHTTPRequestHandler):
    """Between HTTP and [`LoopbackHub.answer`]."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, self.read_body())
        response = self.hub.answer(request)
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.cut])
        if response.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the requests are in `hub.requests`."""


# --- accounts and repositories


def whoami(hub: LoopbackHub, request: Request) -> Response:
    if request.account is None:
        raise Refusal(401, "", "Invalid username or password.")
    return Response.of({"type": "user", "name": request.account.name})


def repo_name(hub: LoopbackHub, request: Request) -> str:
    """The repository that a request's body names, in a namespace where its account may write."""
    namespace = request.json.get("organization") or (request.account.name if request.account else "")
    hub.check_writes(request.account, namespace)
    return f"{namespace}/{request.json['name']}"


def create_repo(hub: LoopbackHub, request: Request) -> Response:
    name = repo_name(hub, request)
    url = f"{hub.url}/{name}"
    if name in hub.repos:
        raise Refusal(409, "", "You already created this model repo", url=url)
    hub.repos[name] = repo = Repo(request.json.get("visibility") == "private")
    repo.add("main", "initial commit", None, {ATTRIBUTES: File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
    return Response.of({"url": url, "name": name})


def delete_repo(hub: LoopbackHub, request: Request) -> Response:
    if hub.repos.pop(repo_name(hub, request), None) is None:
        raise Refusal(404, "RepoNotFound", "Repository not found")
    return Response()


def model_info(hub: LoopbackHub, request: Request) -> Response:
    repo = hub.repo(request)
    sha = repo.sha_of(request.parts.get("rev", "main"))
    siblings = [{"rfilename": path} for path in repo.commits[sha].files]
    name = request.parts["repo"]
    return Response.of({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})


def tree(hub: LoopbackHub, request: Request) -> Response:
    repo = hub.repo(request)
    folder = request.parts["folder"]
    entries = []
    for path, file in repo.commits[repo.sha_of(request.parts["rev"])].files.items():
        if path.startswith(f"{folder}/" if folder else ""):
            large = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.is_large else {}
            entries.append({"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id, **large})
    if folder and not entries:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
    return Response.of(entries)


def refs(hub: LoopbackHub, request: Request) -> Response:
    branches = {name: sha for name, sha in hub.repo(request).refs.items() if not name.startswith("refs/")}
    found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
    return Response.of({"branches": found, "tags": [], "converts": []})


def branch(hub: LoopbackHub, request: Request) -> Response:
    repo = hub.repo(request, to_write=True)
    name = request.parts["rev"]
    if request.method == "DELETE":
        repo.sha_of(name)
        del repo.refs[name]
        return Response()
    if name in repo.refs:
        raise Refusal(409, "", f"Reference already exists: {name}")
    repo.refs[name] = repo.sha_of(request.json.get("startingPoint", "main"))
    return Response()


# --- uploads


def validate_yaml(hub: LoopbackHub, request: Request) -> Response:
    """The metadata of a card must be a mapping, and a model-index a list."""
    head = re.match(r"---\s*\n(.*?)\n---", request.json["content"], flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else {}
        wrong = [] if isinstance(metadata, dict) else ["Metadata is not a mapping"]
        if not wrong and not isinstance(metadata.get("model-index", []), list):
            wrong = ['"model-index" must be an array']
    except yaml.YAMLError as error:
        wrong = [str(error)]
    return Response.of({"errors": [{"message": line} for line in wrong], "warnings": []}, 400 if wrong else 200)


def writable(hub: LoopbackHub, request: Request) -> Repo:
    """Anyone may open a pull request on what they can see."""
    return hub.repo(request, to_write="create_pr" not in request.query)


def preupload(hub: LoopbackHub, request: Request) -> Response:
    repo = writable(hub, request)
    there = repo.commits[repo.sha_of(request.parts["rev"])].files
    answers = []
    for file in request.json["files"]:
        path = file["path"]
        mode = "lfs" if LARGE.search(path) or file["size"] > 10_000_000 else "regular"
        known = {"oid": there[path].etag} if path in there else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Response.of({"files": answers})


def lfs_batch(hub: LoopbackHub, request: Request) -> Response:
    hub.repo(request)
    if request.account is None:
        raise Refusal(401, "", "Invalid username or password.")
    objects = []
    for item in request.json["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.storage:
            upload = {"href": f"{hub.storage_url}/{item['oid']}?signature={hub.signature}"}
            verify = {"href": f"{hub.url}/{request.parts['repo']}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return Response.of({"transfer": "basic", "objects": objects})


def lfs_verify(hub: LoopbackHub, request: Request) -> Response:
    hub.repo(request)
    data = hub.storage.get(request.json["oid"])
    if data is None or len(data) != request.json["size"]:
        raise Refusal(404, "", "Object not found")
    return Response()


def stored(hub: LoopbackHub, request: Request) -> Response:
    """The storage of large files: a signed address in place of a token, which must not come here."""
    if "authorization" in request.headers:
        raise Refusal(400, "", "Only one auth mechanism allowed")
    if request.query.get("signature") != [hub.signature]:
        raise Refusal(403, "", "The signature does not match")
    oid = request.parts["oid"]
    if request.method == "PUT":
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "", "The content does not match its name")
        hub.storage[oid] = request.body
        return Response()
    data, wanted = hub.storage[oid], RANGE.match(request.headers.get("range", ""))
    if wanted:
        start = int(wanted[1])
        return Response(206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
    cut = hub.cut_download if hub.cut_download is not None and len(data) > hub.cut_download else None
    if cut is not None:
        hub.cut_download = None
    return Response(200, {"Accept-Ranges": "bytes"}, data, cut)


def commit(hub: LoopbackHub, request: Request) -> Response:
    if hub.before_commit is not None:
        interfere, hub.before_commit = hub.before_commit, None
        interfere()
    repo = writable(hub, request)
    revision = request.parts["rev"]
    head = repo.sha_of(revision)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit", head) != head:
        raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[head].files)
    for line in lines[1:]:
        apply(hub, line["key"], line["value"], files)
    wants_pr = "create_pr" in request.query
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
    if not wants_pr and revision not in repo.refs:
        raise Refusal(400, "", f"{revision} is not a branch")
    sha = repo.add(f"refs/pr/{number}" if wants_pr else revision, header["summary"], head, files)
    url = f"{hub.url}/{request.parts['repo']}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
    return Response.of(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if wants_pr else {}))


def apply(hub: LoopbackHub, key: str, value: dict, files: dict[str, File]) -> None:
    """One line of a commit."""
    match key:
        case "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        case "lfsFile":
            if value["oid"] not in hub.storage:
                raise Refusal(400, "", f"{value['path']} was not uploaded")
            files[value["path"]] = File(hub.storage[value["oid"]], is_large=True)
        case "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        case _:
            raise Refusal(400, "", f"unknown operation {key}")


# --- downloads


def resolve(hub: LoopbackHub, request: Request) -> Response:
    repo = hub.repo(request)
    sha = repo.sha_of(request.parts["rev"])
    file = repo.commits[sha].files.get(request.parts["path"])
    headers = {"X-Repo-Commit": sha}
    if file is None:
        refusal = Refusal(404, "EntryNotFound", "Entry not found")
        refusal.response.headers |= headers
        raise refusal
    if file.is_large:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Response(302, {**headers, "Location": f"{hub.storage_url}/{file.sha256}?signature={hub.signature}"})
    return Response(200, {**headers, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}, file.data)


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, str, Callable[[LoopbackHub, Request], Response]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"/api/models/{REPO}", model_info),
    ("GET", rf"/api/models/{REPO}/revision/{REV}", model_info),
    ("GET", rf"/api/models/{REPO}/tree/{REV}(/(?P<folder>.+))?", tree),
    ("GET", rf"/api/models/{REPO}/refs", refs),
    ("POST DELETE", rf"/api/models/{REPO}/branch/{REV}", branch),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", lfs_verify),
    ("PUT GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", stored),
    ("HEAD GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", resolve),
]
