"""retrieve.py against harm: hostile servers, private hosts, and being killed at any moment.

A server costs one candidate, never the run; private hosts are left alone; after a kill nothing torn is seen, and
nothing is fetched twice.
"""

import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from subprocess import PIPE

import pytest
from launching import flags, run
from pictures import make_picture
from web import SCRIPT, Proxy, Web, command, picture_bytes, read_set

import retrieve as retrieve_module
from retrieve import MAX_ANSWER_BYTES, RetrieveError, is_public, retrieve


def send(handler, *chunks, pause=0.0):
    """Sends raw bytes, until the client goes away."""
    for chunk in chunks:
        handler.wfile.write(chunk)
        handler.wfile.flush()
        time.sleep(pause)


def endless(chunk, pause=0.0, start=b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"):
    """A route that goes on sending `chunk` (for half a minute, should nobody hang up)."""

    def route(handler):
        end = time.monotonic() + 30
        send(handler, start)
        while time.monotonic() < end:
            send(handler, chunk, pause=pause)

    return route


def says(**headers):
    """A route that promises more than it sends, and then waits."""

    def route(handler):
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        send(handler, f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n{lines}\r\n".encode(), picture_bytes(900)[:500])
        if "10" in lines:
            time.sleep(10)

    return route


def png(width, height):
    """PNG of one colour, whose file is small however large it is."""

    def part(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", packed) + part(b"IEND", b"")


def flaky(handler):
    """Unavailable the first time."""
    if handler.server.asked["/flaky.jpg"] == 1:
        handler.answer(b"", 503, {"Retry-After": "0"})
    else:
        handler.answer(picture_bytes(100))


def picture_file(form, seed=0, size=80, **options):
    buffer = io.BytesIO()
    make_picture(seed, size, size).save(buffer, form, **options)
    return buffer.getvalue()


JPEG = {"Content-Type": "image/jpeg"}
GZIP = JPEG | {"Content-Encoding": "gzip"}
BOMB = gzip.compress(gzip.compress(bytes(10**8)))
HOSTILE = {  # path -> route, and how the summary counts it (None: it gives a picture)
    "endless": (endless(b"x" * 65536), "too large"),
    "slow": (endless(b"x", pause=0.2), "timed out"),
    "slow-headers": (endless(b"X", 0.2, b"HTTP/1.1 200 OK\r\n"), "timed out"),
    "many-headers": (endless(b"X: y\r\n", 0, b"HTTP/1.1 200 OK\r\n"), "connection failed"),
    "continue": (endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01, b""), "timed out"),
    "silent": (lambda handler: time.sleep(10), "timed out"),
    "huge": (says(Content_Length=10 * 2**30), "too large"),
    "cut-off": (says(Content_Length=5000, Connection="close"), "connection failed"),
    "chunks": (says(Transfer_Encoding="chunked", Connection="close"), "connection failed"),
    "no-http": (lambda handler: send(handler, b"220 smtp ready\r\n"), "connection failed"),
    "text": ((200, {"Content-Type": "text/html"}, b"<html>a cat</html>"), "not a picture"),
    "html-called-jpeg": ((200, JPEG, b"<html>a cat</html>"), "not a readable picture"),
    "svg": (
        (200, {"Content-Type": "image/svg+xml"}, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "not a readable picture",
    ),
    "postscript": ((200, JPEG, picture_file("EPS")), "not a readable picture"),
    "other-format": ((200, JPEG, picture_file("PCX")), "not a readable picture"),
    "nothing": ((200, JPEG, b""), "not a readable picture"),
    "truncated": ((200, JPEG, picture_bytes(901)[:-200]), "not a readable picture"),
    "bomb": ((200, {"Content-Type": "image/png"}, png(30000, 30000)), "too many pixels"),
    "small-bomb": ((200, {"Content-Type": "image/png"}, png(8000, 8000)), "too many pixels"),
    "tiny": ((200, JPEG, picture_file("JPEG", size=63)), "too small"),
    "loop": ((302, {"Location": "/loop.jpg"}, b""), "too many redirects"),
    "to-file": ((302, {"Location": "file:///etc/passwd"}, b""), "not an http(s) URL"),
    "to-ftp": ((302, {"Location": "ftp://127.0.0.1/x.jpg"}, b""), "not an http(s) URL"),
    "to-nowhere": ((302, {"Location": "http://[::1"}, b""), "not an http(s) URL"),
    "redirect-without-end": (endless(b"x", 0, b"HTTP/1.0 302 Found\r\nLocation: /missing.jpg\r\n\r\n"), "HTTP 404"),
    "gzip-bomb": ((200, GZIP, gzip.compress(bytes(10**8))), "too large"),
    "gzip-bomb-in-a-bomb": ((200, GZIP | {"Content-Encoding": "gzip, gzip"}, BOMB), "too large"),
    "no-gzip": ((200, GZIP, b"no gzip"), "connection failed"),
    "noai": ((200, JPEG | {"X-Robots-Tag": "noindex, NoAI"}, picture_bytes(902)), "noai"),
    "noimageai": ((200, JPEG | {"X-Robots-Tag": "otherbot: noimageai"}, picture_bytes(903)), "noai"),
    "same-bytes": (picture_bytes(0), "duplicate"),
    "same-pixels": ((200, {"Content-Type": "image/png"}, picture_file("PNG", 50)), "duplicate"),
    "broken": ((500, {}, b""), "HTTP 500"),
    "missing": ((404, {}, b""), "HTTP 404"),
    "moved": ((301, {"Location": "/really/moved.jpg"}, b""), None),
    "flaky": (flaky, None),
    "gzip": ((200, GZIP, gzip.compress(picture_bytes(104))), None),
    "x-gzip": ((200, JPEG | {"Content-Encoding": "x-gzip"}, gzip.compress(picture_bytes(105))), None),
    "deflate": ((200, JPEG | {"Content-Encoding": "deflate"}, zlib.compress(picture_bytes(106))), None),
    "untyped": ((200, {"Content-Type": "application/octet-stream"}, picture_bytes(101)), None),
    "trailing-noaim": ((200, JPEG | {"X-Robots-Tag": "noaim"}, picture_bytes(102)), None),
}


def test_hostile_servers(web, local, tmp_path, capsys):
    """Every kind of harm between good pictures; the run ends soon, with the good ones, in order, and nothing else."""
    good = web.add_pictures(6)
    web.routes["/50.jpg"] = (200, {"Content-Type": "image/bmp"}, picture_file("BMP", 50))
    web.routes["/really/moved.jpg"] = picture_bytes(103)
    urls = [*good[:3], web.url("/50.jpg")]
    for name, (route, _) in HOSTILE.items():
        web.routes[f"/{name}.jpg"] = route
        urls.append(web.url(f"/{name}.jpg"))
    urls += [web.url(f"/dead/{number}.jpg") for number in range(60)] + good[3:]
    urls += ["file:///etc/passwd", "http://", "javascript:alert(1)", good[0]]
    web.add_backend(urls)
    start = time.monotonic()
    options = local | {"timeout": 1.5, "max_bytes": 300_000, "retries": 1}
    count = retrieve("cat", tmp_path / "cat", 50, source="clip-retrieval", **options)
    assert time.monotonic() - start < 25
    expected = [name for name, (_, kind) in HOSTILE.items() if kind is None]
    expected = [*good[:3], web.url("/50.jpg"), *(web.url(f"/{name}.jpg") for name in expected), *good[3:]]
    assert [row[2] for row in read_set(tmp_path / "cat")] == expected and count == len(expected)
    assert os.listdir(tmp_path) == ["cat"]

    summary = capsys.readouterr().out.split("Skipped ")[1].splitlines()[0].split(": ")[1]
    counted = {kind: int(number) for number, _, kind in (item.partition(" ") for item in summary.split(", "))}
    kinds = [kind for _, kind in HOSTILE.values() if kind] + ["HTTP 404"] * 60 + ["not an http(s) URL"] * 3
    assert counted == {kind: kinds.count(kind) for kind in kinds}


# Addresses

PRIVATE = """127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1
    224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 fe80::1%eth0 fc00::1 fd12::1
    fec0::1 ff02::1 2001:db8::1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 64:ff9b::7f00:1 64:ff9b:1::1"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 2606:4700:4700::1111 2001:4860:4860::8888 64:ff9b::808:808"


def test_which_addresses_are_public():
    assert [address for address in PRIVATE.split() if is_public(address)] == []
    assert [address for address in PUBLIC.split() if not is_public(address)] == []


NAMES = {"public.example": ["93.184.216.34"], "private.example": ["127.0.0.1"], "mapped.example": ["::ffff:127.0.0.1"]}


@pytest.fixture
def contacts(monkeypatch):
    """An internet whose hosts 93.184.216.34 and 198.18.0.7 are this machine; all addresses that sockets connect to.

    `NAMES` resolve as there; a list of several lists gives another answer each time.
    """
    made, look_up = [], socket.getaddrinfo

    class Watched(socket.socket):
        def connect(self, address):
            made.append(address[0])
            if address[0] in ("8.8.4.4", "2606:4700::8"):  # where nobody answers
                time.sleep(self.gettimeout())
                raise TimeoutError
            if address[0] not in ("93.184.216.34", "127.0.0.1", "198.18.0.7"):
                raise ConnectionRefusedError
            super().connect(("127.0.0.1", address[1]))

    def resolve(host, port, *words, **options):
        addresses = NAMES.get(host)
        if not addresses:
            return look_up(host, port, *words, **options)
        kinds = [(a, socket.AF_INET6 if ":" in a else socket.AF_INET) for a in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for address, kind in kinds]

    monkeypatch.setattr(socket, "socket", Watched)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return made


def backend_answers(web, urls):
    web.routes["/knn-service"] = (200, {}, json.dumps([{"url": url} for url in urls]).encode())


def test_private_hosts_are_not_contacted(web, local, contacts, tmp_path, capsys):
    """However the address is written. Only the backend, which the user chose, is."""
    port = web.server_port
    hosts = "127.0.0.1 localhost 127.1 2130706433 0x7f000001 0177.0.0.1 0.0.0.0 [::1] [::] [::ffff:127.0.0.1] 10.0.0.1"
    hosts += " 169.254.169.254 192.168.0.1 100.64.0.1 [fe80::1] [fd00::1] [64:ff9b::7f00:1] user@127.0.0.1"
    urls = [f"http://{host}:{port}/0.jpg" for host in hosts.split()] + [f"https://127.0.0.1:{port}/0.jpg"]
    web.add_pictures(1)
    backend_answers(web, urls)
    options = local | {"allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 9, source="clip-retrieval", **options) == 0
    out = capsys.readouterr().out
    assert f"{len(urls)} private address" in out and "has 0 pictures" in out
    assert set(web.asked) == {"/knn-service"} and set(contacts) == {"127.0.0.1"}
    assert web.connections == len(contacts) == web.asked["/knn-service"]
    assert os.listdir(tmp_path) == []


def test_private_hosts_as_a_process(web, tmp_path):
    """As a user meets it: the summary says why, exit status 1."""
    backend_answers(web, web.add_pictures(3))
    words = flags(backend_url=web.url("/knn-service"), source="clip-retrieval", num_class_images=3)
    process = command(tmp_path / "cat", *words)
    assert process.returncode == 1 and "3 private address" in process.stdout
    assert set(web.asked) == {"/knn-service"}


def test_redirects_to_private_hosts(web, local, contacts, tmp_path, monkeypatch, capsys):
    """A public server redirects to private ones, which never hear of it."""
    inside = Web()
    try:
        inside.routes["/0.jpg"] = picture_bytes(0)
        hosts = ("127.0.0.1", "localhost", "[::1]", "private.example", "mapped.example")
        for number, host in enumerate(hosts):
            location = {"Location": f"http://{host}:{inside.server_port}/0.jpg"}
            web.routes[f"/to/{number}.jpg"] = (302, location, b"")
        web.routes["/twice.jpg"] = (301, {"Location": "/to/0.jpg"}, b"")
        web.routes["/slashes.jpg"] = (307, {"Location": f"//localhost:{inside.server_port}/0.jpg"}, b"")
        web.add_pictures(1)
        paths = [*(f"/to/{number}.jpg" for number in range(len(hosts))), "/twice.jpg", "/slashes.jpg", "/0.jpg"]
        public = f"http://public.example:{web.server_port}"
        backend_answers(web, [public + path for path in paths])
        options = {"source": "clip-retrieval", **local}
        assert retrieve("cat", tmp_path / "cat", 9, **options | {"allow_private_hosts": False}) == 1
        assert inside.connections == 0 and "7 private address" in capsys.readouterr().out
        assert contacts.count("127.0.0.1") == web.asked["/knn-service"]
        # the same ways lead to the picture where that is allowed
        assert retrieve("cat", tmp_path / "b", 1, **options) == 1
        assert inside.connections == 1
    finally:
        inside.shutdown()
        inside.server_close()


def test_names_that_change_their_address(web, local, contacts, tmp_path, monkeypatch):
    """DNS rebinding: public when it is checked, private ever after. What was checked is what is connected to."""
    answers, asked, resolve = iter(["93.184.216.34"]), [], socket.getaddrinfo

    def rebinding(host, port, *words, **options):
        if host != "rebind.example":
            return resolve(host, port, *words, **options)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    web.routes["/0.jpg"] = (503, {}, b"")
    backend_answers(web, [f"http://rebind.example:{web.server_port}/0.jpg"])
    options = local | {"allow_private_hosts": False, "retries": 2}
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options) == 0
    # asked at the public address, tried again, and refused there
    assert contacts.count("93.184.216.34") == 1 and len(asked) == 2 and web.asked["/0.jpg"] == 1


def test_mixed_addresses(web, local, contacts, tmp_path, monkeypatch):
    """Of a name with public and private addresses only the public ones are tried, one after another."""
    monkeypatch.setitem(NAMES, "mixed.example", ["10.0.0.1", "8.8.8.8", "93.184.216.34", "127.0.0.1"])
    web.add_pictures(1)
    backend_answers(web, [f"http://mixed.example:{web.server_port}/0.jpg"])
    options = local | {"allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options) == 1
    assert [address for address in contacts if address != "127.0.0.1"] == ["8.8.8.8", "93.184.216.34"]


def test_netrc_is_not_used(web, local, tmp_path, monkeypatch):
    """No password is sent to anybody."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = []

    def route(handler):
        sent.append(handler.headers.get("Authorization"))
        handler.answer(picture_bytes(0))

    web.routes["/0.jpg"] = route
    backend_answers(web, [web.url("/0.jpg")])
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local) == 1
    assert sent == [None]


def new_key(folder, name, *words):
    """Files of a new key and of its certificate, or of a request for one, as openssl's words say."""
    files = [folder / f"{name}.key", folder / f"{name}.pem"]
    words = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", *words]
    run("openssl", *words, "-keyout", files[0], "-out", files[1], check=True)
    return files


def start_secure_web(key, certificate):
    """Server for https with two pictures."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Web(context=context)
    server.add_pictures(2)
    return server


def secure_web(folder):
    """Server for https with two pictures, and the file of its certificate, which is for localhost and cats.example."""
    names = "subjectAltName=DNS:localhost,DNS:cats.example"
    key, certificate = new_key(folder, "localhost", "-x509", "-addext", names)
    return start_secure_web(key, certificate), certificate


def test_certificates(web, tmp_path):
    """https: a certificate that nobody vouches for, or that is another host's, costs the candidate."""
    secure, certificate = secure_web(tmp_path)
    urls = [f"https://{host}:{secure.server_port}/0.jpg" for host in ("127.0.0.1", "localhost")]
    backend_answers(web, urls)
    words = flags(backend_url=web.url("/knn-service"), source="clip-retrieval", num_class_images=2, retries=0)
    process = command(tmp_path / "a", *words, "--allow_private_hosts")
    assert "2 bad certificate" in process.stdout and not secure.asked
    process = command(tmp_path / "a", *words, "--allow_private_hosts", env=os.environ | {"SSL_CERT_FILE": certificate})
    assert "1 bad certificate" in process.stdout
    assert [row[2] for row in read_set(tmp_path / "a")] == urls[1:]


def test_many_slow_addresses(web, local, contacts, tmp_path, monkeypatch, capsys):
    """A name with many addresses that nobody answers at costs no more than --timeout."""
    monkeypatch.setitem(NAMES, "slow.example", ["8.8.4.4"] * 100)
    backend_answers(web, ["http://slow.example/0.jpg"])
    start = time.monotonic()
    retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local | {"timeout": 1.0, "connect_timeout": 0.3})
    assert time.monotonic() - start < 3 and "1 timed out" in capsys.readouterr().out
    assert contacts.count("8.8.4.4") >= 3


def test_slow_handshake(web, local, tmp_path, capsys):
    """A TLS server that sends a byte now and then costs no more than --timeout."""
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"\x16\x03\x03\x40\x00")
            for _ in range(100):
                connection.sendall(b"\x02")
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    backend_answers(web, [f"https://127.0.0.1:{server.getsockname()[1]}/0.jpg"])
    start = time.monotonic()
    retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local | {"timeout": 1.0})
    assert time.monotonic() - start < 5 and "1 timed out" in capsys.readouterr().out
    server.close()


