"""A hub on loopback: the calls of the Hugging Face hub's API with which huggingface_hub uploads and downloads models.

Small text files travel in the commit, all others as LFS objects. Xet, which the hub prefers for those, wants a storage
service of its own; `environment` turns it off, and huggingface_hub then uses LFS, which the hub still speaks.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from launching import SECRET, SECRETS

USER = "tester"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Hub(ThreadingHTTPServer):
    """Public repositories of one user, who alone may write, with one of `tokens`.

    `repositories` holds each one's commits, the newest last: (id, {path: content}). What matches `refused` is refused
    with 403 and an error that repeats the token. `asked` lists "METHOD path" of all requests, `unknown` of those on
    repositories that this hub does not know; `writers` are the tokens that wrote.
    """

    daemon_threads = True

    def __init__(self, refused="$^"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.writers, self.refused = {SECRET, SECRETS["HF_TOKEN"]}, set(), refused
        self.repositories, self.objects, self.lock = {}, {}, threading.Lock()
        self.asked, self.unknown = [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/objects"  # another host, as of the hub's objects
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def environment(self, **values):
        """Variables of a process that uses this hub, without a token."""
        own = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | own | values

    def files(self, repository):
        """Newest files of a repository by their path, without the one that the hub makes."""
        return {path: content for path, content in self.repositories[repository][-1][1].items() if path[0] != "."}

    def commit(self, repository, files):
        commits = self.repositories.setdefault(repository, [])
        commits.append((hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest(), files))
        return commits[-1][0]


class Handler(BaseHTTPRequestHandler):
    def handle_request(self):
        """Reads a request, checks its token, and calls the method of the route that it takes."""
        self.body, hub = self.read_body(), self.server
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        hub.asked.append(request)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            self.fail(401, "Invalid credentials in Authorization header")
            return
        if re.search(hub.refused, request):
            self.fail(403, "no, not you")
            return
        for pattern, answer, writes in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                if writes and not token:
                    self.fail(401, "Invalid username or password.")
                    return
                with hub.lock:
                    hub.writers |= {token} if writes else set()
                    answer(self, **{name: part for name, part in match.groupdict().items() if part})
                return
        hub.unknown += [request] if f"{USER}/" in path else []
        self.fail(404, "Not found")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # Writing

    def who_am_i(self):
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        wanted = json.loads(self.body)
        repository = f"{wanted.get('organization') or USER}/{wanted['name']}"
        exists = repository in self.server.repositories
        if not exists:
            self.server.commit(repository, {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"})
        answer = {"name": repository, "url": f"{self.server.url}/{repository}"}
        answer |= {"error": "You already created this model repo"} if exists else {}
        self.answer(answer, 409 if exists else 200)

    def validate_card(self):
        """A card's metadata is YAML, and its base model is on the hub: a folder on a disk is no base model."""
        error = card_error(json.loads(self.body)["content"])
        self.answer({"errors": [{"message": error}] if error else [], "warnings": []}, 400 if error else 200)

    def preupload(self, repository):
        if not self.known(repository):
            return
        present, files = self.server.repositories[repository][-1][1], []
        for file in json.loads(self.body)["files"]:
            mode = "regular" if is_text(file["size"], base64.b64decode(file["sample"])) else "lfs"
            old = present.get(file["path"])
            oid = {} if old is None else {"oid": entry(file["path"], old)["oid"]}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": files})

    def batch(self, repository):
        """Where to put objects; of those that are here it says nothing."""
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.server.storage}/{wanted['oid']}"}}
            actions["verify"] = {"href": f"{self.server.url}/{repository}.git/info/lfs/verify"}
            objects.append(wanted | ({} if wanted["oid"] in self.server.objects else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": objects})

    def put_object(self, oid):
        """The address alone lets write, as on the hub's storage; the content must be the one announced."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.fail(422, "other content than announced")
            return
        self.server.objects[oid] = self.body
        self.answer({})

    def verify(self):
        wanted = json.loads(self.body)
        same = len(self.server.objects.get(wanted["oid"], b"")) == wanted["size"]
        self.answer({}) if same else self.fail(404, "Object not found")

    def commit(self, repository):
        if not self.known(repository):
            return
        files = dict(self.server.repositories[repository][-1][1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] not in self.server.objects:
                self.fail(400, f"no object of {value['path']}")
                return
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        error = card_error(files.get("README.md", b"").decode())
        if error:
            self.fail(400, error)
            return
        commit = self.server.commit(repository, files)
        url = f"{self.server.url}/{repository}/commit/{commit}"
        self.answer({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    # Reading

    def info(self, repository, revision="main"):
        if self.known(repository, revision):
            commit, files = self.find(repository, revision)
            answer = {"_id": "0" * 24, "id": repository, "modelId": repository, "sha": commit, "private": False}
            self.answer(answer | {"tags": [], "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repository, revision, folder=""):
        """Files below a folder; those of its folders too, which is what is asked for."""
        if self.known(repository, revision):
            files = self.find(repository, revision)[1]
            entries = [entry(path, content) for path, content in files.items() if path.startswith(folder)]
            self.answer(entries) if entries else self.fail(404, "Entry not found", "EntryNotFound")

    def resolve(self, repository, revision, path):
        """A text file's content, or where the object of another file is."""
        if not self.known(repository, revision):
            return
        commit, files = self.find(repository, revision)
        if path not in files:
            self.fail(404, "Entry not found", "EntryNotFound")
            return
        file = entry(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file["oid"]}"'}
        if "lfs" not in file:
            self.answer(files[path], 200, headers)
            return
        oid = file["lfs"]["oid"]
        headers |= {"X-Linked-Size": file["size"], "X-Linked-ETag": f'"{oid}"'}
        self.answer(b"", 302, headers | {"Location": f"{self.server.storage}/{oid}"})

    def get_object(self, oid):
        self.answer(self.server.objects[oid], 200, {"ETag": f'"{oid}"'})

    # What these share

    def find(self, repository, revision):
        """Id and files of a commit, by its id or as the newest, "main"; None if there is none."""
        commits = self.server.repositories[repository]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)

    def known(self, repository, revision="main"):
        """Whether repository and revision are there; answers if not."""
        if repository not in self.server.repositories:
            self.fail(404, "Repository not found", "RepoNotFound")
        elif not self.find(repository, revision):
            self.fail(404, "Invalid rev id", "RevisionNotFound")
        else:
            return True
        return False

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while not chunks or chunks[-1]:
            chunks.append(self.rfile.read(int(self.rfile.readline(), 16)))
            self.rfile.readline()
        return b"".join(chunks)

    def answer(self, value, status=200, headers=None):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)

    def log_message(self, *words):
        """No lines between the tests' own."""


