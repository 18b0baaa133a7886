#!/usr/bin/env python3
"""Fetches real, captioned pictures of a class for prior preservation (train_custom_diffusion.py --real_prior).

    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200
    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --dataset my_captioned_pictures

From Python: `from retrieve import retrieve; retrieve("cat", "real_reg/samples_cat", 200)`.

The file reads from top to bottom, and everything points up: what the web answers, pictures, sources, the folder, the
run, the command. docs/class-pictures.md describes the sources and the folder.
"""

import argparse
import base64
import codecs
import contextlib
import csv
import functools
import glob
import hashlib
import io
import ipaddress
import itertools
import json
import math
import os
import re
import shutil
import socket
import ssl
import sys
import tarfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import certifi
    import urllib3
    from PIL import Image, ImageCms, ImageOps
    from tqdm.auto import tqdm
except Exception as error:  # a broken package can raise anything
    if __name__ != "__main__":
        raise
    # The package whose code was running, as its error may not name it.
    frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in frames if not name.startswith(("__main__", "importlib"))]
    cause = ": ".join([*packages[-1:], str(error)])
    sys.exit(f"error: {cause}; pip install -r requirements.txt")

# Wikimedia refuses programs whose name comes without an address.
HEADERS = {"User-Agent": "CustomDiffusion-retrieve/1.0 (+https://arxiv.org/abs/2212.04488)"}
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
MAX_REDIRECTS = 5
# So many seconds are spent on a host that limits the rate of requests and gives nothing.
MAX_PATIENCE = 120
# A search service may take longer than a picture, retries included, and its answer may be larger.
MAX_SEARCH_SECONDS = 120
MAX_ANSWER_BYTES = 200_000_000
# No others are read, because some of Pillow's decoders start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
# So many candidates are tried for each picture wanted, so that a search without end ends.
MAX_CANDIDATES = 20
BATCH = 16  # candidates that a worker is given at a time
# A line of metadata.jsonl keeps this of what a source says about a picture.
KEPT = ("text", "url", "license", "license_url", "creator", "attribution")
# Each list holds one key of metadata.jsonl. The last one says which pictures are there.
LISTS = {"caption.txt": "text", "urls.txt": "url", "images.txt": "file_name"}
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "TEXT", "prompt", "sentences", "raw", "json")
CAPTION_ENDINGS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Pictures that nothing here reads, to be named when they are left out.
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "url", "URL")
PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children", "sheep": "sheep", "fish": "fish"}
# If it is set, the traceback behind a one-line message is shown.
TRACEBACK = os.environ.get("CUSTOM_DIFFUSION_TRACEBACK")
# A decoded picture can take several hundred megabytes, so two are decoded at a time.
DECODERS = threading.BoundedSemaphore(2)
PORTS = {"http": 80, "https": 443}


class RetrieveError(Exception):
    """What stopped the run, or a source, in one line that says what to do."""

    def __init__(self, problem, advice=None):
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.has_advice = advice is not None


class Failure(Exception):
    """Why a candidate gives no picture; `retry_after` is set, in seconds, for a fault that may pass."""

    def __init__(self, kind, retry_after=None):
        super().__init__(kind)
        self.retry_after = retry_after


class RateLimited(Failure):
    """A host wants fewer requests. It answered with `status` (None: it was not asked) and wants a `pause` in seconds.

    `pause` is None if the host does not say. Then a status of 503 may be about the one address.
    """

    def __init__(self, status, pause):
        super().__init__("HTTP 503" if status == 503 and pause is None else "rate limited")
        self.status = status
        self.pause = pause


def one_line(text):
    """Text with spaces for line breaks, control characters and lone surrogates; empty if it is not a string."""
    if not isinstance(text, str):
        return ""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text)
    return " ".join(text.split())


# ---------- The web ---------------------------------------------------------------------------------------------