def test_servers_that_compress_unasked(web, local, tmp_path):
    """The answers of both searches and the pictures come with gzip, though the request allows no encoding."""
    asked = []

    def compressed(content, kind):
        def answer(handler):
            asked.append(handler.headers["Accept-Encoding"])
            handler.answer(gzip.compress(content), 200, {"Content-Type": kind, "Content-Encoding": "gzip"})

        return answer

    for number in range(2):
        web.routes[f"/{number}.jpg"] = compressed(picture_bytes(number), "image/jpeg")
    found = [{"url": web.url(f"/{number}.jpg"), "caption": "a cat", "title": "a cat"} for number in range(2)]
    web.routes["/knn-service"] = compressed(json.dumps(found).encode(), "application/json")
    openverse = {"page_count": 1, "results": found}
    web.routes["/v1/images/"] = compressed(json.dumps(openverse).encode(), "application/json")
    for source in ("clip-retrieval", "openverse"):
        process = command(tmp_path / source, *flags(source=source, num_class_images=2, **local))
        assert process.returncode == 0, process.stderr
        assert [row[1] for row in read_set(tmp_path / source)] == ["a cat"] * 2
    assert len(asked) == 6 and set(asked) == {"identity"}


def test_search_that_is_a_bomb(web, local, tmp_path):
    """A small answer that unpacks to more than a search may have."""
    bomb = gzip.compress(b"[" + b" " * (MAX_ANSWER_BYTES + 1) + b"]", 1)
    web.routes["/knn-service"] = (200, {"Content-Encoding": "gzip"}, bomb)
    with pytest.raises(RetrieveError, match="too large"):
        retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local)


