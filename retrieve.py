#!/usr/bin/env python3
"""Fetches real, captioned pictures of a class for prior preservation (train_custom_diffusion.py --real_prior).

    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200
    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --dataset my_captioned_pictures

From Python: `from retrieve import retrieve; retrieve("cat", "real_reg/samples_cat", 200)`.
"""

import argparse
import base64
import contextlib
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
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import certifi
    import urllib3
    from PIL import Image, ImageCms, ImageOps
    from tqdm.auto import tqdm
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; pip install -r requirements.txt")

HEADERS = {"User-Agent": "CustomDiffusion-retrieve/1.0 (+https://arxiv.org/abs/2212.04488)"}  # Wikimedia asks for a URL
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # only these: some of Pillow's decoders start other programs
MAX_PIXELS, MAX_REDIRECTS = 50_000_000, 5
MAX_CANDIDATES = 20  # per picture wanted, so that a search without end ends
MAX_ANSWER_BYTES, MAX_SEARCH_SECONDS = 200_000_000, 120  # of a search service; the seconds include retries
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
KEPT = ("text", "url", "license", "license_url", "creator", "attribution")  # of what a source says, in metadata.jsonl
CAPTION_COLUMNS = ("text", "caption", "txt", "TEXT", "prompt", "json")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "url", "URL")
PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children", "sheep": "sheep", "fish": "fish"}
LISTS = {"caption.txt": "text", "urls.txt": "url", "images.txt": "file_name"}  # and the key in metadata.jsonl
CONNECTIONS = {"http": urllib3.connection.HTTPConnection, "https": urllib3.connection.HTTPSConnection}
TRACEBACK = os.environ.get("CUSTOM_DIFFUSION_TRACEBACK")  # if set, what is behind a one-line message is shown
DECODERS = threading.BoundedSemaphore(2)  # a decoded picture can take several hundred megabytes
TLS = ssl.create_default_context(cafile=certifi.where())  # slim containers have no certificates of their own
TLS.load_default_certs()


class RetrieveError(Exception):
    """What stopped the run, or a source, in one line that says what to do."""


class Failure(Exception):
    """Why a candidate gives no picture; `retry_after` is set, in seconds, for a fault that may pass."""

    def __init__(self, kind, retry_after=None):
        super().__init__(kind)
        self.retry_after = retry_after


