"""A web of pictures on loopback, with the services that retrieve.py asks, for its tests."""

import base64
import io
import json
import os
import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from launching import ROOT, run
from pictures import make_picture
from PIL import Image

SCRIPT = ROOT / "retrieve.py"


class Web(ThreadingHTTPServer):
    """Answers from `routes`: path -> bytes of a picture, (status, headers, bytes), or a function of the handler.

    `asked` counts the paths that were asked for, `connections` the connections.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host="127.0.0.1", context=None):
        super().__init__((host, 0), Handler)
        self.context = context
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.routes, self.asked, self.lock, self.connections = {}, Counter(), threading.Lock(), 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, path=""):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def add_pictures(self, count, start=0):
        """Routes /0.jpg, /1.jpg … to different pictures; returns their urls."""
        for number in range(start, start + count):
            self.routes[f"/{number}.jpg"] = picture_bytes(number)
        return [self.url(f"/{number}.jpg") for number in range(start, start + count)]

    def add_backend(self, urls, captions=None):
        """Routes /knn-service to a clip-retrieval backend that finds these urls; returns the list of its queries."""
        queries = []
        captions = captions or [f"a cat, number {number}" for number in range(len(urls))]

        def answer(handler):
            queries.append(json.loads(handler.body))
            found = [{"id": i, "similarity": 0.3, "url": url} for i, url in enumerate(urls)]
            found = [f | ({} if text is None else {"caption": text}) for f, text in zip(found, captions, strict=True)]
            handler.answer(json.dumps(found[: queries[-1]["num_images"]]).encode())

        self.routes["/knn-service"] = answer
        return queries

    def add_openverse(self, results, page_count=None):
        """Routes /v1/images/ to an Openverse search with these results; returns the list of its queries."""
        queries = []

        def answer(handler):
            query = {name: values[0] for name, values in parse_qs(urlsplit(handler.path).query).items()}
            queries.append(query | {"token": handler.headers.get("Authorization")})
            page, size = int(query["page"]), int(query["page_size"])
            found = {
                "result_count": len(results),
                "page_count": page_count or -(-len(results) // size),
                "page_size": size,
                "page": page,
                "results": results[(page - 1) * size : page * size],
            }
            handler.answer(json.dumps(found).encode())

        self.routes["/v1/images/"] = answer
        return queries

    def verify_request(self, request, client_address):
        self.connections += 1
        return True

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class Proxy(Web):
    """A proxy that answers for every http host from its own routes, and leads every tunnel to the port `target`.

    `requests` holds what it was asked for. It wants the user and password in `credentials`, but not for `open_paths`.
    """

    def __init__(self, **options):
        self.requests, self.credentials, self.target, self.open_paths = [], None, None, set()
        super().__init__(**options)

    def admits(self, handler):
        """Whether a request has the right password; answers it if not. A handler of a plain server asks, too."""
        if self.credentials and urlsplit(handler.path).path not in self.open_paths:
            given = handler.headers.get("Proxy-Authorization", "").removeprefix("Basic ")
            if base64.b64decode(given).decode() != self.credentials:
                handler.answer(b"", 407, {"Proxy-Authenticate": "Basic"})
                return False
        self.requests.append(handler.path)
        return True

    def tunnel(self, handler):
        """Carries bytes both ways until one side ends."""
        handler.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.target)) as far:
            ways = {handler.connection: far, far: handler.connection}
            handler.connection.settimeout(0.05)
            far.settimeout(0.05)
            while True:
                for source, sink in ways.items():
                    try:
                        data = source.recv(65536)
                    except TimeoutError:
                        continue
                    if not data:
                        return
                    sink.sendall(data)


class Handler(BaseHTTPRequestHandler):
    def do_CONNECT(self):
        if self.server.admits(self):
            self.server.tunnel(self)

    def do_GET(self):
        if isinstance(self.server, Proxy) and not self.server.admits(self):
            return
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.asked[path] += 1
        route = self.server.routes.get(path, (404, {}, b"no such page"))
        if callable(route):
            route(self)
        elif isinstance(route, bytes):
            self.answer(route, 200, {"Content-Type": "image/jpeg"})
        else:
            self.answer(route[2], route[0], route[1])

    do_POST = do_GET

    def answer(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        """No lines between the tests' own."""


def picture_bytes(seed, form="JPEG", **options):
    """File of the picture with that seed; different seeds give different pictures."""
    buffer = io.BytesIO()
    make_picture(seed).save(buffer, form, **options)
    return buffer.getvalue()


def command(folder, *words, **options):
    """Runs retrieve.py as a process for cats."""
    base = ("--class_prompt", "cat", "--class_data_dir", folder)
    return run(sys.executable, SCRIPT, *base, *words, **options)


def read_set(folder):
    """What a folder holds: list of (file, caption, url, metadata). Fails unless all of it agrees."""
    lists = [(folder / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, (name, caption, url, row) in enumerate(zip(*lists, rows, strict=True)):
        assert name == row["file_name"] == f"images/{number}.jpg"
        assert (row["text"], row["url"]) == (caption, url)
        with Image.open(folder / name) as image:
            image.load()
            assert image.format == "JPEG" and image.mode == "RGB"
    assert sorted(os.listdir(folder)) == ["caption.txt", "images", "images.txt", "metadata.jsonl", "urls.txt"]
    assert set(os.listdir(folder / "images")) == {f"{number}.jpg" for number in range(len(rows))}
    return [(folder / name, caption, url, row) for name, caption, url, row in zip(*lists, rows, strict=True)]