def test_servers_that_want_an_address(web, local, tmp_path):
    """Wikimedia's servers refuse a user agent that does not say where to ask about it."""
    picture = picture_bytes(0)

    def answer(handler):
        agent = handler.headers["User-Agent"]
        known = re.search(r"https?://\w+\.\w+|\w@\w+\.\w+", agent)
        handler.answer(picture if known else b"", 200 if known else 403)

    web.routes["/0.jpg"] = answer
    backend_answers(web, [web.url("/0.jpg")])
    process = command(tmp_path / "cat", *flags(source="clip-retrieval", num_class_images=1, **local))
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("answer", ["endless", "slow", "deep"])
def test_hostile_search(answer, web, local, tmp_path):
    """The search service, too, may answer without end, slowly, or JSON that is deeper than a stack."""
    start = b"HTTP/1.0 200 OK\r\n\r\n["
    routes = {"endless": endless(b" " * 65536, 0, start), "slow": endless(b" ", 0.2, start)}
    web.routes["/knn-service"] = routes.get(answer, (200, {}, b"[" * 100_000))
    web.routes["/v1/images/"] = (200, {}, b"[]")
    began = time.monotonic()
    with pytest.raises(RetrieveError):
        retrieve("cat", tmp_path / "cat", 1, **local | {"timeout": 1.0})
    assert time.monotonic() - began < 10


def test_endless_search(web, local, tmp_path):
    """A backend that always finds more, all of it dead: the run ends all the same."""

    def route(handler):
        count = json.loads(handler.body)["num_images"]
        handler.answer(json.dumps([{"url": web.url(f"/dead/{number}.jpg")} for number in range(count)]).encode())

    web.routes["/knn-service"] = route
    assert retrieve("cat", tmp_path / "cat", 3, source="clip-retrieval", **local) == 0
    assert web.asked.total() - web.asked["/knn-service"] == 60


