"""retrieve.py against servers that mean harm: each costs one candidate, never the run; private hosts are left alone."""

import io
import json
import os
import socket
import ssl
import time
import zlib

import pytest
from launching import flags, run
from pictures import make_picture
from web import Web, command, picture_bytes, read_set

import retrieve as script
from retrieve import is_public, retrieve


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
HOSTILE = {  # path -> route, and how the summary counts it (None: it gives a picture)
    "endless": (endless(b"x" * 65536), "too large"),
    "slow": (endless(b"x", pause=0.2), "timed out"),
    "slow-headers": (endless(b"X", 0.2, b"HTTP/1.1 200 OK\r\n"), "timed out"),
    "many-headers": (endless(b"X: y\r\n", 0, b"HTTP/1.1 200 OK\r\n"), "no connection"),
    "continue": (endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01, b""), "timed out"),
    "silent": (lambda handler: time.sleep(10), "timed out"),
    "huge": (says(Content_Length=10 * 2**30), "too large"),
    "cut-off": (says(Content_Length=5000, Connection="close"), "cut off"),
    "chunks": (says(Transfer_Encoding="chunked", Connection="close"), "no connection"),
    "no-http": (lambda handler: send(handler, b"220 smtp ready\r\n"), "no connection"),
    "text": ((200, {"Content-Type": "text/html"}, b"<html>a cat</html>"), "no picture"),
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
    "to-file": ((302, {"Location": "file:///etc/passwd"}, b""), "not an http address"),
    "to-ftp": ((302, {"Location": "ftp://127.0.0.1/x.jpg"}, b""), "not an http address"),
    "to-nowhere": ((302, {"Location": "http://[::1"}, b""), "not an http address"),
    "redirect-without-end": (endless(b"x", 0, b"HTTP/1.0 302 Found\r\nLocation: /missing.jpg\r\n\r\n"), "HTTP 404"),
    "noai": ((200, JPEG | {"X-Robots-Tag": "noindex, NoAI"}, picture_bytes(902)), "noai"),
    "noimageai": ((200, JPEG | {"X-Robots-Tag": "otherbot: noimageai"}, picture_bytes(903)), "noai"),
    "same-bytes": (picture_bytes(0), "duplicate"),
    "same-pixels": ((200, {"Content-Type": "image/png"}, picture_file("PNG", 50)), "duplicate"),
    "broken": ((500, {}, b""), "HTTP 500"),
    "missing": ((404, {}, b""), "HTTP 404"),
    "moved": ((301, {"Location": "/really/moved.jpg"}, b""), None),
    "flaky": (flaky, None),
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
    kinds = [kind for _, kind in HOSTILE.values() if kind] + ["HTTP 404"] * 60 + ["not an http address"] * 3
    assert counted == {kind: kinds.count(kind) for kind in kinds}


# Addresses