def parse_args(input_args=None):
    """Parses the command line, or the list of strings `input_args`. The defaults are those of `retrieve`."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("class").add_argument
    add("--class_prompt", required=True, help='the class: "cat"; also the caption of pictures that have none')
    add("--class_data_dir", required=True, help="folder for the pictures and their captions")
    add("--num_class_images", type=int, default=200, help="number of pictures")
    add = parser.add_argument_group("source").add_argument
    add("--source", choices=("auto", *SOURCES), help="auto: dataset if --dataset is given, else the first that answers")
    add("--backend_url", help="knn-service of a clip-retrieval backend")
    add("--indice_name", help="index of the clip-retrieval backend")
    add("--openverse_url", help="image search of the Openverse API; a token in OPENVERSE_TOKEN allows larger pages")
    add("--dataset", help="captioned folder (metadata.jsonl, .csv, .txt, .tar), .parquet or .tar file, hub dataset")
    add("--split", help="split of the dataset")
    add("--image_column", help="column of the pictures or of their URLs; by default found by type and name")
    add("--caption_column", help="column of the captions; by default found by name")
    add = parser.add_argument_group("downloads").add_argument
    add("--num_workers", type=int, help="number of simultaneous downloads")
    add("--connect_timeout", type=float, help="seconds allowed to connect")
    add("--timeout", type=float, help="seconds allowed for a picture, redirects and retries included")
    add("--retries", type=int, help="number of retries after a temporary fault, such as status 503")
    add("--max_bytes", type=int, help="skip larger files")
    add("--min_size", type=int, help="skip pictures with a shorter side, in pixels")
    add("--allow_private_hosts", action="store_true", help="also download from loopback, private, link-local hosts")
    parser.set_defaults(**retrieve.__kwdefaults__)
    for action in parser._actions:  # argparse's formatter with defaults would say "(default: None)", too
        action.help += "" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)"
    args = parser.parse_args(input_args)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args):
    """Raises ValueError for arguments that are out of range or contradict each other."""
    low = dict(num_class_images=1, num_workers=1, connect_timeout=0.1, timeout=0.1, retries=0, max_bytes=1, min_size=1)
    for name, least in low.items():
        if not least <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range: give {least} or more")
    if not args.class_prompt.strip():
        raise ValueError("--class_prompt is empty: give the class, for example cat")
    if args.source != "auto" and (args.source == "dataset") != bool(args.dataset):
        raise ValueError(f"--source {args.source} and --dataset {args.dataset} contradict each other: change one")


def retrieve(
    class_prompt, class_data_dir, num_class_images=200, *,
    source="auto", backend_url="https://knn.laion.ai/knn-service", indice_name="laion_400m",
    openverse_url="https://api.openverse.org/v1/images/",
    dataset=None, split="train", image_column=None, caption_column=None,
    num_workers=16, connect_timeout=5.0, timeout=30.0, retries=2, max_bytes=20_000_000, min_size=64,
    allow_private_hosts=False,
):  # fmt: skip
    """Fills class_data_dir up to num_class_images pictures; returns how many it then has.

    The keyword arguments are the flags. Raises ValueError and `RetrieveError`. Called again, it goes on where it was.
    """
    args = argparse.Namespace(**locals())
    check_arguments(args)
    args.dataset = dataset and os.path.expanduser(dataset)  # bash leaves the ~ of --flag=~/folder alone
    folder = Path(os.path.expanduser(class_data_dir)).resolve()
    unfinished = folder / ".unfinished"  # here is what a run, or one that was killed, has not yet put in its place
    new, failures = [], Counter()
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
        print(f"Skipped {failures.total()} candidates:", ", ".join(f"{n} {kind}" for kind, n in failures.most_common()))
    print(f"{class_data_dir} has {len(pictures) + len(new)} pictures, {len(new)} of them new")
    return len(pictures) + len(new)


def collect(pictures, unfinished, args):
    """Obtains the missing pictures; returns (file, record) pairs and a Counter of why candidates gave none."""
    missing, digests, new, failures = args.num_class_images - len(pictures), set(), [], Counter()
    for file, record in pictures:
        with contextlib.suppress(Failure):
            digests.add(record.get("pixel_sha256") or convert(file.read_bytes(), args)[1])
    candidates = find_candidates({record["url"] for _, record in pictures}, args)
    candidates = itertools.chain(list(itertools.islice(candidates, 1)), candidates)  # an error comes before the bar
    pool = ThreadPoolExecutor(args.num_workers)
    bar = tqdm(total=args.num_class_images, initial=len(pictures), unit="picture", leave=False)
    try:
        # no more downloads than pictures are missing, so none is wasted; the results keep the source's order
        while batch := list(itertools.islice(candidates, min(missing - len(new), 16 * args.num_workers))):
            futures = [pool.submit(obtain, record, picture, unfinished, args) for record, picture in batch]
            for (record, _), future in zip(batch, futures, strict=True):
                try:
                    file, digest = future.result()
                    if digest in digests:
                        raise Failure("duplicate")
                    digests.add(digest)
                    new.append((file, record | {"pixel_sha256": digest}))
                    bar.update()
                except Failure as failure:
                    failures[str(failure)] += 1
                    if TRACEBACK:
                        traceback.print_exception(failure)
        return new, failures
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


def obtain(record, picture, unfinished, args):
    """Fetches and converts a candidate's picture; returns its file in `unfinished` and a digest of its pixels.

    The file is named by a hash of its origin and by the digest, so a run that is started again needs no other record.
    """
    if isinstance(picture, str):  # a dataset names a local file, one in an archive, or one on the hub
        import fsspec

        try:
            if "://" in picture.rpartition("::")[2].removeprefix("hf://"):
                raise ValueError("neither a local file nor one on the hub")
            with fsspec.open(picture, "rb") as file:
                picture = file.read(args.max_bytes + 1)
        except Exception as error:  # each of fsspec's file systems has exceptions of its own
            raise Failure("no such file") from error
    origin = record["url"].encode() if picture is None else picture
    name = hashlib.sha256(b"%d %b" % (args.min_size, origin)).hexdigest()
    for file in unfinished.glob(f"{name}.*.jpg"):
        return file, file.name.split(".")[1]
    jpeg, digest = convert(fetch(record["url"], args, True) if picture is None else picture, args)
    unfinished.mkdir(parents=True, exist_ok=True)
    return write(unfinished / f"{name}.{digest}.jpg", jpeg, unfinished), digest


def write(file, content, unfinished):
    """Writes a file in `unfinished` and moves it to its place, where it is never seen half-written."""
    temporary = unfinished / f"{threading.get_ident()}.part"
    temporary.write_bytes(content)
    return temporary.replace(file)


def find_candidates(known, args):
    """Candidates of the first source that has any and that are not `known`, as (record, picture) pairs.

    The record is a line of metadata.jsonl. The picture is a file's content or path, or None: then the url is fetched.
    """
    sources = ["clip-retrieval", "openverse"] if args.source == "auto" else [args.source]
    sources = ["dataset"] if args.dataset else sources
    limit = None if args.dataset else MAX_CANDIDATES * args.num_class_images
    for source in sources:
        found = False
        try:
            for key, entry, picture in itertools.islice(SOURCES[source](args), limit):
                found = True
                if key not in known:
                    known.add(key)
                    texts = {name: text for name in KEPT if (text := one_line(entry.get(name)))}
                    yield {"text": one_line(args.class_prompt), "url": key} | texts, picture
            return
        except RetrieveError as error:
            if found:  # it broke off later: keep what came before
                return tqdm.write(str(error))
            if source == sources[-1]:
                raise RetrieveError(f"{error}{'' if args.dataset else '; give another --source'}") from error
            print(f"{error}; asking Openverse instead")


def search_clip_retrieval(args):
    """Results of a clip-retrieval backend as (key, entry, picture)."""
    count, received = math.ceil(1.5 * args.num_class_images), 0
    while True:
        query = json.dumps({
            "text": args.class_prompt, "image": None, "image_url": None, "embedding_input": None,
            "deduplicate": True, "use_safety_model": True, "use_violence_detector": True,
            "indice_name": args.indice_name, "use_mclip": False, "aesthetic_score": 9, "aesthetic_weight": 0.1,
            "modality": "image", "num_images": count, "num_result_ids": count,
        })  # fmt: skip
        entries, _ = ask(args.backend_url, "--backend_url", args, query.encode(), {"Content-Type": "application/json"})
        for entry in entries[received:]:
            entry, url, picture = entry | {"text": entry.get("caption")}, one_line(entry.get("url")), None
            if not url:  # an index of local files answers the pictures themselves
                entry["url"], url, picture = entry.get("image_path"), f"{args.backend_url}#{entry.get('id')}", b""
                with contextlib.suppress(ValueError):
                    picture = base64.b64decode(entry["image"])
            yield url, entry, picture
        if len(entries) <= received:
            return
        count, received = 2 * count, len(entries)  # no pages: a longer answer begins with the same results


def search_openverse(args):
    """Results of an Openverse search as (key, entry, picture), then of similar ones: each gives 240 works at most."""
    token = os.environ.get("OPENVERSE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for words in dict.fromkeys([args.class_prompt, plural(one_line(args.class_prompt)), f"{args.class_prompt} photo"]):
        for page in itertools.count(1):
            query = urllib.parse.urlencode({"q": words, "page": page, "page_size": 100 if token else 20})
            entries, pages = ask(f"{args.openverse_url}?{query}", "--openverse_url", args, headers=headers)
            for entry in entries:
                if not entry.get("mature"):
                    license = f"{one_line(entry.get('license'))} {one_line(entry.get('license_version'))}"
                    yield one_line(entry.get("url")), entry | {"text": entry.get("title"), "license": license}, None
            time.sleep(0 if token else 1)  # the rate that is allowed without a token
            if page >= pages:
                break


def plural(words):
    """Plural of an English noun, also of a phrase that ends with one, without its article."""
    rest, word = re.fullmatch(r"(?:(?:an?|the) )?(.*?)(\S*)", words, re.I).groups()
    if word.lower() in PLURALS:
        return rest + PLURALS[word.lower()]
    word = re.sub(r"(?<=[^aeiou])y$", "ie", word)
    return f"{rest}{word}{'es' if re.search('(s|x|z|ch|sh)$', word) else 's'}"


def ask(url, flag, args, body=None, headers=None):
    """Results with a picture that a search service answers, and how many pages it has; `flag` names it in errors."""
    try:
        content = fetch(url, args, False, body, headers)
        answer = json.loads(content)
        entries, pages = (answer["results"], int(answer["page_count"])) if isinstance(answer, dict) else (answer, 1)
        entries = [e for e in entries if isinstance(e, dict) and (one_line(e.get("url")) or one_line(e.get("image")))]
        if not entries:
            raise Failure("found no pictures")
        return entries, pages
    except Failure as failure:
        raise RetrieveError(f"{flag} {url}: {failure}") from failure
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        start = one_line(content[:200].decode("utf-8", "replace"))[:60]
        raise RetrieveError(f"{flag} {url}: answered no list of results ({start!r})") from error


def one_line(text):
    """Text with spaces for line breaks, control characters and lone surrogates; empty if it is not a string."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text) if isinstance(text, str) else ""
    return " ".join(text.split())