def test_ipv6_that_leads_nowhere(web, local, contacts, tmp_path, monkeypatch):
    """A name with several addresses of it, and one of IPv4, which gets its turn within --timeout."""
    monkeypatch.setitem(NAMES, "dual.example", ["2606:4700::8"] * 4 + ["93.184.216.34"])
    web.add_pictures(1)
    backend_answers(web, [f"http://dual.example:{web.server_port}/0.jpg"])
    options = local | {"timeout": 1.0, "connect_timeout": 0.3, "allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options) == 1
    assert [address for address in contacts if address != "127.0.0.1"] == ["2606:4700::8", "93.184.216.34"]


def test_letters_in_addresses(web, local, contacts, tmp_path, monkeypatch):
    """Of other scripts, in a URL, in its host (also encoded), and as bytes in a redirect, in either encoding."""
    monkeypatch.setitem(NAMES, "xn--d1abbgf6aiiy.xn--p1ai", ["93.184.216.34"])
    port = web.server_port
    names = {
        "/%ED%85%8C%20(5).jpg": f"http://public.example:{port}/테 (5).jpg",
        "/1.jpg": f"http://президент.рф:{port}/1.jpg",
        "/2.jpg": f"http://%D0%BF%D1%80%D0%B5%D0%B7%D0%B8%D0%B4%D0%B5%D0%BD%D1%82.%D1%80%D1%84:{port}/2.jpg",
        "/gr%C3%B6%C3%9Fe.jpg": f"http://public.example:{port}/utf8",
        "/gr%F6%DFe.jpg": f"http://public.example:{port}/latin1",
    }
    for number, path in enumerate(names):
        web.routes[path] = picture_bytes(number)
    for encoding in ("utf8", "latin1"):
        location = "/größe.jpg".encode(encoding)
        web.routes[f"/{encoding}"] = redirect_to(location)
    backend_answers(web, list(names.values()))
    options = local | {"allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 9, source="clip-retrieval", **options) == len(names)
    assert [row[2] for row in read_set(tmp_path / "cat")] == list(names.values())


def redirect_to(location):
    return lambda handler: send(handler, b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")


def test_strict_certificates(web, tmp_path):
    """Since Python 3.13, certificates have to name their issuer's key, which those of many companies do not."""
    issuer_key, issuer = new_key(tmp_path, "company", "-x509")
    key, asked_for = new_key(tmp_path, "localhost")
    (tmp_path / "extensions").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=none\n")
    words = ["-CA", issuer, "-CAkey", issuer_key, "-CAcreateserial", "-extfile", tmp_path / "extensions"]
    run("openssl", "x509", "-req", "-in", asked_for, *words, "-out", tmp_path / "signed.pem", check=True)
    secure = start_secure_web(key, tmp_path / "signed.pem")
    backend_answers(web, [f"https://localhost:{secure.server_port}/0.jpg"])
    (tmp_path / "sitecustomize.py").write_text(STRICT)
    words = flags(backend_url=web.url("/knn-service"), source="clip-retrieval", num_class_images=1, retries=0)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "REQUESTS_CA_BUNDLE": str(issuer)}
    process = command(tmp_path / "cat", *words, "--allow_private_hosts", env=env)
    assert process.returncode == 0, process.stdout


STRICT = """
import ssl
create = ssl.create_default_context

def as_in_python_3_13(*words, **options):
    context = create(*words, **options)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context

ssl.create_default_context = as_in_python_3_13
"""


def test_stand_in_addresses(web, local, contacts, tmp_path, monkeypatch, capsys):
    """VPN programs resolve all names into 198.18.0.0/15, and perhaps a private network of IPv6."""
    monkeypatch.setitem(NAMES, "cats.example", ["198.18.0.7"])
    monkeypatch.setitem(NAMES, "more.example", ["fc00::7", "198.18.0.7"])
    monkeypatch.setitem(NAMES, "home.example", ["192.168.0.1", "198.17.0.1", "198.20.0.1"])
    web.add_pictures(2)
    port = web.server_port
    web.routes["/to.jpg"] = (302, {"Location": f"http://198.18.0.7:{port}/0.jpg"}, b"")
    paths = ["cats.example:PORT/0.jpg", "198.18.0.7:PORT/0.jpg", "3323068423:PORT/0.jpg", "cats.example:PORT/to.jpg"]
    urls = [f"http://{path}".replace("PORT", str(port)) for path in [*paths, "more.example:PORT/1.jpg"]]
    backend_answers(web, [*urls, f"http://home.example:{port}/0.jpg"])
    options = local | {"allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 9, source="clip-retrieval", **options) == 2
    assert [row[2] for row in read_set(tmp_path / "cat")] == [urls[0], urls[4]]
    assert "3 private address" in capsys.readouterr().out
    assert set(contacts) == {"127.0.0.1", "198.18.0.7", "198.17.0.1", "198.20.0.1"}


# Proxies

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture
def proxy(monkeypatch):
    """A proxy on loopback, of which the environment says nothing yet."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    server = Proxy()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_proxy(variable, proxy, local, tmp_path, monkeypatch, capsys):
    """Searches and pictures come by way of it, though no name resolves here; it is told the user and the password."""
    monkeypatch.setenv(variable, f"http://me:p%40ss%C3%A9@127.0.0.1:{proxy.server_port}")
    proxy.credentials = "me:p@ssé"
    proxy.add_pictures(2)
    proxy.routes["/to/1.jpg"] = (302, {"Location": "http://elsewhere.example/1.jpg?size=9"}, b"")
    private = ["127.0.0.1", "127.1", "localhost", "cats.localhost", "10.0.0.1", "[::1]", "169.254.169.254"]
    urls = ["http://cats.example/0.jpg", "http://me:secret@cats.example:81/to/1.jpg#top"]
    backend_answers(proxy, urls + [f"http://{host}:{proxy.server_port}/0.jpg" for host in private])
    options = local | {"backend_url": "http://search.example/knn-service", "allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 3, source="clip-retrieval", **options) == 2
    assert [row[2] for row in read_set(tmp_path / "cat")] == urls
    assert re.search("[67] private address", capsys.readouterr().out)  # not every system resolves cats.localhost
    asked = {"http://search.example/knn-service", "http://cats.example/0.jpg", "http://cats.example:81/to/1.jpg"}
    assert set(proxy.requests) == asked | {"http://elsewhere.example/1.jpg?size=9"}


@pytest.mark.parametrize("address", ["http://localhost", "localhost", "https://localhost"])
def test_proxy_for_https(address, proxy, local, tmp_path, monkeypatch, capsys):
    """A tunnel, through which the host's own certificate is checked; the proxy may be asked by https itself."""
    server, certificate = secure_web(tmp_path)
    front = Proxy(context=server.context) if address.startswith("https") else proxy
    front.target = server.server_port
    front.credentials = "me:pass"
    scheme, _, name = address.rpartition("://")
    scheme = f"{scheme}://" if scheme else ""
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}me:pass@{name}:{front.server_port}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    backend_answers(server, ["https://cats.example/0.jpg", "https://dogs.example/1.jpg"])
    options = local | {"backend_url": "https://cats.example/knn-service", "allow_private_hosts": False}
    assert retrieve("cat", tmp_path / "cat", 2, source="clip-retrieval", **options) == 1
    assert [row[2] for row in read_set(tmp_path / "cat")] == ["https://cats.example/0.jpg"]
    assert "1 bad certificate" in capsys.readouterr().out
    assert set(front.requests) == {"cats.example:443", "dogs.example:443"}


def test_hosts_without_a_proxy(proxy, web, local, contacts, tmp_path, monkeypatch):
    """Those that NO_PROXY names, also with a port, and hosts on this machine, which no proxy reaches."""
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.server_port}")
    web.add_pictures(2)
    proxy.add_pictures(3)
    port = web.server_port
    backend_answers(web, [f"http://public.example:{port}/0.jpg", web.url("/1.jpg"), "http://cats.example/2.jpg"])
    for bypass in ("public.example", f"other.example, .example:{port}"):
        monkeypatch.setenv("no_proxy", bypass)
        proxy.requests.clear()
        web.asked.clear()
        assert retrieve("cat", tmp_path / bypass, 3, source="clip-retrieval", **local) == 3
        assert set(proxy.requests) == {"http://cats.example/2.jpg"}
        assert set(web.asked) == {"/knn-service", "/0.jpg", "/1.jpg"}


FAULTS = {  # of a proxy -> what is said
    "http://me:secret@127.0.0.1:9": "proxy 127.0.0.1:9: connection failed",
    "http://me:secret@nowhere.invalid:3128": "proxy nowhere.invalid:3128: no such host",
    "http://me:wrong@127.0.0.1:PORT": "proxy 127.0.0.1:PORT: HTTP 407",
    "socks5://me:secret@127.0.0.1:1080": "the proxy is no http://host:port but socks5://…: set HTTPS_PROXY",
    "http://me:sec#ret@127.0.0.1:80": "the proxy is no http://host:port but http://…: set HTTPS_PROXY",
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_proxy(fault, scheme, proxy, local, tmp_path, monkeypatch, capsys):
    """They are named as the cause, for a search and for pictures, without the password."""
    proxy.credentials = "me:secret"
    backend_answers(proxy, [f"{scheme}://cats.example/0.jpg"])
    monkeypatch.setenv("ALL_PROXY", fault.replace("PORT", str(proxy.server_port)))
    expected = FAULTS[fault].replace("PORT", str(proxy.server_port))
    options = local | {"backend_url": f"{scheme}://search.example/knn-service"}
    with pytest.raises(RetrieveError) as error:
        retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options)
    assert expected in str(error.value)
    proxy.credentials = None
    options["backend_url"] = proxy.url("/knn-service")
    if "wrong" in fault:
        proxy.credentials, proxy.open_paths = "me:secret", {"/knn-service"}
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options) == 0
    out = capsys.readouterr().out
    assert f"1 {expected}" in out and "sec" not in out + str(error.value)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_of_a_company(variable, web, local, tmp_path, monkeypatch):
    """A file, or a folder as c_rehash leaves it; one that is missing is named."""
    server, certificate = secure_web(tmp_path)
    backend_answers(web, [f"https://localhost:{server.server_port}/0.jpg"])
    names = [certificate]
    if variable != "SSL_CERT_FILE":
        (tmp_path / "certs").mkdir()
        hashed = run("openssl", "x509", "-hash", "-noout", "-in", certificate, check=True).stdout.strip()
        shutil.copy(certificate, tmp_path / "certs" / f"{hashed}.0")
        names = [tmp_path / "certs"] if variable == "SSL_CERT_DIR" else [certificate, tmp_path / "certs"]
    words = flags(source="clip-retrieval", num_class_images=1, **local)
    for number, name in enumerate(names):
        process = command(tmp_path / str(number), *words, env=os.environ | {variable: str(name)})
        assert process.returncode == 0, process.stderr + process.stdout
    if variable.endswith("BUNDLE"):
        process = command(tmp_path / "none", *words, env=os.environ | {variable: "/no/such.pem"})
        assert process.returncode == 1 and "Traceback" not in process.stderr
        assert process.stderr.strip().endswith(
            "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE /no/such.pem: [Errno 2] No such file or directory; correct it"
        )