def is_public(address):
    """Whether an IP address belongs to the public internet, also where it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    elif ip.version == 6:
        is_unicast = ip in ipaddress.ip_network("2000::/3")
        if not is_unicast or ip.sixtofour or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast


def literal_address(host):
    """IP address that a host is written as, in its usual spelling (127.0.0.1 for 127.1); "" if the host is a name."""
    if ":" in host:
        return host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return ""


def is_allowed(host, address):
    """Whether pictures may come from this address of a host."""
    # VPN programs answer every name with an address of this network, and carry what is sent there to the real host.
    is_stand_in = ipaddress.ip_address(address.partition("%")[0]) in ipaddress.ip_network("198.18.0.0/15")
    return is_public(address) or (is_stand_in and not literal_address(host))


def connect(host, port, args, deadline, guarded):
    """Opens a socket to a host, if `guarded` only at an address of the public internet. Raises OSError, `Failure`."""
    error = Failure("private address")
    counts = Counter()
    addresses = []
    for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        addresses.append((counts[family], address))
        counts[family] += 1
    # IPv4 and IPv6 take turns, because one of them may lead nowhere. Sorting keeps the order of each.
    for _, address in sorted(addresses, key=lambda pair: pair[0]):
        # The address is checked and connected to, not the name, which may have another one a moment later.
        if guarded and not is_allowed(host, address[0]):
            continue
        try:
            left = max(deadline - time.monotonic(), 0.001)
            return socket.create_connection(address[:2], min(args.connect_timeout, left))
        except OSError as fault:
            error = fault
    raise error


def retry_after(response):
    """Seconds that a response asks to wait, or None."""
    with contextlib.suppress(urllib3.exceptions.InvalidHeader):
        return urllib3.Retry().get_retry_after(response)
    return None


def read_content(response, args, picture):
    """Decoded body of a response. Fails if it is too large, is not a picture, or must not be used for training."""
    if response.status in (429, 503):
        raise RateLimited(response.status, retry_after(response))
    if response.status != 200:
        may_pass = response.status in PASSING_STATUSES
        raise Failure(f"HTTP {response.status}", (retry_after(response) or 0) if may_pass else None)
    if picture:
        for tag in response.headers.getlist("X-Robots-Tag"):
            if re.search(r"\bno(image)?ai\b", tag, re.IGNORECASE):
                raise Failure("noai")
        kind = response.headers.get("Content-Type", "image/").strip().lower()
        if not kind.startswith(("image/", "application/octet-stream", "binary/octet-stream")):
            raise Failure("not a picture")

    max_bytes = args.max_bytes if picture else MAX_ANSWER_BYTES
    # The announced length spares the download of a body that is too large; an endless one announces none.
    if (response.length_remaining or 0) > max_bytes:
        raise Failure("too large")
    content = bytearray()
    for chunk in response.stream(65536):
        content += chunk
        if len(content) > max_bytes:
            raise Failure("too large")
    return bytes(content)


@functools.lru_cache
def tls_settings(*bundles):
    """TLS settings that trust the usual certificates, and those in files or folders (None: no such file)."""
    # Slim containers have no certificates of their own, and companies add theirs to the system's.
    tls = ssl.create_default_context(cafile=certifi.where())
    tls.load_default_certs()  # SSL_CERT_FILE and SSL_CERT_DIR among them
    tls.set_alpn_protocols(["http/1.1"])
    # The certificates of many companies lack what Python has asked for since 3.13.
    tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
    for bundle in filter(None, bundles):
        kind = "capath" if os.path.isdir(bundle) else "cafile"
        try:
            tls.load_verify_locations(**{kind: bundle})
        except OSError as error:
            raise RetrieveError(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE {bundle}: {error}", "correct it") from error
    return tls


def find_proxy(parts):
    """Address of the proxy that the environment names for a host; None if the host is asked directly."""
    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    host = parts.host.strip("[]")
    literal = literal_address(host)
    # A proxy outside can't reach these, and one inside must not be led there by the address of a picture.
    is_local = re.search(r"(^|\.)localhost$", host) or (literal and not is_public(literal))
    if not address or is_local or urllib.request.proxy_bypass(parts.netloc):
        return None
    if "://" not in address:
        address = f"http://{address}"
    with contextlib.suppress(urllib3.exceptions.LocationParseError):
        proxy = urllib3.util.parse_url(address)
        if proxy.scheme in PORTS and proxy.host:
            return proxy._replace(port=proxy.port or PORTS[proxy.scheme])
    scheme = one_line(address).partition("://")[0]
    raise Failure(f"the proxy is no http://host:port but {scheme}://…: set HTTPS_PROXY and HTTP_PROXY")


@contextlib.contextmanager
def naming(proxy, deadline):
    """Names the proxy, if there is one, as the cause of an error on the way through it."""
    try:
        yield
    except OSError as error:
        if not proxy or isinstance(error, ssl.SSLError):
            raise
        failure = explain(error, deadline)
        if refused := re.match(r"Tunnel connection failed: (\d+)", str(error)):
            failure = Failure(f"HTTP {refused[1]}")
        raise Failure(f"proxy {proxy.netloc}: {failure}", failure.retry_after) from error


def make_connection(parts, proxy, headers):
    """Connection of urllib3's to a host, or to the proxy that is asked for it with `headers`; without a socket yet."""
    first = proxy or parts
    kind = urllib3.connection.HTTPConnection
    options = {"port": first.port, "proxy": proxy}
    if "https" in (parts.scheme, first.scheme):
        kind = urllib3.connection.HTTPSConnection
        tls = tls_settings(os.environ.get("REQUESTS_CA_BUNDLE"), os.environ.get("CURL_CA_BUNDLE"))
        options["ssl_context"] = tls
        options["proxy_config"] = urllib3.connection.ProxyConfig(tls, False, None, None)
    connection = kind(first.host.strip("[]"), **options)
    if proxy and parts.scheme == "https":
        port = parts.port or PORTS["https"]
        connection.set_tunnel(parts.host.strip("[]"), port, headers, proxy.scheme)
    return connection


def split_url(url):
    """Parts of a URL, the host in the letters that name servers take. Raises LocationParseError."""
    parts = urllib3.util.parse_url(url)
    host = parts.host or ""
    if "%" in host and "[" not in host:  # a name in another script that was encoded with the rest of the URL
        parts = parts._replace(host=urllib3.util.parse_url(f"//{urllib.parse.unquote(host)}").host)
    return parts


def host_of(url):
    """Host of a URL; None if it has none."""
    with contextlib.suppress(urllib3.exceptions.LocationParseError):
        return split_url(url).host
    return None