def read_dataset(args):
    """Rows of a dataset whose caption mentions the class as (key, entry, picture)."""
    words = one_line(args.class_prompt).casefold()
    forms = "|".join(map(re.escape, (words, f"{words}s", f"{words}es", plural(words)))).replace(r"\ ", r"\s+")
    mention = re.compile(rf"(?<!\w)(?:{forms})(?!\w)")
    try:
        rows, typed = open_dataset(args)
        images = [args.image_column] if args.image_column else [*typed, *IMAGE_COLUMNS]
        captions = [args.caption_column] if args.caption_column else CAPTION_COLUMNS
        for number, row in enumerate(rows):
            if number == 0 and not (row.keys() & set(images) and row.keys() & set(captions)):
                raise ValueError(f"its columns are {', '.join(row)}; choose with --image_column and --caption_column")
            picture, text = (next(filter(None, map(row.get, names)), None) for names in (images, captions))
            picture = picture.get("bytes") or picture.get("path") if isinstance(picture, dict) else picture
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
            text = one_line(text.get("caption") if isinstance(text, dict) else text)
            if not mention.search(text.casefold()) or not isinstance(picture, (bytes, str)):
                continue
            entry, key = row | {"text": text}, f"{args.dataset}#{number}"
            if isinstance(picture, str) and picture.startswith(("http://", "https://")):
                entry["url"], picture = picture, None
            yield key, entry, picture
    except ImportError as error:  # datasets may be there, but not what it needs
        raise RetrieveError(f"--dataset: {one_line(str(error))}; pip install -r requirements.txt") from error
    except Exception as error:  # the readers of so many formats raise anything
        raise RetrieveError(f"--dataset {args.dataset}: {one_line(str(error) or repr(error))}") from error