# Hosts that limit the rate


class Limit:
    """Makes a server refuse requests for some of its pictures: those beyond `at_once`, or all of the numbers `refused`.

    `times` holds when a request came and whether it was refused, which `answer`, a function, does.
    """

    def __init__(self, web, paths, answer, at_once=99, refused=()):
        self.answer, self.at_once, self.numbers = answer, at_once, refused
        self.busy, self.times, self.lock = 0, [], threading.Lock()
        for path in paths:
            web.routes[path] = self.limited(web.routes[path])

    def limited(self, content):
        def route(handler):
            with self.lock:
                self.busy += 1
                is_refused = self.busy > self.at_once or len(self.times) in self.numbers
                self.times.append((time.monotonic(), is_refused))
            time.sleep(0.02)
            if is_refused:
                status, headers = self.answer()
                handler.answer(b"", status, headers)
            else:
                handler.answer(content)
            with self.lock:
                self.busy -= 1

        return route

    def refusals(self):
        return sum(is_refused for _, is_refused in self.times)


LIMITS = {
    "seconds": (429, {"Retry-After": "1"}),
    "no header": (429, {}),
    "no time": (429, {"Retry-After": "soon"}),
    "now": (429, {"Retry-After": "0"}),
    "unavailable": (503, {"Retry-After": "1"}),
    "unavailable, no header": (503, {}),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_two_requests_at_once(kind, web, local, tmp_path):
    """A host that refuses a third one gives all its pictures, in their order, though faults are not retried."""
    urls = web.add_pictures(40)
    web.add_backend(urls)
    limit = Limit(web, [f"/{number}.jpg" for number in range(40)], lambda: LIMITS[kind], at_once=2)
    assert retrieve("cat", tmp_path / "cat", 40, source="clip-retrieval", **local) == 40
    assert [row[2] for row in read_set(tmp_path / "cat")] == urls
    assert 0 < limit.refusals() < 20 and len(limit.times) == 40 + limit.refusals()


def test_host_that_names_a_time(web, local, tmp_path):
    """Retry-After as a date: nobody asks before it, and the waiting is no part of --timeout."""
    urls = web.add_pictures(30)
    web.add_backend(urls)

    def answer():  # dates have whole seconds
        return 429, {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3))}

    limit = Limit(web, [f"/{number}.jpg" for number in range(30)], answer, refused=range(4, 8))
    options = local | {"timeout": 1.0, "num_workers": 4}
    assert retrieve("cat", tmp_path / "cat", 30, source="clip-retrieval", **options) == 30
    assert [row[2] for row in read_set(tmp_path / "cat")] == urls and limit.refusals() == 4
    start = next(moment for moment, is_refused in limit.times if is_refused)
    assert [moment for moment, _ in limit.times if start + 0.5 < moment < start + 1.9] == []