def request(url, args, picture, deadline, body, headers):
    """Sends one request, a POST if it has a body. Returns the content and the url, or None and where a redirect leads.

    Only a picture's redirects are followed: a search service that has moved is an error.
    """
    parts = split_url(url)
    if parts.scheme not in PORTS or not parts.host:
        raise ValueError(f"not an http(s) URL: {url}")
    target = parts.request_uri
    proxy = find_proxy(parts)
    proxy_headers = {}
    if proxy and proxy.auth:
        password = base64.b64encode(urllib.parse.unquote(proxy.auth).encode())
        proxy_headers["Proxy-Authorization"] = f"Basic {password.decode()}"
    if proxy and parts.scheme == "http":
        target = parts._replace(auth=None, fragment=None).url
        headers = headers | proxy_headers

    connection = make_connection(parts, proxy, proxy_headers)
    connection.timeout = args.timeout
    # A proxy resolves the names itself. Which search service is asked is the user's choice, so its address may be any.
    guarded = picture and not proxy and not args.allow_private_hosts
    with naming(proxy, deadline):
        opened = connect(connection.host, connection.port, args, deadline, guarded)
    with opened as sock, sock.dup() as line:
        # urllib3's timeouts are per read, and a server that drips bytes never reaches them.
        hang_up = threading.Timer(deadline - time.monotonic(), line.shutdown, [socket.SHUT_RDWR])
        hang_up.start()
        try:
            # The connection opens no socket of its own, so the address that was checked is the one that is asked.
            connection._new_conn = lambda: sock
            with naming(proxy, deadline):
                connection.connect()
            method = "POST" if body else "GET"
            connection.request(method, target, body, HEADERS | headers, preload_content=False)
            with connection.getresponse() as response:
                if proxy and response.status == 407:
                    raise Failure(f"proxy {proxy.netloc}: HTTP 407")
                location = picture and response.get_redirect_location()
                content = None if location else read_content(response, args, picture)
        finally:
            hang_up.cancel()
            connection.close()
    # A body that was cut short by hanging up may look complete.
    if time.monotonic() >= deadline:
        raise TimeoutError
    if location:
        # Servers send such letters as bytes, one character each here, where a URL has %C3%A9.
        location = re.sub(r"[^\x00-\x7f]", lambda byte: urllib.parse.quote(byte[0], encoding="latin-1"), location)
        url = urllib.parse.urljoin(url, location)
    return content, url


def explain(error, deadline):
    """The `Failure` that stands for an error of `request`."""
    if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
        return Failure("timed out")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return Failure("no such host")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure("bad certificate")
    if isinstance(error, ValueError):
        return Failure("not an http(s) URL")
    return Failure("connection failed", retry_after=0)


def exchange(url, args, picture, patient, deadline, body, headers):
    """Sends a request and follows redirects; returns the content. Raises `Failure`.

    A host that has limited the rate is asked only in the `patient` way, and not before the time that it named.
    """
    try:
        for _ in range(MAX_REDIRECTS + 1):
            host = host_of(url)
            if host in args.free_at:
                pause = args.free_at[host] - time.monotonic()
                if pause > 0 or not patient:
                    raise RateLimited(None, pause)
            content, url = request(url, args, picture, deadline, body, headers)
            if content is not None:
                return content
    except RateLimited as limited:
        if limited.status:
            free_at = time.monotonic() + max(limited.pause or 0, 0.5)
            # Of several answers that were on their way, the one with the longest pause counts.
            args.free_at[host] = max(free_at, args.free_at.get(host, 0))
        raise
    except (OSError, ValueError, urllib3.connection.HTTPException, urllib3.exceptions.HTTPError) as error:
        raise explain(error, deadline) from error
    raise Failure("too many redirects")


def fetch(url, args, picture, patient=False, body=None, headers=None):
    """Content behind the URL of a picture, or of a search. Retries temporary faults. Raises `Failure`."""
    end = time.monotonic() + (args.timeout if picture else MAX_SEARCH_SECONDS)
    attempt = 0
    while True:
        deadline = min(end, time.monotonic() + args.timeout)
        try:
            return exchange(url, args, picture, patient, deadline, body, headers or {})
        except Failure as failure:
            if failure.retry_after is None or attempt == args.retries:
                raise
            pause = max(failure.retry_after, 0.5 * 2**attempt)
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        attempt += 1


def fetch_patiently(url, args, picture, body=None, headers=None):
    """As `fetch`, but waits for hosts that limit the rate. Only one thread does so: they get one request at a time."""
    host = host_of(url)
    start = time.monotonic() - args.lost[host]
    attempt = 0
    while args.lost[host] < MAX_PATIENCE:
        try:
            content = fetch(url, args, picture, True, body, headers)
            args.lost[host] = 0
            return content
        except RateLimited as limited:
            args.lost[host] = time.monotonic() - start
            pause = max(limited.pause or 0, 0.5 * 2**attempt)
            is_last = limited.status == 503 and limited.pause is None and attempt >= args.retries
            if is_last or args.lost[host] + pause > MAX_PATIENCE:
                raise
            attempt += limited.status is not None
        except Failure:
            args.lost[host] = time.monotonic() - start
            raise
        if pause > 5:
            tqdm.write(f"{host} limits how often it is asked: waiting {pause:.0f} s")
        time.sleep(pause)
    raise Failure("rate limited")


# ---------- Pictures --------------------------------------------------------------------------------------------


def to_rgb(image):
    """Upright sRGB picture: its colour profile applied, transparency on white, 16 bits or floats of 0 to 1 scaled to 8.

    The trainer's `load_picture` treats colours in the same way.
    """
    image.getexif()
    # exif_transpose would write the other metadata again, and fail where it can't. The orientation is kept in mind.
    image.info.pop("exif", None)
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode[0] == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "F":
        image = image.point(lambda value: value * 255).convert("L")
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
    if profile:  # phones have wider colours than sRGB
        srgb = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile is as good as none
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_plain(image, content):
    """Whether an opened picture is a complete RGB JPEG without metadata: nothing but the short segment of JFIF."""
    if image.format != "JPEG" or image.mode != "RGB" or not content.endswith(b"\xff\xd9"):
        return False
    return all(name == "APP0" and len(data) < 20 for name, data in image.applist)