PRIVATE = """127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1
    224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 fe80::1%eth0 fc00::1 fd12::1
    fec0::1 ff02::1 2001:db8::1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 64:ff9b::7f00:1 64:ff9b:1::1"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 2606:4700:4700::1111 2001:4860:4860::8888 64:ff9b::808:808"


def test_which_addresses_are_public():
    assert [address for address in PRIVATE.split() if is_public(address)] == []
    assert [address for address in PUBLIC.split() if not is_public(address)] == []


@pytest.fixture
def contacts(monkeypatch):
    """Every address that a socket connects to is noted, and refused unless it is on loopback."""
    made = []

    class Watched(socket.socket):
        def connect(self, address):
            made.append(address[0])
            if not address[0].startswith("127."):
                raise ConnectionRefusedError
            super().connect(address)

    monkeypatch.setattr(script.socket, "socket", Watched)
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


def test_redirects_to_private_hosts(web, local, tmp_path, monkeypatch, capsys):
    """A public server (127.0.0.1 stands in for one) redirects to private ones, which never hear of it."""
    inside = Web("127.0.0.2")
    try:
        inside.routes["/0.jpg"] = picture_bytes(0)
        host = f"http://127.0.0.2:{inside.server_port}"
        web.routes["/there.jpg"] = (302, {"Location": f"{host}/0.jpg"}, b"")
        web.routes["/name.jpg"] = (307, {"Location": f"//localhost:{inside.server_port}/0.jpg"}, b"")
        web.routes["/twice.jpg"] = (301, {"Location": "/there.jpg"}, b"")
        good = web.add_pictures(1)
        backend_answers(web, [web.url("/there.jpg"), web.url("/name.jpg"), web.url("/twice.jpg"), *good])
        monkeypatch.setattr(script, "is_public", lambda address: address == "127.0.0.1")
        names = {"localhost": "127.0.0.2"}
        look_up = socket.getaddrinfo
        monkeypatch.setattr(script.socket, "getaddrinfo", lambda h, *a, **k: look_up(names.get(h, h), *a, **k))
        options = local | {"allow_private_hosts": False}
        assert retrieve("cat", tmp_path / "cat", 4, source="clip-retrieval", **options) == 1
        assert inside.connections == 0 and "3 private address" in capsys.readouterr().out
        # the same ways lead to the pictures where that is allowed
        assert retrieve("cat", tmp_path / "b", 1, source="clip-retrieval", **local) == 1
        assert inside.connections == 1
    finally:
        inside.shutdown()
        inside.server_close()


def test_names_that_change_their_address(web, local, contacts, tmp_path, monkeypatch):
    """DNS rebinding: public when it is checked, private ever after. What was checked is what is connected to."""
    answers, asked, look_up = iter(["93.184.216.34"]), [], socket.getaddrinfo

    def rebinding(host, port, *words, **options):
        if host != "rebind.example":
            return look_up(host, port, *words, **options)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

    monkeypatch.setattr(script.socket, "getaddrinfo", rebinding)
    web.add_pictures(1)
    backend_answers(web, [f"http://rebind.example:{web.server_port}/0.jpg"])
    options = local | {"allow_private_hosts": False, "retries": 2}
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **options) == 0
    assert contacts.count("93.184.216.34") == 1 and len(asked) == 2  # refused there, tried again, refused here
    assert "/0.jpg" not in web.asked


def test_mixed_addresses(web, local, contacts, tmp_path, monkeypatch):
    """Of a name with public and private addresses only the public ones are tried."""
    mixed = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("10.0.0.1", "93.184.216.34", "127.0.0.1")]
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        script.socket, "getaddrinfo", lambda h, *w, **o: mixed if h == "mixed.example" else look_up(h, *w, **o)
    )
    backend_answers(web, ["http://mixed.example/0.jpg"])
    retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local | {"allow_private_hosts": False})
    assert [address for address in contacts if address != "127.0.0.1"] == ["93.184.216.34"]


def test_proxies_and_netrc_are_not_used(web, local, tmp_path, monkeypatch):
    """A proxy would resolve names itself, behind the check; no password is sent to anybody."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = []

    def route(handler):
        sent.append(handler.headers.get("Authorization"))
        handler.answer(picture_bytes(0))

    web.routes["/0.jpg"] = route
    backend_answers(web, [web.url("/0.jpg")])
    assert retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local) == 1
    assert sent == [None]


def test_certificates(web, tmp_path):
    """https: a certificate that nobody vouches for, or that is another host's, costs the candidate."""
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    words = [
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    run("openssl", "req", *words, *files, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    secure = Web(context=context)
    secure.add_pictures(1)
    urls = [f"https://{host}:{secure.server_port}/0.jpg" for host in ("127.0.0.1", "localhost")]
    backend_answers(web, urls)
    words = flags(backend_url=web.url("/knn-service"), source="clip-retrieval", num_class_images=2, retries=0)
    try:
        process = command(tmp_path / "a", *words, "--allow_private_hosts")
        assert "2 bad certificate" in process.stdout and not secure.asked
        trusting = os.environ | {"SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        process = command(tmp_path / "a", *words, "--allow_private_hosts", env=trusting)
        assert "1 bad certificate" in process.stdout
        assert [row[2] for row in read_set(tmp_path / "a")] == urls[1:]
    finally:
        secure.shutdown()
        secure.server_close()


@pytest.mark.parametrize("answer", ["endless", "slow", "deep"])
def test_hostile_search(answer, web, local, tmp_path, monkeypatch):
    """The search service, too, may answer without end, slowly, or JSON that is deeper than a stack."""
    monkeypatch.setattr(script, "MAX_ANSWER_BYTES", 300_000)
    start = b"HTTP/1.0 200 OK\r\n\r\n["
    routes = {"endless": endless(b" " * 65536, 0, start), "slow": endless(b" ", 0.2, start)}
    web.routes["/knn-service"] = routes.get(answer, (200, {}, b"[" * 100_000))
    web.routes["/v1/images/"] = (200, {}, b"[]")
    began = time.monotonic()
    with pytest.raises(script.RetrieveError):
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