def test_longest_pause_counts(web, local, tmp_path):
    """Two answers were on their way, and the later one does not say how long."""
    urls = web.add_pictures(2)
    web.add_backend(urls)
    pictures = [web.routes[f"/{number}.jpg"] for number in range(2)]
    times = []

    def answer(number, delay, headers):
        def route(handler):
            times.append(time.monotonic())
            if len(times) > 2:
                return handler.answer(pictures[number])
            time.sleep(delay)
            return handler.answer(b"", 429, headers)

        return route

    web.routes |= {"/0.jpg": answer(0, 0.4, {}), "/1.jpg": answer(1, 0, {"Retry-After": "2"})}
    assert retrieve("cat", tmp_path / "cat", 2, source="clip-retrieval", **local) == 2
    assert len(times) == 4 and times[2] - times[1] > 1.9


@pytest.mark.parametrize("redirected", [False, True])
def test_other_hosts_do_not_wait(redirected, web, local, tmp_path):
    """While a host has its pause, the pictures of another come, also where redirects lead to the first."""
    urls = web.add_pictures(20)
    other = [url.replace("127.0.0.1", "localhost") for url in web.add_pictures(20, start=20)]
    names = urls
    if redirected:
        names = [web.url(f"/to/{number}").replace("127.0.0.1", "localhost") for number in range(20)]
        web.routes |= {f"/to/{i}": (302, {"Location": url}, b"") for i, url in enumerate(urls)}
    web.add_backend([url for pair in zip(names, other, strict=True) for url in pair])
    slow = Limit(web, [f"/{i}.jpg" for i in range(20)], lambda: (429, {"Retry-After": "3"}), refused=range(3))
    fast = Limit(web, [f"/{i}.jpg" for i in range(20, 40)], lambda: (200, {}))
    assert retrieve("cat", tmp_path / "cat", 40, source="clip-retrieval", **local) == 40
    (start, _), *_ = slow.times
    assert all(moment < start + 2.9 for moment, _ in fast.times)
    assert [moment for moment, _ in slow.times if start + 1 < moment < start + 2.9] == []


def test_host_that_asks_for_an_hour(web, local, tmp_path, capsys):
    """It is given up, and none of its pictures waits; another host's are there."""
    urls = web.add_pictures(60)
    other = [url.replace("127.0.0.1", "localhost") for url in web.add_pictures(10, start=60)]
    web.add_backend(urls + other)
    limit = Limit(web, [f"/{i}.jpg" for i in range(60)], lambda: (429, {"Retry-After": "3600"}), refused=range(60))
    local["backend_url"] = local["backend_url"].replace("127.0.0.1", "localhost")
    start = time.monotonic()
    assert retrieve("cat", tmp_path / "cat", 10, source="clip-retrieval", **local) == 10
    assert time.monotonic() - start < 5 and len(limit.times) <= 16
    assert [row[2] for row in read_set(tmp_path / "cat")] == other
    assert "Skipped 60 candidates: 60 rate limited\n" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["refuses", "drips"])
def test_patience_with_a_host_ends(harm, web, local, tmp_path, capsys, monkeypatch):
    """One that limits the rate, and then gives nothing, whether it says so or not, costs a limited time in all."""
    monkeypatch.setattr(retrieve_module, "MAX_PATIENCE", 2)
    urls = web.add_pictures(30)
    web.add_backend(urls)
    web.routes |= {f"/{i}.jpg": (429, {}, b"") for i in range(30)}
    if harm == "drips":
        web.routes |= {f"/{i}.jpg": endless(b"x", pause=0.1) for i in range(1, 30)}
    start = time.monotonic()
    options = local | {"timeout": 0.8, "num_workers": 1}
    assert retrieve("cat", tmp_path / "cat", 5, source="clip-retrieval", **options) == 0
    assert time.monotonic() - start < 8
    assert " rate limited" in capsys.readouterr().out


def test_address_that_is_never_available(web, local, tmp_path, capsys):
    """A status of 503 may be about one picture: it is retried --retries times, and the others come all the same."""
    urls = web.add_pictures(12)
    web.add_backend(urls)
    web.routes["/3.jpg"] = (503, {}, b"")
    assert retrieve("cat", tmp_path / "cat", 11, source="clip-retrieval", **local | {"retries": 1}) == 11
    assert [row[2] for row in read_set(tmp_path / "cat")] == urls[:3] + urls[4:]
    assert web.asked["/3.jpg"] == 3 and "1 HTTP 503" in capsys.readouterr().out


# Placeholders


def test_placeholder_of_lost_pictures(web, local, tmp_path, capsys):
    """A picture that three addresses give is none, whether they redirect to it; one at two addresses is kept once."""
    urls = web.add_pictures(20)
    lost = picture_bytes(99)
    web.routes |= {f"/{i}.jpg": (302, {"Location": "/lost.png"}, b"") for i in (1, 5, 6)}
    web.routes["/lost.png"] = (200, {"Content-Type": "image/png"}, picture_file("PNG", 98))
    web.routes |= {f"/{i}.jpg": lost for i in (2, 4, 13)}
    web.routes["/8.jpg"] = web.routes["/3.jpg"]
    web.add_backend(urls)
    expected = [url for i, url in enumerate(urls) if i not in (1, 5, 6, 2, 4, 13, 8)]
    for workers in (1, 16):
        folder = tmp_path / str(workers)
        assert retrieve("cat", folder, 20, source="clip-retrieval", num_workers=workers, **local) == 13
        assert [row[2] for row in read_set(folder)] == expected
        assert "Skipped 7 candidates: 6 placeholder, 1 duplicate\n" in capsys.readouterr().out
    # as many as are asked for, though some came to be seen as placeholders late
    assert retrieve("cat", tmp_path / "ten", 10, source="clip-retrieval", **local) == 10
    assert [row[2] for row in read_set(tmp_path / "ten")] == expected[:10]