def convert(content, args):
    """JPEG file without metadata, upright and RGB, from the bytes of a picture, and a digest of its pixels."""
    if len(content) > args.max_bytes:
        raise Failure("too large")
    try:
        with DECODERS, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Failure("too many pixels")
            if min(image.size) < args.min_size:
                raise Failure("too small")
            picture = to_rgb(image)
            size = b"%d %d " % picture.size
            digest = hashlib.sha256(size + picture.tobytes()).hexdigest()
            # To encode a plain one again would only lose quality.
            if is_plain(image, content):
                return content, digest
            # Pillow would write the comment and the colour profile of the original.
            picture.info.clear()
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
            return buffer.getvalue(), digest
    except Failure:
        raise
    except Image.DecompressionBombError as error:
        raise Failure("too many pixels") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise Failure("not a readable picture") from error


# ---------- Sources ---------------------------------------------------------------------------------------------
# Each yields (key, entry, picture). The key says where the picture is from, and is the same in the next run. The entry
# holds what the source says about it. The picture is the content or the path of a file, or None: then the entry's url
# is fetched.


def plural(phrase):
    """Plural of an English noun, also of a phrase that ends with one, without its article."""
    rest, noun = re.fullmatch(r"(?:(?:an?|the) )?(.*?)(\S*)", phrase, re.IGNORECASE).groups()
    if noun.lower() in PLURALS:
        return rest + PLURALS[noun.lower()]
    noun = re.sub(r"(?<=[^aeiou])y$", "ie", noun)
    ending = "es" if re.search("(s|x|z|ch|sh)$", noun) else "s"
    return f"{rest}{noun}{ending}"


def ask(url, flag, args, body=None, headers=None):
    """Results with a picture that a search service answers, and how many pages it has; `flag` names it in errors."""
    try:
        content = fetch_patiently(url, args, picture=False, body=body, headers=headers)
        answer = json.loads(content)
        results = answer
        pages = 1
        if isinstance(answer, dict):
            results = answer["results"]
            pages = int(answer["page_count"])
        entries = [entry for entry in results if isinstance(entry, dict)]
        entries = [entry for entry in entries if one_line(entry.get("url")) or one_line(entry.get("image"))]
        return entries, pages
    except Failure as failure:
        raise RetrieveError(f"{flag} {url}: {failure}") from failure
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        start = one_line(content[:200].decode("utf-8", "replace"))[:60]
        raise RetrieveError(f"{flag} {url}: answered no list of results ({start!r})") from error