REPOSITORY = "(?P<repository>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
ROUTES = [  # request, method, whether it wants a token
    ("GET /api/whoami-v2", Handler.who_am_i, True),
    ("POST /api/repos/create", Handler.create, True),
    ("POST /api/validate-yaml", Handler.validate_card, False),
    (f"POST /api/models/{REPOSITORY}/preupload/main", Handler.preupload, True),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch, True),
    (r"POST /[^/]+/[^/]+\.git/info/lfs/verify", Handler.verify, True),
    ("PUT /objects/(?P<oid>[0-9a-f]+)", Handler.put_object, False),
    (f"POST /api/models/{REPOSITORY}/commit/main", Handler.commit, True),
    (f"GET /api/models/{REPOSITORY}(/revision/{REVISION})?", Handler.info, False),
    (f"GET /api/models/{REPOSITORY}/tree/{REVISION}(/(?P<folder>.*))?", Handler.tree, False),
    (f"(GET|HEAD) /{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve, False),
    ("(GET|HEAD) /objects/(?P<oid>[0-9a-f]+)", Handler.get_object, False),
]


def is_text(size, sample):
    """Whether a file, by its size and beginning, is a small text, which travels in the commit."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # it may be cut within a letter
        return size < 10_000_000 and b"\0" not in sample
    except UnicodeDecodeError:
        return False


def entry(path, content):
    """A file as the API lists it: with its git id, or with the id of its LFS object."""
    file = {"type": "file", "path": path, "size": len(content)}
    if is_text(len(content), content[:512]):
        return file | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    oid = hashlib.sha256(content).hexdigest()
    return file | {"oid": oid, "lfs": {"oid": oid, "size": len(content), "pointerSize": 134}}


def card_error(content):
    """What the hub has against a model card, None if nothing."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        base_model = (yaml.safe_load(match[1]) if match else {}).get("base_model", "any")
    except yaml.YAMLError as error:
        return f"no YAML: {error}"
    if not isinstance(base_model, str) or not HUB_ID.fullmatch(base_model):
        return f'"base_model" with value "{base_model}" is not valid. Use a model id from https://hf.co/models.'
    return None