def test_placeholder_in_a_run_that_goes_on(web, local, tmp_path, capsys):
    """What a killed run had fetched counts; a picture of an earlier set stays, and its file is named."""
    urls = web.add_pictures(9)
    web.routes |= {f"/{i}.jpg": picture_bytes(99) for i in (1, 3, 5)}
    web.add_backend(urls)
    folder = tmp_path / "cat"
    options = local | {"source": "clip-retrieval"}

    def die(handler):
        process.kill()

    web.routes["/4.jpg"] = die
    words = ["--class_prompt", "cat", "--class_data_dir", folder, *flags(num_class_images=6, num_workers=1, **options)]
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, words)])
    assert process.wait(30) == -signal.SIGKILL and any((folder / ".unfinished").iterdir())
    web.routes["/4.jpg"] = picture_bytes(4)
    assert retrieve("cat", folder, 6, **options) == 6
    assert [row[2] for row in read_set(folder)] == [urls[i] for i in (0, 2, 4, 6, 7, 8)]
    assert max(web.asked[f"/{i}.jpg"] for i in (0, 1, 2, 3)) == 1

    assert retrieve("cat", tmp_path / "b", 2, **options) == 2
    capsys.readouterr()
    assert retrieve("cat", tmp_path / "b", 6, **options) == 6
    assert [row[2] for row in read_set(tmp_path / "b")] == [urls[i] for i in (0, 1, 2, 4, 6, 7)]
    assert "images/1.jpg may be a placeholder: 3 addresses give this picture" in capsys.readouterr().out


# Killed and started again

# For each line "n folder count": runs retrieve in a child that kills itself at its n-th operation on the folder, if it
# gets that far; answers the child's exit status. Forking saves the imports.
KILLED = """
import os, signal, sys
from retrieve import retrieve

def kill_at(n):
    def hook(event, args):
        nonlocal n
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            n -= "/cat" in str(args)
        if n == 0:
            n = -1  # the kill is an event, too
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    n, folder, count = line.split()
    child = os.fork()
    if not child:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        kill_at(int(n))
        # With two workers, the order of operations would differ from run to run, and some would never be hit.
        retrieve("cat", folder, int(count), dataset=sys.argv[1], num_workers=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def dataset(tmp_path):
    """A folder with pictures of six cats, one of them twice, and .txt captions: needs no heavy imports."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, seed in enumerate((0, 1, 0, 2, 3, 4, 5)):
        (folder / f"{number}.jpg").write_bytes(picture_bytes(seed))
        (folder / f"{number}.txt").write_text(f"cat {number}")
    return folder


def contents(folder):
    """Pictures, captions and urls of a finished folder. Fails unless all of it agrees."""
    return [(file.read_bytes(), caption, url) for file, caption, url, _ in read_set(folder)]


def taken(folder):
    """Pictures, captions and urls of a folder as the trainer takes them; None where it says to run retrieve.py."""
    if not (folder / "images.txt").exists():
        return None
    lists = [(folder / name).read_text().splitlines() for name in ("images.txt", "caption.txt", "urls.txt")]
    if len(lists[0]) != len(lists[1]):
        return None
    return [((folder / name).read_bytes(), caption, url) for name, caption, url in zip(*lists, strict=False)]


@pytest.mark.parametrize("before", [0, 2])
def test_killed_at_every_operation(before, dataset, tmp_path):
    """Killed at its first, second, … operation on files, from nothing or from a smaller set.

    Each time the trainer finds what it was, nothing, or all of it; and the next run ends as if nothing had been.
    """
    older, first, expected = tmp_path / "older", tmp_path / "first" / "cat", tmp_path / "expected"
    older.mkdir()
    for number in range(2):
        (older / f"{number}.jpg").write_bytes(picture_bytes(100 + number))
        (older / f"{number}.txt").write_text("an old cat")
    retrieve("cat", first, 2, dataset=str(older))
    if before:
        shutil.copytree(first, expected)
    retrieve("cat", expected, 3, dataset=str(dataset))
    expected, start, states = contents(expected), contents(first), Counter()
    assert len(expected) == 3 and (expected[:2] == start) == bool(before)
    driver = [sys.executable, "-c", KILLED, dataset]
    with subprocess.Popen(driver, env=environment(), stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as process:
        for operation in range(1, 200):
            folder = tmp_path / str(operation) / "cat"
            if before:
                shutil.copytree(first, folder)
            process.stdin.write(f"{operation} {folder} 3\n")
            status, found = int(process.stdout.readline()), taken(folder)
            if status == 0:
                assert found == expected
                break
            assert status == -signal.SIGKILL
            assert found in (None, expected) or before and found == start
            states["none" if found is None else len(found)] += 1
            assert retrieve("cat", folder, 3, dataset=str(dataset)) == 3
            assert contents(folder) == expected and os.listdir(folder.parent) == ["cat"]
            shutil.rmtree(folder.parent)
        process.stdin.close()
    assert operation > 20 and states[3] >= 1 and states["none"] >= (2 if before else 10)
    assert states[before] >= 10 or not before


# Says so and waits before it puts a file of the name in STOP_AT in its place.
STOP = """
import os, time
replace = os.replace

def slow(*paths):
    if str(paths[-1]).endswith(os.environ["STOP_AT"]):
        os.close(os.open(os.environ["STOPPED"], os.O_CREAT))
        time.sleep(60)
    return replace(*paths[-2:])  # Python 3.10 calls it as a method

os.replace = slow
"""


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", ["2.jpg", "3.jpg", "metadata.jsonl", "caption.txt", "urls.txt", "images.txt"])
def test_killed_while_publishing(name, before, web, local, world, tmp_path):
    """kill -9 among the copying of pictures, between it and the lists, and between two lists.

    The trainer finds the set as it was, or says to run retrieve.py again, which then fetches nothing twice.
    """
    from train_custom_diffusion import parse_args, read_concepts

    folder, urls = tmp_path / "cat", web.add_pictures(4)
    web.add_backend(urls)
    options = local | {"source": "clip-retrieval"}
    if before:
        retrieve("cat", folder, before, **options)
    start = contents(folder) if before else None
    (tmp_path / "sitecustomize.py").write_text(STOP)
    stopped = tmp_path / "stopped"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "STOP_AT": f"/cat/{'images/' * ('jpg' in name)}{name}"}
    words = ["--class_prompt", "cat", "--class_data_dir", folder, *flags(num_class_images=4, **options)]
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], env=env | {"STOPPED": str(stopped)})
    while not stopped.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL

    torn = before and name in ("urls.txt", "images.txt")  # caption.txt is longer than images.txt
    assert taken(folder) == (None if torn else start)
    values = {"pretrained_model_name_or_path": "m", "instance_data_dir": world / "my_cat", "class_data_dir": folder}
    values |= {"instance_prompt": "a cat", "class_prompt": "cat", "num_class_images": 4}
    args = parse_args(flags(**values, with_prior_preservation=True, real_prior=True))
    if start and not torn:
        assert len(read_concepts(args)[0].class_samples) == before
    elif not start and name in ("caption.txt", "urls.txt", "images.txt"):
        # metadata.jsonl, which names pictures that are all in their place, is read without the lists
        assert len(read_concepts(args)[0].class_samples) == 4
    else:
        with pytest.raises(SystemExit, match="retrieve.py"):
            read_concepts(args)
    if before:  # to ask for no more than was there mends the lists without a network
        shutil.copytree(folder, tmp_path / "copy" / "cat")
        assert retrieve("cat", tmp_path / "copy" / "cat", before) == before
        for file in (tmp_path / "copy" / "cat" / "images").glob("[23].jpg"):
            file.unlink()  # in place, but in no list yet
        assert contents(tmp_path / "copy" / "cat") == start
    assert retrieve("cat", folder, 4, **options) == 4
    assert [url for *_, url in contents(folder)] == urls and contents(folder)[:before] == (start or [])
    assert max(web.asked[f"/{number}.jpg"] for number in range(4)) == 1