def search_clip_retrieval(args):
    """Results of a clip-retrieval backend, nearest first."""
    count = math.ceil(1.5 * args.num_class_images)  # many URLs are dead
    received = 0
    while True:
        query = {
            "text": args.class_prompt, "image": None, "image_url": None, "embedding_input": None,
            "deduplicate": True, "use_safety_model": True, "use_violence_detector": True,
            "indice_name": args.indice_name, "use_mclip": False,
            "aesthetic_score": 9, "aesthetic_weight": 0.1,
            "modality": "image", "num_images": count, "num_result_ids": count,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        entries, _ = ask(args.backend_url, "--backend_url", args, json.dumps(query).encode(), headers)
        if not entries:
            raise RetrieveError(f"--backend_url {args.backend_url}: found no pictures")
        for entry in entries[received:]:
            entry["text"] = entry.get("caption")
            key = one_line(entry.get("url"))
            picture = None
            if not key:  # an index of local files answers the pictures themselves
                key = f"{args.backend_url}#{entry.get('id')}"
                entry["url"] = entry.get("image_path")
                picture = b""
                with contextlib.suppress(ValueError):
                    picture = base64.b64decode(entry["image"])
            yield key, entry, picture
        if len(entries) <= received:
            return
        # The service has no pages, but a longer answer begins with the same results.
        received = len(entries)
        count *= 2


def search_openverse(args):
    """Results of an Openverse search, then of similar ones, because each gives 240 works at most."""
    headers = {}
    page_size = 20
    pause = 1  # the rate in seconds that is allowed without a token
    # Line breaks and quotation marks of a text program, pasted with a token, can't be sent.
    token = one_line(os.environ.get("OPENVERSE_TOKEN")).encode("ascii", "ignore").decode().removeprefix("Bearer ")
    if token:
        headers = {"Authorization": f"Bearer {token}"}
        page_size = 100
        pause = 0
    phrases = [args.class_prompt, plural(one_line(args.class_prompt)), f"{args.class_prompt} photo"]
    found = False
    for phrase in dict.fromkeys(phrases):  # "sheep" is its own plural
        for page in itertools.count(1):
            query = urllib.parse.urlencode({"q": phrase, "page": page, "page_size": page_size})
            try:
                entries, pages = ask(f"{args.openverse_url}?{query}", "--openverse_url", args, headers=headers)
            except RetrieveError as error:
                if token and re.search("HTTP 40[13]$", str(error)):  # a token expires after 12 hours
                    raise RetrieveError(str(error), "renew or unset OPENVERSE_TOKEN") from error
                raise
            for entry in entries:
                found = True
                if entry.get("mature"):
                    continue
                entry["text"] = entry.get("title")
                entry["license"] = f"{one_line(entry.get('license'))} {one_line(entry.get('license_version'))}"
                yield one_line(entry.get("url")), entry, None
            time.sleep(pause)
            if page >= pages:
                break
    if not found:
        raise RetrieveError(f"--openverse_url {args.openverse_url}: found no pictures")


def read_shard(shard, args):
    """Rows of a webdataset shard: the files of a .tar whose names agree up to their first dot, by their endings."""
    name_parts = re.compile(r"(?P<stem>(?:.*/)?[^./]+)\..*?(?P<ending>\w+)")
    rows = {}  # by the stem; other tools than webdataset's own do not write the files of a row side by side
    problem = None
    with tarfile.open(shard) as tar:
        try:
            for member in tar:
                parts = name_parts.fullmatch(member.name)
                if member.isfile() and parts:
                    rows.setdefault(parts["stem"], {})[parts["ending"].lower()] = member
        except tarfile.ReadError as error:  # what comes before the place where a shard is cut off can be used
            problem = error
        for members in rows.values():
            contents = {}
            for ending, member in members.items():
                contents[ending] = tar.extractfile(member).read(args.max_bytes + 1)
            yield with_json(contents)
    if problem:
        raise problem


def with_json(row):
    """The row of a shard with its .json read, if it has one that can be read."""
    with contextlib.suppress(ValueError, KeyError):
        row["json"] = json.loads(row["json"])
    return row


def decode(content):
    """Text of a file: UTF-8, or UTF-16 with its mark, as Windows writes it."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")


def read_each(files, reader):
    """Rows of several files. One that is broken, which an interrupted download leaves, does not stop the others."""
    for file in files:
        try:
            yield from reader(file)
        except Exception as error:  # the readers raise many kinds
            if len(files) == 1:
                raise
            tqdm.write(f"{file}: {one_line(str(error) or repr(error))}; going on with the next")


def read_parquet(file):
    """Rows of a parquet file as dicts."""
    import pyarrow.parquet  # takes time, and other sources do not need it

    # A name that pyarrow opens itself may be taken for an address.
    with open(file, "rb") as opened, pyarrow.parquet.ParquetFile(opened) as table:
        for batch in table.iter_batches(16):  # pictures are large
            yield from batch.to_pylist()


def read_metadata(file):
    """Rows of a folder's metadata, of the names and kinds that `datasets` gives it, as dicts."""
    if file.suffix == ".parquet":
        return read_parquet(file)
    text = decode(file.read_bytes())
    if file.suffix == ".csv":
        # Spreadsheets write semicolons where the comma is part of numbers.
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {file.name} is no JSON object") from error
    return rows


def find_captions(files):
    """Paths of the captions among files, each also under its path with the ending in small letters."""
    captions = {}
    for file in files:
        ending = file.suffix.lower()
        if ending in CAPTION_ENDINGS:
            captions.setdefault(file.with_suffix(ending), file)
            captions[file] = file
    return captions


def caption_beside(picture, captions):
    """Path of a picture's caption among those that `find_captions` found, or None."""
    names = [picture.with_suffix(ending) for ending in CAPTION_ENDINGS]
    names += [picture.with_name(picture.name + ending) for ending in CAPTION_ENDINGS]
    return next((captions[name] for name in names if name in captions), None)


def read_described(files):
    """Rows of the metadata among files, by the path of their picture."""
    rows = {}
    described = [file for name in METADATA for file in files if file.name == name]
    for file in described:
        for row in read_metadata(file):
            # `datasets` takes columns such as image_file_name as well.
            names = [value for column, value in row.items() if str(column).endswith("file_name") and value]
            if not names:
                raise ValueError(f"{file.name} has a row without file_name")
            picture = file.parent / names[0]
            if "\\" in names[0] and not picture.is_file():  # written on Windows
                picture = file.parent / names[0].replace("\\", "/")
            rows.setdefault(picture, row)
    return rows


def read_folder(files, args):
    """Rows of a folder's pictures: those that its metadata names, then others that have a caption beside them."""
    rows = read_described(files)
    captions = find_captions(files)
    left_out = {}  # by the reason: names of pictures
    for file in files:
        ending = file.suffix.lower()
        if file in rows or ending not in (*PICTURE_ENDINGS, *UNREAD):
            continue
        if ending in UNREAD:
            left_out.setdefault("of a kind that is not read", []).append(file.name)
        elif caption_beside(file, captions):
            rows[file] = {}
        else:
            left_out.setdefault("without a caption", []).append(file.name)
    reasons = ", ".join(f"{len(names)} {reason} (such as {names[0]})" for reason, names in left_out.items())
    if not rows:
        raise ValueError(f"no captioned pictures: {reasons}; give each a .txt file, or the folder a metadata.jsonl")
    if left_out:
        print(f"--dataset {args.dataset}: left out pictures: {reasons}")

    columns = caption_columns(args)
    every_column = dict.fromkeys(column for row in rows.values() for column in row)
    if captions:
        every_column[columns[0]] = None
    for picture, row in rows.items():
        beside = caption_beside(picture, captions)
        if beside and not first_value(row, columns):
            row[columns[0]] = decode(beside.read_bytes())
        yield every_column | row | {"image": picture}


def open_dataset(args):
    """Rows of the dataset as dicts, their pictures undecoded; hidden files are no part of it."""
    path = Path(args.dataset)
    files = [path]
    if not path.is_file():
        pattern = f"{glob.escape(args.dataset)}/**"
        files = [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    pictures = [file for file in files if file.suffix.lower() in (*PICTURE_ENDINGS, *UNREAD)]
    captions = find_captions(files)
    is_described = any(file.name in METADATA for file in files)
    is_captioned = any(caption_beside(picture, captions) for picture in pictures)

    rows = None
    if path.is_dir() and is_described:
        rows = read_folder(files, args)
    elif shards:  # img2dataset leaves tables beside them, which hold no pictures
        rows = read_each(shards, functools.partial(read_shard, args=args))
    elif is_captioned:
        rows = read_folder(files, args)
    elif tables:
        rows = read_each(tables, read_parquet)
    elif path.is_file():
        raise ValueError("give a .parquet or a webdataset .tar file, or a folder")
    elif pictures:
        rows = read_folder(files, args)
    if rows:
        if args.split != "train":
            raise ValueError(f"--split {args.split} is for datasets on the hub; name the file or folder that you want")
        return rows

    import datasets  # takes seconds, and other sources do not need it

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(args.dataset, split=args.split, streaming=True)
    for column, kind in (rows.features or {}).items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def first_value(row, columns):
    """Value of the first of these columns that has one in the row, or None."""
    return next((row[column] for column in columns if row.get(column)), None)


def class_pattern(class_prompt):
    """Pattern that finds the class in a case-folded caption: whole words, singular or plural."""
    words = one_line(class_prompt).casefold()
    forms = (words, f"{words}s", f"{words}es", plural(words))
    pattern = "|".join(re.escape(form) for form in forms).replace(r"\ ", r"\s+")
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")


def caption_columns(args):
    """Columns in which captions are looked for."""
    return [args.caption_column] if args.caption_column else CAPTION_COLUMNS


def captions_of(value):
    """Captions in a value of a dataset: text, or its bytes, a dict that has some, or a list of these."""
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        return [one_line(value)]
    if isinstance(value, dict):
        return captions_of(first_value(value, CAPTION_COLUMNS))
    if isinstance(value, list):
        return [caption for part in value for caption in captions_of(part)]
    return []


def read_dataset(args):
    """Rows of a dataset of which a caption mentions the class, in its order."""
    mention = class_pattern(args.class_prompt)
    reasons = Counter()
    try:
        number = -1
        for number, row in enumerate(open_dataset(args)):
            # So a picture looks that is stored in a table.
            stored = [column for column, value in row.items() if isinstance(value, dict) and "bytes" in value]
            image_columns = [args.image_column] if args.image_column else [*stored, *IMAGE_COLUMNS]
            usable = row.keys() & set(image_columns) and row.keys() & set(caption_columns(args))
            if number == 0 and not usable:
                columns = ", ".join(map(str, row))
                raise ValueError(f"its columns are {columns}; choose with --image_column and --caption_column")

            picture = first_value(row, image_columns)
            if isinstance(picture, dict):
                picture = picture.get("bytes") or picture.get("path")
            value = first_value(row, caption_columns(args))
            captions = captions_of(value)
            mentioning = [caption for caption in captions if mention.search(caption.casefold())]
            if value is None:
                reasons["without a caption"] += 1
            elif not captions:
                reasons[f"whose caption is of the kind {type(value).__name__}"] += 1
            elif not mentioning:
                reasons[f"whose caption does not mention {one_line(args.class_prompt)}"] += 1
            elif not isinstance(picture, (bytes, str, Path)):
                reasons["without a picture"] += 1
            else:
                reasons["taken"] += 1
                entry = row | {"text": mentioning[0]}
                if isinstance(picture, str) and picture.startswith(("http://", "https://")):
                    entry["url"] = picture
                    picture = None
                yield f"{args.dataset}#{number}", entry, picture
        if not reasons["taken"]:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            raise ValueError(f"none of its {number + 1} rows is of use: {counts}")
    except ImportError as error:  # datasets may be there, but not what it needs
        raise RetrieveError(f"--dataset: {one_line(str(error))}; pip install -r requirements.txt") from error
    except Exception as error:  # the readers of so many formats raise anything
        raise RetrieveError(f"--dataset {args.dataset}: {one_line(str(error) or repr(error))}") from error


SOURCES = {"clip-retrieval": search_clip_retrieval, "openverse": search_openverse, "dataset": read_dataset}


def find_candidates(known, args):
    """Candidates of the first source that has any and that are not `known`, as (record, picture) pairs.

    The record is a line of metadata.jsonl; its url is the key, or the address from which the picture is fetched.
    """
    limit = MAX_CANDIDATES * args.num_class_images
    if args.dataset:
        sources = ["dataset"]
        limit = None
    elif args.source == "auto":
        sources = ["clip-retrieval", "openverse"]
    else:
        sources = [args.source]

    for source in sources:
        found = False
        try:
            for key, entry, picture in itertools.islice(SOURCES[source](args), limit):
                found = True
                if key in known:
                    continue
                known.add(key)
                record = {"text": one_line(args.class_prompt), "url": key}
                for name in KEPT:
                    if text := one_line(entry.get(name)):
                        record[name] = text
                yield record, picture
            return
        except RetrieveError as error:
            if found:  # the source broke off later, and what came before is kept
                tqdm.write(str(error))
                return
            if source == sources[-1]:
                if error.has_advice or args.dataset:
                    raise
                raise RetrieveError(str(error), "give another --source") from error
            print(f"{error}; asking Openverse instead")


# ---------- The folder ------------------------------------------------------------------------------------------


def read_pictures(folder, unfinished):
    """(file, record) pairs of the pictures that class_data_dir has; a record is a line of metadata.jsonl."""
    if not (folder / "images.txt").is_file():
        return []
    try:
        records = {}
        # Earlier versions had the file beside the pictures.
        for file in [*folder.glob("images/metadata.jsonl"), *folder.glob("metadata.jsonl")]:
            for line in file.read_text("utf-8").splitlines():
                record = json.loads(line)
                records[file.parent / record["file_name"]] = record

        lists = [(folder / name).read_text("utf-8").removesuffix("\n").split("\n") for name in LISTS]
        pictures = []
        # A run that was killed before it renamed images.txt may have lengthened the other lists.
        for text, url, name in zip(*lists, strict=not unfinished.exists()):
            file = folder / name
            # The guide's script wrote paths that are relative to the working folder, and no metadata.
            if not file.is_file():
                file = Path(name).resolve()
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            file_name = Path(os.path.relpath(file, folder)).as_posix()
            record = records.get(file, {}) | {"file_name": file_name, "text": text, "url": url}
            pictures.append((file, record))
        return pictures
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"its lists and pictures do not agree ({one_line(str(error) or repr(error))})"
        raise RetrieveError(f"--class_data_dir {folder}: {problem}; remove it or give another") from error


def write(file, content, unfinished):
    """Writes a file in `unfinished` and moves it to its place, where it is never seen half-written."""
    temporary = unfinished / f"{threading.get_ident()}.part"
    temporary.write_bytes(content)
    return temporary.replace(file)


def publish(folder, unfinished, pictures, new):
    """Adds the new (file, record) pairs and writes the lists; images.txt, which says what is there, comes last."""
    (folder / "images").mkdir(exist_ok=True)
    records = [record for _, record in pictures]
    numbers = itertools.count(len(pictures))
    for file, record in new:
        content = file.read_bytes()
        for number in numbers:
            target = folder / "images" / f"{number}.jpg"
            # A run that was killed may have put this very picture there; other files stay as they are.
            if not target.exists() or target.read_bytes() == content:
                break
        write(target, content, unfinished)
        records.append({"file_name": f"images/{target.name}"} | record)

    lines = [json.dumps(record) for record in records]
    write(folder / "metadata.jsonl", "".join(f"{line}\n" for line in lines).encode(), unfinished)
    for name, key in LISTS.items():
        lines = [record[key] for record in records]
        write(folder / name, "".join(f"{line}\n" for line in lines).encode(), unfinished)
    (folder / "images" / "metadata.jsonl").unlink(missing_ok=True)  # an earlier version may have left it


# ---------- The run ---------------------------------------------------------------------------------------------


def read_file(name, args):
    """Content of a file that a dataset names: a local one, one in an archive, or one on the hub."""
    try:
        if Path(name).is_file():
            with open(name, "rb") as file:
                return file.read(args.max_bytes + 1)

        import fsspec  # only some datasets need it

        address = name.rpartition("::")[2].removeprefix("hf://")
        if "://" in address:
            raise ValueError("neither a local file nor one on the hub")
        with fsspec.open(name, "rb") as file:
            return file.read(args.max_bytes + 1)
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        raise Failure("no such file") from error


def obtain(record, picture, unfinished, args, get=fetch):
    """Gets and converts a candidate's picture; returns its file in `unfinished` and a digest of its pixels.

    The file is named by a hash of its origin and by the digest, so a run that is started again needs no other record.
    """
    if isinstance(picture, (str, Path)):
        picture = read_file(picture, args)
    origin = record["url"].encode() if picture is None else picture
    name = hashlib.sha256(b"%d %b" % (args.min_size, origin)).hexdigest()
    earlier = next(unfinished.glob(f"{name}.*.jpg"), None)
    if earlier:
        return earlier, earlier.name.split(".")[1]
    if picture is None:
        picture = get(record["url"], args, picture=True)
    jpeg, digest = convert(picture, args)
    unfinished.mkdir(parents=True, exist_ok=True)
    return write(unfinished / f"{name}.{digest}.jpg", jpeg, unfinished), digest


def is_placeholder(copies):
    """Whether a picture, given by these (file, record) pairs, is one that hosts show instead of those they have lost.

    The same photo can have two addresses; at three, hardly anything but such a picture is the same to the pixel.
    """
    addresses = {record["url"] for _, record in copies if record["url"].startswith("http")}
    return len(addresses) >= 3


def result(future, candidate, unfinished, args):
    """What `obtain` returns in a `future`; candidates of hosts that limit the rate are fetched here, one at a time."""
    try:
        return future.result()
    except RateLimited:
        return obtain(*candidate, unfinished, args, fetch_patiently)


def count_copies(found, owned):
    """Counter of the candidates that gave a picture for nothing. Names a file of the digests `owned` that should go."""
    failures = Counter()
    for digest, copies in found.items():
        if not is_placeholder(copies):
            failures["duplicate"] += len(copies) - 1
        elif digest in owned:
            failures["placeholder"] += len(copies) - 1
            name = copies[0][1].get("file_name")
            print(f"{name} may be a placeholder: {len(copies)} addresses give this picture")
        else:
            failures["placeholder"] += len(copies)
    return +failures


def collect(pictures, unfinished, args):
    """Obtains the missing pictures; returns (file, record) pairs and a Counter of why candidates gave none."""
    found = {}  # by the digest of the pixels, in the source's order: (file, record) pairs
    for file, record in pictures:
        with contextlib.suppress(Failure):
            digest = record.get("pixel_sha256") or convert(file.read_bytes(), args)[1]
            found[digest] = [(file, record)]
    owned = set(found)
    candidates = find_candidates({record["url"] for _, record in pictures}, args)
    # The source is asked for its first candidate here, so that its error comes before the bar.
    first = list(itertools.islice(candidates, 1))
    candidates = itertools.chain(first, candidates)

    new = []
    failures = Counter()
    pool = ThreadPoolExecutor(args.num_workers)
    bar = tqdm(total=args.num_class_images, initial=len(pictures), unit="picture", leave=False)
    try:
        while True:
            # No more downloads are started than pictures are missing, so none is wasted.
            missing = args.num_class_images - len(pictures) - len(new)
            batch = list(itertools.islice(candidates, min(missing, BATCH * args.num_workers)))
            if not batch:
                break
            futures = [pool.submit(obtain, *candidate, unfinished, args) for candidate in batch]
            # The results are taken in the source's order, whichever download ends first.
            for candidate, future in zip(batch, futures, strict=True):
                try:
                    file, digest = result(future, candidate, unfinished, args)
                except Failure as failure:
                    failures[str(failure)] += 1
                    if TRACEBACK:
                        traceback.print_exception(failure)
                    continue
                bar.update(digest not in found)
                record = candidate[0] | {"pixel_sha256": digest}
                found.setdefault(digest, []).append((file, record))
            new = [copies[0] for digest, copies in found.items() if digest not in owned and not is_placeholder(copies)]
            bar.n = len(pictures) + len(new)
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)

    return new, failures + count_copies(found, owned)


LEAST = {  # of the arguments that are numbers
    "num_class_images": 1, "num_workers": 1, "retries": 0, "max_bytes": 1, "min_size": 1,
    "connect_timeout": 0.1, "timeout": 0.1,
}  # fmt: skip


def check_arguments(args):
    """Raises ValueError for arguments that are out of range or contradict each other."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if not least <= value < math.inf:
            raise ValueError(f"--{name} {value} is out of range: give {least} or more")
    if not args.class_prompt.strip():
        raise ValueError("--class_prompt is empty: give the class, for example cat")
    if args.source != "auto" and (args.source == "dataset") != bool(args.dataset):
        raise ValueError(f"--source {args.source} and --dataset {args.dataset} contradict each other: change one")


def retrieve(
    class_prompt, class_data_dir, num_class_images=200, *,
    source="auto", backend_url="https://knn.laion.ai/knn-service", indice_name="laion_400m",
    openverse_url="https://api.openverse.org/v1/images/",
    dataset=None, split="train", image_column=None, caption_column=None,
    num_workers=16, connect_timeout=5.0, timeout=30.0, retries=2,
    max_bytes=20_000_000, min_size=64, allow_private_hosts=False,
):  # fmt: skip
    """Fills class_data_dir up to num_class_images pictures; returns how many it then has.

    The keyword arguments are the flags. Raises ValueError and `RetrieveError`. Called again, it goes on where it was.
    """
    args = argparse.Namespace(**locals())
    check_arguments(args)
    if dataset:  # bash leaves the ~ of --flag=~/folder alone
        args.dataset = os.path.expanduser(dataset)
    folder = Path(os.path.expanduser(class_data_dir)).resolve()
    # Hosts that limit the rate: when they may be asked again, and how many seconds they have cost since they gave a
    # picture.
    args.free_at = {}
    args.lost = Counter()
    # Here lies what a run, or one that was killed, has not yet put in its place.
    unfinished = folder / ".unfinished"
    new = []
    failures = Counter()
    try:
        pictures = read_pictures(folder, unfinished)
        if len(pictures) < num_class_images:
            new, failures = collect(pictures, unfinished, args)
        if unfinished.exists() and (pictures or new):
            publish(folder, unfinished, pictures, new)
        shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise RetrieveError(f"{one_line(str(error))}; fix this and run the same command again") from error
    if failures:
        reasons = ", ".join(f"{count} {kind}" for kind, count in failures.most_common())
        print(f"Skipped {failures.total()} candidates: {reasons}")
    count = len(pictures) + len(new)
    print(f"{class_data_dir} has {count} pictures, {len(new)} of them new")
    return count


# ---------- The command -----------------------------------------------------------------------------------------


def parse_args(input_args=None):
    """Parses the command line, or the list of strings `input_args`. The defaults are those of `retrieve`."""
    defaults = {"num_class_images": retrieve.__defaults__[0]} | retrieve.__kwdefaults__
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=summary, allow_abbrev=False)

    def add(group, flag, meaning, **options):
        default = defaults.get(flag.removeprefix("--"))
        # argparse's own formatter would say "(default: None)", too.
        if default is not None:
            meaning = f"{meaning} (default: {default})"
        group.add_argument(flag, help=meaning, default=default, **options)

    group = parser.add_argument_group("class")
    add(group, "--class_prompt", 'the class: "cat"; also the caption of pictures that have none', required=True)
    add(group, "--class_data_dir", "folder for the pictures and their captions", required=True)
    add(group, "--num_class_images", "number of pictures", type=int)
    group = parser.add_argument_group("source")
    choices = ("auto", *SOURCES)
    add(group, "--source", "auto: dataset if --dataset is given, else the first that answers", choices=choices)
    add(group, "--backend_url", "knn-service of a clip-retrieval backend")
    add(group, "--indice_name", "index of the clip-retrieval backend")
    add(group, "--openverse_url", "image search of the Openverse API; a token in OPENVERSE_TOKEN allows larger pages")
    add(group, "--dataset", "captioned folder (metadata.jsonl, .csv, .txt, .tar), .parquet or .tar file, hub dataset")
    add(group, "--split", "split of a dataset on the hub")
    add(group, "--image_column", "column of the pictures or of their URLs; by default found by type and name")
    add(group, "--caption_column", "column of the captions; by default found by name")
    group = parser.add_argument_group("downloads")
    add(group, "--num_workers", "number of simultaneous downloads", type=int)
    add(group, "--connect_timeout", "seconds allowed to connect", type=float)
    add(group, "--timeout", "seconds allowed for a picture, without the pauses that its host asks for", type=float)
    add(group, "--retries", "number of retries after a temporary fault, such as status 503", type=int)
    add(group, "--max_bytes", "skip larger files", type=int)
    add(group, "--min_size", "skip pictures with a shorter side, in pixels", type=int)
    private = "also download from loopback, private, link-local hosts"
    add(group, "--allow_private_hosts", private, action="store_true")
    args = parser.parse_args(input_args)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(args):
    """Runs `retrieve` as a command. The exit status is 1 if there are fewer pictures than asked for."""
    warnings.simplefilter("ignore")  # Pillow warns of damaged pictures
    try:
        count = retrieve(**vars(args))
    except RetrieveError as error:
        if TRACEBACK:
            traceback.print_exception(error)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from there", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # threads may still be waiting for a server
    if count < args.num_class_images:
        sys.exit(f"error: found only {count} of {args.num_class_images} pictures; for more, try another --source")


if __name__ == "__main__":
    main(parse_args())