def open_dataset(args):
    """Rows of the dataset as dicts, their pictures undecoded, and its columns of pictures; hidden files are no part."""
    path, name, options = Path(args.dataset), args.dataset, {}
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(f"{glob.escape(name)}/**", recursive=True)))
    shards = [file for file in files if file.suffix == ".tar"]  # img2dataset leaves tables beside them
    pictures = [file for file in files if file.suffix.lower() in Image.registered_extensions()]
    pairs = [(file, text) for file in pictures if (text := file.with_suffix(".txt")).is_file()]
    if path.is_dir() and any(file.name.startswith("metadata.") for file in files):
        name, options = "imagefolder", {"data_dir": name}
    elif shards:
        return read_shards(shards, args), []
    elif pairs:
        return ({"image": str(file), "text": text.read_text("utf-8", "replace")} for file, text in pairs), []
    elif path.is_file() and path.suffix == ".parquet":
        name, options = "parquet", {"data_files": {args.split: name}}
    elif path.is_file():
        raise ValueError("give a .parquet or a webdataset .tar file, or a folder")
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(name, **options, split=args.split, streaming=True)
    typed = [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
    for name in typed:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows, typed


def read_shards(shards, args):
    """Rows of webdataset shards: the files of a .tar whose names agree up to their first dot, by their endings."""
    parts = re.compile(r"((?:.*/)?[^./]+)\..*?(\w+)").fullmatch
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = (member for member in tar if member.isfile() and parts(member.name))
            for _, row in itertools.groupby(members, lambda member: parts(member.name)[1]):
                row = {parts(m.name)[2].lower(): tar.extractfile(m).read(args.max_bytes + 1) for m in row}
                with contextlib.suppress(ValueError, KeyError):
                    row["json"] = json.loads(row["json"])
                yield row


SOURCES = {"clip-retrieval": search_clip_retrieval, "openverse": search_openverse, "dataset": read_dataset}


def connect(host, port, args, deadline, picture):
    """Socket to a host, to a picture's only at an address of the public internet; a search's is the user's choice."""
    error = Failure("private address")
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not picture or args.allow_private_hosts or is_public(address[0]):  # not the name, which may move
            try:
                limit = min(args.connect_timeout, max(deadline - time.monotonic(), 0.001))
                return socket.create_connection(address[:2], limit)
            except OSError as fault:
                error = fault
    raise error


def is_public(address):
    """Whether an IP address belongs to the public internet, also where it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    elif ip.version == 6 and (ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


def fetch(url, args, picture, body=None, headers=None):
    """Content behind the URL of a picture, or of a search. Retries temporary faults. Raises `Failure`."""
    end = time.monotonic() + (args.timeout if picture else MAX_SEARCH_SECONDS)
    for attempt in itertools.count():
        try:
            return exchange(url, args, picture, min(end, time.monotonic() + args.timeout), body, headers or {})
        except Failure as failure:
            pause = max(failure.retry_after or 0, 0.5 * 2**attempt)
            if failure.retry_after is None or attempt == args.retries or time.monotonic() + pause > end:
                raise
        time.sleep(pause)


def exchange(url, args, picture, deadline, body, headers, redirects=MAX_REDIRECTS):
    """Sends a request, a POST if it has a body, and follows the redirects of pictures; returns the content."""
    try:
        parts = urllib3.util.parse_url(url)
        if parts.scheme not in CONNECTIONS or not parts.host:
            raise ValueError
        connection = CONNECTIONS[parts.scheme](parts.host.strip("[]"), parts.port, timeout=args.timeout)
        with connect(connection.host, connection.port, args, deadline, picture) as sock, sock.dup() as line:
            connection._new_conn, connection.ssl_context = lambda: sock, TLS  # with TLS, the host's name is checked
            hang_up = threading.Timer(deadline - time.monotonic(), line.shutdown, [socket.SHUT_RDWR])
            hang_up.start()  # urllib3's timeouts are per read: a server that drips bytes would never reach them
            try:
                method = "POST" if body else "GET"
                connection.request(method, parts.request_uri, body, HEADERS | headers, preload_content=False)
                with connection.getresponse() as response:
                    location = picture and response.get_redirect_location()
                    content = None if location else read_content(response, args, picture)
            finally:
                hang_up.cancel()
                connection.close()
        if time.monotonic() >= deadline:  # a body that was cut short may look complete
            raise TimeoutError
        if not location:
            return content
        if not redirects:
            raise Failure("too many redirects")
        return exchange(urllib.parse.urljoin(url, location), args, picture, deadline, body, headers, redirects - 1)
    except (OSError, ValueError, urllib3.connection.HTTPException, urllib3.exceptions.HTTPError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise Failure("timed out") from error
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            raise Failure("no such host") from error
        if isinstance(error, ValueError):  # a wrong certificate is one, too
            raise Failure("bad certificate" if isinstance(error, ssl.SSLError) else "not an http(s) URL") from error
        raise Failure("connection failed", retry_after=0) from error


def read_content(response, args, picture):
    """Decoded body of a response. Fails if it is too large, is not a picture, or must not be used for training."""
    if response.status != 200:
        retry_after = urllib3.Retry().get_retry_after(response) or 0
        raise Failure(f"HTTP {response.status}", retry_after if response.status in PASSING_STATUSES else None)
    if picture and any(re.search(r"\bno(image)?ai\b", tag, re.I) for tag in response.headers.getlist("X-Robots-Tag")):
        raise Failure("noai")
    kind = response.headers.get("Content-Type", "image/").strip().lower()
    if picture and not kind.startswith(("image/", "application/octet-stream", "binary/octet-stream")):
        raise Failure("not a picture")
    content, max_bytes = bytearray(), args.max_bytes if picture else MAX_ANSWER_BYTES
    for chunk in itertools.chain([b""], response.stream(65536)):
        content += chunk
        if max(len(content), response.length_remaining or 0) > max_bytes:
            raise Failure("too large")
    return bytes(content)


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
            plain = image.format == "JPEG" and image.mode == "RGB" and content.endswith(b"\xff\xd9")
            plain = plain and all(name == "APP0" and len(data) < 20 for name, data in image.applist)
            picture = to_rgb(image)
            digest = hashlib.sha256(b"%d %d " % picture.size + picture.tobytes()).hexdigest()
            if not plain:  # to encode the others again would only lose quality
                buffer = io.BytesIO()
                picture.info.clear()  # otherwise the comment and the colour profile would be written again
                picture.save(buffer, "JPEG", quality=95, subsampling=0)
                content = buffer.getvalue()
            return content, digest
    except Failure:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise Failure("not a readable picture") from error


def to_rgb(image):
    """Upright sRGB picture, 8 bits (16 are scaled): its colour profile applied, transparency on white."""
    image, profile = ImageOps.exif_transpose(image), image.info.get("icc_profile", b"")
    if image.mode[0] == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
    srgb, mode = ImageCms.createProfile("sRGB"), "RGBA" if image.mode == "RGBA" else "RGB"
    with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile is as good as none
        image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_pictures(folder, unfinished):
    """(file, record) pairs of the pictures that class_data_dir has; a record is a line of metadata.jsonl."""
    if not (folder / "images.txt").is_file():
        return []
    records, pictures = {}, []
    try:
        for file in [*folder.glob("images/metadata.jsonl"), *folder.glob("metadata.jsonl")]:  # where it was, and is
            rows = map(json.loads, file.read_text("utf-8").splitlines())
            records |= {file.parent / row["file_name"]: row for row in rows}
        lists = [(folder / name).read_text("utf-8").removesuffix("\n").split("\n") for name in LISTS]
        # a run that was killed before it renamed images.txt may have lengthened the other lists
        for text, url, name in zip(*lists, strict=not unfinished.exists()):
            # the guide's script wrote paths relative to the working folder, and no metadata
            file = folder / name if (folder / name).is_file() else Path(name).resolve()
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            values = {"file_name": Path(os.path.relpath(file, folder)).as_posix(), "text": text, "url": url}
            pictures.append((file, records.get(file, {}) | values))
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"its lists and pictures do not agree ({one_line(str(error) or repr(error))})"
        raise RetrieveError(f"--class_data_dir {folder}: {problem}; remove it or give another") from error
    return pictures


def publish(folder, unfinished, pictures, new):
    """Adds the new (file, record) pairs and writes the lists; images.txt, which says what is there, comes last."""
    (folder / "images").mkdir(exist_ok=True)
    names = map("images/{}.jpg".format, itertools.count(len(pictures)))
    records = [record for _, record in pictures]
    for file, record in new:
        content = file.read_bytes()  # a run that was killed may have put it there already
        name = next(n for n in names if not (folder / n).exists() or (folder / n).read_bytes() == content)
        write(folder / name, content, unfinished)
        records.append({"file_name": name} | record)
    write(folder / "metadata.jsonl", "".join(f"{json.dumps(record)}\n" for record in records).encode(), unfinished)
    for name, key in LISTS.items():
        write(folder / name, "".join(f"{record[key]}\n" for record in records).encode(), unfinished)
    (folder / "images" / "metadata.jsonl").unlink(missing_ok=True)  # of earlier versions


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