class Reader(threading.Thread):
    """Reads a folder all the time, as slowly as it takes; `seen` counts the sizes of the sets that it found.

    What images.txt names is there, whole, and has its lines in the other lists, which may already be longer.
    """

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.seen, self.errors, self.stopped = folder, Counter(), [], threading.Event()

    def run(self):
        while not self.stopped.wait(0.001):
            try:
                self.seen[self.read() if (self.folder / "images.txt").exists() else None] += 1
            except Exception as error:
                self.errors.append(repr(error))

    def read(self):
        lists = ("images.txt", "caption.txt", "urls.txt", "metadata.jsonl")
        names, captions, urls, rows = ((self.folder / name).read_text().splitlines() for name in lists)
        assert names == [f"images/{number}.jpg" for number in range(len(names))]
        found = [(row["file_name"], row["text"], row["url"]) for row in map(json.loads, rows[: len(names)])]
        assert found == [*zip(names, captions[: len(names)], urls[: len(names)], strict=True)]
        for name in names:
            content = (self.folder / name).read_bytes()
            assert content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")
        return len(names)


def environment():
    return os.environ | {"PYTHONPATH": str(SCRIPT.parent)}


def test_killed_at_random_and_started_again(web, local, tmp_path):
    """Forty pictures, then sixty; one url in four is dead. The server kills the run after some pictures."""
    chance, folder = random.Random(0), tmp_path / "reg" / "cat"
    alive = web.add_pictures(60)
    urls = [url for number, url in enumerate(alive) for url in (url, *[web.url(f"/dead/{number}")] * (number % 3 == 0))]
    web.add_backend(urls)
    runs, asked = [], []  # processes; (path, number of the run)
    kill_at = [0]

    def watched(content):
        def answer(handler):
            asked.append((handler.path, len(runs)))
            time.sleep(chance.random() * 0.02)
            handler.answer(content)
            if len(asked) >= kill_at[0]:
                runs[-1].kill()

        return answer

    for url in alive:
        path = url.removeprefix(web.url())
        web.routes[path] = watched(web.routes[path])
    reader = Reader(folder)
    reader.start()
    kills, saved = Counter(), set()  # kills by the number of workers; what a single worker had saved for certain
    for count in (40, 60):
        while True:
            workers = (6, 1)[kills.total() % 2]
            options = local | {"num_class_images": count, "num_workers": workers, "source": "clip-retrieval"}
            words = ["--class_prompt", "cat", "--class_data_dir", folder, *flags(**options)]
            kill_at[0] = len(asked) + chance.randint(1, 10)
            runs.append(subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], stderr=subprocess.DEVNULL))
            status = runs[-1].wait(60)
            again = saved & {path for path, number in asked if number == len(runs)}
            assert not again, f"{again} was there already"
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills[workers] += 1
            if workers == 1:
                saved.update(path for path, number in asked[:-1] if number == len(runs))
            assert kills.total() < 60, "no run gets further than the one before"
        assert len(contents(folder)) == count and os.listdir(folder.parent) == ["cat"]
    reader.stopped.set()
    reader.join(20)
    assert reader.errors == [] and set(reader.seen) <= {None, 40, 60} and reader.seen[None] and reader.seen[40]
    assert [url for _, _, url in contents(folder)] == alive
    assert kills[1] >= 2 and kills[6] >= 2
    # a picture is fetched again only if it was on its way when the run was killed
    assert len(asked) <= 60 + kills[1] + kills[6] * 6
    for path, times in Counter(path for path, _ in asked).items():
        numbers = [number for asked_path, number in asked if asked_path == path]
        assert len(set(numbers)) == times, f"{path} was fetched twice by one run"


def test_interrupted(web, local, tmp_path):
    """Ctrl-C: a line that says how to go on, at once, though servers are silent; going on fetches nothing twice."""
    urls, silent = web.add_pictures(12), threading.Event()
    web.add_backend(urls)
    folder, process = tmp_path / "cat", None

    def hang(handler):
        process.send_signal(signal.SIGINT)
        silent.wait(30)

    route, web.routes["/8.jpg"] = web.routes["/8.jpg"], hang
    options = local | {"num_class_images": 12, "num_workers": 1, "source": "clip-retrieval"}
    words = ["--class_prompt", "cat", "--class_data_dir", folder, *flags(**options)]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], stderr=PIPE, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - start < 20
    last = errors.strip().splitlines()[-1]
    assert last == "Interrupted; the same command goes on from there"
    assert "Traceback" not in errors and taken(folder) is None
    silent.set()
    web.routes["/8.jpg"] = route
    assert run(sys.executable, SCRIPT, *words).returncode == 0
    assert [url for *_, url in contents(folder)] == urls
    assert web.asked == Counter({f"/{n}.jpg": 1 for n in range(12)} | {"/8.jpg": 2, "/knn-service": 2})


def test_other_arguments(web, local, dataset, tmp_path):
    """What was fetched for another class or from another source is not mixed in."""
    folder = tmp_path / "x" / "cat"
    run(sys.executable, "-c", KILLED, dataset, input=f"12 {folder} 5\n", env=environment())
    assert any((folder / ".unfinished").glob("*.jpg")) and not (folder / "images").exists()
    urls = web.add_pictures(23, start=20)[:3]
    web.add_backend(urls)
    assert retrieve("cat", folder, 3, source="clip-retrieval", **local) == 3
    assert [url for *_, url in contents(folder)] == urls and os.listdir(folder.parent) == ["cat"]


def test_full_disk(dataset, tmp_path):
    """One line, exit status 1, no half-written picture or list; with room again the run goes on."""
    folder = tmp_path / "x" / "cat"
    for file in dataset.glob("*.txt"):
        file.write_text(f"cat {'x' * 700}")
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", code, SCRIPT, "--class_prompt", "cat", "--class_data_dir", folder]
    words += ["--dataset", dataset, "--num_class_images"]
    start = None
    for count, room in ((2, 1000), (6, 4000)):  # too little for a picture, and for a list of six
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: B023, E731
        process = run(*words, str(count), preexec_fn=limit)
        assert process.returncode == 1 and "Traceback" not in process.stderr
        last = process.stderr.strip().splitlines()[-1]
        assert last.endswith("File too large; fix this and run the same command again")
        assert taken(folder) == start and (folder / "images" / "5.jpg").exists() == bool(start)
        assert run(*words, str(count)).returncode == 0 and len(read_set(folder)) == count
        assert contents(folder)[:2] == (start or contents(folder))
        start = contents(folder)
