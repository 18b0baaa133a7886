#!/usr/bin/env python3
"""Fetches real, captioned pictures of a class, for prior preservation with --real_prior.

    python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200

They come from a clip-retrieval backend, from Openverse, or from a dataset (--source). An interrupted run goes on where
it stopped when it is started again.

From Python: `from retrieve import retrieve; retrieve("cat", "real_reg/samples_cat", 200)`.
"""

import argparse
import base64
import email.utils
import functools
import hashlib
import http.client
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
import threading
import time
import unicodedata
import urllib.parse
import warnings
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

try:
    import certifi
    from PIL import Image, ImageOps
    from tqdm.auto import tqdm
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; pip install -r requirements.txt")

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are not kept apart there
    fcntl = None

USER_AGENT = "retrieve.py (regularization pictures for Custom Diffusion)"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no others: Pillow has decoders that start programs
MAX_PIXELS = 50_000_000
MAX_ANSWER_BYTES, MAX_SEARCH_SECONDS = 200_000_000, 120  # of a search service; the seconds include waiting for retries
MAX_CANDIDATES = 20  # per picture wanted, so that an endless search ends
MAX_REDIRECTS = 5
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
DETAILS = ("license", "license_url", "creator", "attribution")  # kept in metadata.jsonl where known
CAPTION_COLUMNS = ("text", "caption", "txt", "TEXT", "prompt", "json")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "url", "URL")
LISTS = ("images.txt", "caption.txt", "urls.txt")
DECODERS = threading.BoundedSemaphore(2)  # a decoded picture can take a gigabyte


# ---------- Arguments -------------------------------------------------------------------------------------------


class RetrieveError(Exception):
    """What stopped the run, in one line that says what to do."""


class SourceError(Exception):
    """A source gives no (more) candidates; one line that says why."""


class Failure(Exception):
    """A candidate gives no picture. `kind` is counted in the summary; `retry_after`: seconds until it may do."""

    def __init__(self, kind, retry_after=None):
        super().__init__(kind)
        self.kind, self.retry_after = kind, retry_after


def first_line(error):
    """One line that says what an exception is about."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line on stderr; exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = OneLineParser(
        description="Fetch real, captioned pictures of a class for train_custom_diffusion.py --real_prior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("class").add_argument
    add("--class_prompt", required=True, help='the class: "cat"; also the caption of pictures that have none')
    add("--class_data_dir", required=True, help="folder that the pictures and their captions are put into")
    add("--num_class_images", type=int, default=200, help="pictures wanted")

    add = parser.add_argument_group("source").add_argument
    add("--source", choices=("auto", "clip-retrieval", "openverse", "dataset"),
        help="auto: dataset if --dataset is given, else clip-retrieval, and openverse if that gives nothing")
    add("--backend_url", help="knn-service of a clip-retrieval backend")
    add("--indice_name", help="index of the backend")
    add("--openverse_url", help="image search of the Openverse API; a token in OPENVERSE_TOKEN raises its limits")
    add("--dataset", help="folder of pictures with metadata.jsonl, metadata.csv or .txt captions; parquet or "
                          "webdataset file; hub dataset")
    add("--split", help="split of the dataset")
    add("--image_column", help="column of the pictures (or of their urls); default: found by type and name")
    add("--caption_column", help="column of the captions; default: found by name")

    add = parser.add_argument_group("downloads").add_argument
    add("--num_workers", type=int, help="downloads side by side")
    add("--connect_timeout", type=float, help="seconds to connect")
    add("--timeout", type=float, help="seconds for a picture in all, redirects and retries included")
    add("--retries", type=int, help="of a fault that may pass, such as status 503")
    add("--max_bytes", type=int, help="a larger file is skipped")
    add("--min_size", type=int, help="a picture with a shorter side, in pixels, is skipped")
    add("--allow_private_hosts", action="store_true", help="also download from loopback, private and link-local hosts")
    # fmt: on

    parser.set_defaults(**retrieve.__kwdefaults__)
    args = parser.parse_args(input_args)
    message = find_contradiction(args)
    if message:
        parser.error(message)
    return args


def find_contradiction(args):
    """First thing that is wrong with the arguments by themselves, as a message; None if nothing is."""
    if not args.class_prompt.strip():
        return "--class_prompt is empty: give the class, for example cat"
    for name, least in (("num_class_images", 1), ("num_workers", 1), ("retries", 0), ("max_bytes", 1), ("min_size", 1)):
        if getattr(args, name) < least:
            return f"--{name} is {getattr(args, name)}: give {least} or more"
    for name in ("connect_timeout", "timeout"):
        if not 0 < getattr(args, name) < math.inf:
            return f"--{name} is {getattr(args, name)}: give a number of seconds above 0"
    for name in ("backend_url", "openverse_url"):
        if not getattr(args, name).startswith(("http://", "https://")):
            return f"--{name} {getattr(args, name)}: give an address that starts with http:// or https://"
    if args.source == "dataset" and not args.dataset:
        return "--source dataset needs --dataset: give a folder, file or hub dataset"
    if args.dataset and args.source not in ("auto", "dataset"):
        return f"--dataset is not used with --source {args.source}: leave one of them out"
    return None


# ---------- The run ---------------------------------------------------------------------------------------------


def retrieve(
    class_prompt,
    class_data_dir,
    num_class_images=200,
    *,
    source="auto",
    backend_url="https://knn.laion.ai/knn-service",
    indice_name="laion_400m",
    openverse_url="https://api.openverse.org/v1/images/",
    dataset=None,
    split="train",
    image_column=None,
    caption_column=None,
    num_workers=16,
    connect_timeout=5.0,
    timeout=30.0,
    retries=2,
    max_bytes=20_000_000,
    min_size=64,
    allow_private_hosts=False,
):
    """Fills class_data_dir up to num_class_images pictures; returns how many are there.

    The arguments are the flags. Raises ValueError for arguments that contradict each other, and `RetrieveError`.
    """
    args = argparse.Namespace(**locals())
    if message := find_contradiction(args):
        raise ValueError(message)
    folder = Path(class_data_dir).resolve()
    journal = None
    try:
        check_folder(folder)
        journal = Journal(folder, args)
        pictures = read_pictures(folder)
        missing = num_class_images - len(pictures)
        if missing <= 0:
            print(f"{class_data_dir} has {len(pictures)} pictures already")
        else:
            refuse_other_files(folder, pictures)
            new, failures = collect(args, journal, pictures)
            if new:
                publish(folder, journal, pictures + new)
            if failures:
                kinds = ", ".join(f"{count} {kind}" for kind, count in failures.most_common())
                print(f"Skipped {failures.total()} candidates: {kinds}")
            pictures += new
            print(f"{class_data_dir} has {len(pictures)} pictures, {len(new)} of them new")
        journal.discard()
        return len(pictures)
    except OSError as error:
        raise RetrieveError(
            f"{error.filename or class_data_dir}: {first_line(error)}; see to it and start again"
        ) from None
    finally:
        if journal:
            journal.close()


def collect(args, journal, pictures):
    """Obtains the missing pictures; returns (file, record) pairs and a Counter of the failures' kinds.

    The first candidates that give a picture are taken, in the candidates' order, whichever download ends first. No
    more are on their way than pictures are missing, so nothing is fetched in vain.
    """
    missing = args.num_class_images - len(pictures)
    known = {record["url"] for _, record in pictures}
    digests = {record.get("pixel_sha256") or pixel_digest(load_picture(file)) for file, record in pictures}
    candidates = unseen(find_candidates(args, journal), known, args)
    try:
        first = list(itertools.islice(candidates, 1))
    except SourceError as error:
        raise RetrieveError(f"{error}{'' if args.dataset else '; give another --source'}") from None
    if not first:
        return [], Counter()
    journal.open()
    candidates = itertools.chain(first, candidates)
    queue, new, failures, exhausted = deque(), [], Counter(), False
    pool = ThreadPoolExecutor(args.num_workers)
    bar = tqdm(total=args.num_class_images, initial=len(pictures), unit="picture", leave=False)
    try:
        while True:
            while queue and queue[0][1].done():
                candidate, future = queue.popleft()
                outcome = future.result()
                kind = outcome["failure"] or ("duplicate" if outcome["digest"] in digests else None)
                if kind:
                    failures[kind] += 1
                    continue
                digests.add(outcome["digest"])
                new.append((journal.picture(outcome["digest"]), make_record(candidate, outcome["digest"], args)))
                bar.update()
            promising = sum(not future.done() or not future.result()["failure"] for _, future in queue)
            room = min(missing - len(new), 4 * args.num_workers) - promising
            if room > 0 and not exhausted:
                try:
                    candidate = next(candidates)
                except (StopIteration, SourceError) as error:
                    exhausted = True
                    if isinstance(error, SourceError):
                        tqdm.write(str(error))
                    continue
                future = journal.outcome(candidate) or pool.submit(obtain, candidate, journal, args)
                queue.append((candidate, future))
            elif queue:
                wait([future for _, future in queue if not future.done()], return_when=FIRST_COMPLETED)
            else:
                return new, failures
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


def make_record(candidate, digest, args):
    """What metadata.jsonl says of a picture."""
    record = {"text": candidate["text"] or one_line(args.class_prompt), "url": candidate["url"]}
    record |= {name: candidate[name] for name in DETAILS if candidate.get(name)}
    return record | {"pixel_sha256": digest}


def obtain(candidate, journal, args):
    """Fetches one candidate's picture and journals the outcome, which it returns."""
    outcome = {"key": candidate["key"], "failure": None, "digest": None}
    try:
        jpeg, outcome["digest"] = convert(fetch_picture(candidate, args), args)
        journal.keep(outcome["digest"], jpeg)
    except Failure as failure:
        outcome["failure"] = failure.kind
    journal.append({"outcome": outcome})
    return outcome


# ---------- Candidates ------------------------------------------------------------------------------------------


def find_candidates(args, journal):
    """Candidates in their order: dicts with key, url, text, perhaps `DETAILS` and the picture itself.

    A search's answers are journaled before they are used: started again, the run has the same candidates in the same
    order and asks for none of them twice.
    """
    if args.dataset:
        yield from dataset_candidates(args)
        return
    source = journal.pages[-1]["source"] if journal.pages else args.source
    pages = None
    if source == "auto":
        source, pages = "clip-retrieval", clip_retrieval_pages(args, 0)
        try:
            pages = itertools.chain([next(pages)], pages)
        except SourceError as error:
            print(f"{error}; asking Openverse instead")
            source, pages = "openverse", None
    search = {"clip-retrieval": clip_retrieval_pages, "openverse": openverse_pages}[source]
    for page in journal.pages:
        yield from page["candidates"]
    known = {candidate["key"] for page in journal.pages for candidate in page["candidates"]}
    if journal.pages and journal.pages[-1]["last"]:
        return
    for candidates, last in pages or search(args, len(journal.pages)):
        candidates = [candidate for candidate in candidates if candidate["key"] not in known]
        last = last or (source == "clip-retrieval" and not candidates)  # more was asked for, and no more came
        journal.open()
        journal.append({"page": {"source": source, "candidates": candidates, "last": last}})
        known |= {candidate["key"] for candidate in candidates}
        yield from candidates
        if last:
            return


def unseen(candidates, known, args):
    """Candidates whose key is neither in `known` nor repeated; of a search, not endlessly many."""
    known = set(known)
    limit = None if args.dataset else MAX_CANDIDATES * args.num_class_images
    for candidate in itertools.islice(candidates, limit):
        if candidate["key"] not in known:
            known.add(candidate["key"])
            yield candidate


def ask(url, flag, args, **options):
    """JSON answer of a search service; `flag` names it in the `SourceError`."""
    try:
        content = fetch(url, args, picture=False, **options)
        return json.loads(content)
    except Failure as failure:
        raise SourceError(f"{flag} {url}: {failure.kind}") from None
    except (ValueError, RecursionError):
        start = one_line(content[:200].decode("utf-8", "replace"))[:60]
        raise SourceError(f"{flag} {url}: answered no JSON ({start!r})") from None


def clip_retrieval_pages(args, start):
    """Answers of a clip-retrieval backend from number `start`, as (candidates, whether it is the last).

    The protocol has no pages: each time twice as many results are asked for, the ones before among them.
    """
    for number in itertools.count(start):
        count = math.ceil(1.5 * args.num_class_images) * 2**number
        query = {
            "text": args.class_prompt, "image": None, "image_url": None, "embedding_input": None,
            "deduplicate": True, "use_safety_model": True, "use_violence_detector": True,
            "indice_name": args.indice_name, "use_mclip": False, "aesthetic_score": 9, "aesthetic_weight": 0.1,
            "modality": "image", "num_images": count, "num_result_ids": count,
        }  # fmt: skip
        body, headers = json.dumps(query).encode(), {"Content-Type": "application/json"}
        answer = ask(args.backend_url, "--backend_url", args, body=body, headers=headers)
        if not isinstance(answer, list):
            raise SourceError(f"--backend_url {args.backend_url}: answered no list of results")
        candidates = [clip_retrieval_candidate(entry, args) for entry in answer if isinstance(entry, dict)]
        candidates = [candidate for candidate in candidates if candidate]
        if number == 0 and not candidates:
            raise SourceError(f"--backend_url {args.backend_url}: answered a list without pictures")
        yield candidates, False


def clip_retrieval_candidate(entry, args):
    """Candidate of one result; None if it has neither a url nor, from an index of local files, the picture itself."""
    url, picture, text = text_of(entry, "url"), text_of(entry, "image"), text_of(entry, "caption")
    if url:
        return {"key": url, "url": url, "text": text}
    if picture:
        key = f"{args.backend_url}#{entry.get('id')}"
        return {"key": key, "url": text_of(entry, "image_path") or key, "text": text, "base64": picture}
    return None


def openverse_pages(args, start):
    """Pages of an Openverse search after the first `start` ones, as (candidates, whether it is the last)."""
    token = os.environ.get("OPENVERSE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for number in itertools.count(start + 1):
        query = urllib.parse.urlencode({"q": args.class_prompt, "page": number, "page_size": 100 if token else 20})
        answer = ask(f"{args.openverse_url}?{query}", "--openverse_url", args, headers=headers)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list):
            raise SourceError(f"--openverse_url {args.openverse_url}: answered no list of results")
        results = [entry for entry in results if isinstance(entry, dict) and text_of(entry, "url")]
        if number == 1 and not results:
            raise SourceError(f"--openverse_url {args.openverse_url}: nothing found for {args.class_prompt!r}")
        pages = answer.get("page_count")
        last = not isinstance(pages, int) or number >= pages
        yield [openverse_candidate(entry) for entry in results if not entry.get("mature")], last
        if not token:
            time.sleep(1)  # what an anonymous user may ask


def openverse_candidate(entry):
    """Candidate of one result, with what its licence wants to be kept."""
    candidate = {"key": text_of(entry, "url"), "url": text_of(entry, "url"), "text": text_of(entry, "title")}
    candidate |= {name: text_of(entry, name) for name in DETAILS}
    candidate["license"] = f"{candidate['license']} {text_of(entry, 'license_version')}".strip()
    return candidate


def text_of(entry, name):
    """An entry's text as one line; empty if there is none."""
    value = entry.get(name)
    return one_line(value) if isinstance(value, str) else ""


def one_line(text):
    """Text with spaces for line breaks, control characters and lone surrogates, which UTF-8 can't write."""
    bad = {character for character in text if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")}
    return " ".join("".join(" " if character in bad else character for character in text).split())


# ---------- Datasets --------------------------------------------------------------------------------------------


def dataset_candidates(args):
    """Candidates of the dataset's rows whose caption mentions the class."""
    words = r"\s+".join(re.escape(word) for word in one_line(args.class_prompt).casefold().split())
    plural = rf"{words.removesuffix('y')}ies" if words.endswith("y") else rf"{words}(?:e?s)?"
    mention = re.compile(rf"(?<!\w)(?:{words}|{plural})(?!\w)")
    try:
        rows, image_columns, caption_column = open_dataset(args)
        for number, row in enumerate(rows):
            text = row.get(caption_column)
            text = text_of(text, "caption") if isinstance(text, dict) else text_of(row, caption_column)
            if not mention.search(text.casefold()):
                continue
            picture = next((row[name] for name in image_columns if row.get(name) is not None), None)
            key = f"{args.dataset}#{number}"
            candidate = {"key": key, "url": text_of(row, "url") or key, "text": text}
            candidate |= {name: text_of(row, name) for name in DETAILS}
            if isinstance(picture, dict):
                picture = picture.get("bytes") or picture.get("path")
            if isinstance(picture, str) and picture.startswith(("http://", "https://")):
                yield candidate | {"url": one_line(picture)}
            else:
                yield candidate | {"bytes" if isinstance(picture, bytes) else "path": picture}
    except SourceError:
        raise
    except Exception as error:  # whatever the readers of so many formats raise
        raise SourceError(f"--dataset {args.dataset}: can't be read ({first_line(error)}); check it") from None


def open_dataset(args):
    """Rows of the dataset (dicts; pictures undecoded), the columns of their pictures, and that of their captions."""
    path = Path(args.dataset)
    described = path.is_dir() and any(path.rglob("metadata.*"))
    if path.is_dir() and not described:
        files = [file for file in sorted(path.rglob("*")) if Image.registered_extensions().get(file.suffix.lower())]
        texts = {file: file.with_suffix(".txt") for file in files if file.with_suffix(".txt").is_file()}
        if texts:
            rows = ({"image": str(file), "text": read_text(text)} for file, text in texts.items())
            return rows, ["image"], "text"
    try:
        import datasets
    except ImportError as error:  # it, or what it needs, is not there or too old
        raise SourceError(f"--dataset: {first_line(error)}; pip install -r requirements.txt") from None
    datasets.disable_progress_bars()
    loaders = {".parquet": "parquet", ".tar": "webdataset"}
    if path.is_file() and path.suffix not in loaders:
        raise SourceError(f"--dataset {path}: give a .parquet or a webdataset .tar file, or a folder")
    name, options = args.dataset, {}
    if path.is_file():
        name, options = loaders[path.suffix], {"data_files": {args.split: str(path)}}
    elif described:
        name, options = "imagefolder", {"data_dir": str(path)}
    rows = datasets.load_dataset(name, **options, split=args.split, streaming=True)
    features = rows.features or next(iter(rows))
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    for name in typed:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    image_columns = [args.image_column] if args.image_column else typed or [n for n in IMAGE_COLUMNS if n in features]
    caption_column = args.caption_column or next((name for name in CAPTION_COLUMNS if name in features), None)
    for flag, names in (("--image_column", image_columns), ("--caption_column", [caption_column])):
        if not names or names[0] not in features:
            found = ", ".join(features)
            raise SourceError(f"--dataset {args.dataset}: its columns are {found}; say which one with {flag}")
    return rows, image_columns, caption_column


def read_text(file):
    """A text file's content; bytes that are no UTF-8 become question marks."""
    return file.read_text(encoding="utf-8", errors="replace")


# ---------- Downloads -------------------------------------------------------------------------------------------


def fetch_picture(candidate, args):
    """Bytes of a candidate's picture, from its row or its url. Raises `Failure`."""
    if "base64" in candidate:
        try:
            content = base64.b64decode(candidate["base64"])
        except ValueError:
            raise Failure("no picture") from None
    elif "bytes" in candidate:
        content = candidate["bytes"]
    elif "path" in candidate:
        content = read_row_file(candidate["path"], args)
    else:
        content = fetch(candidate["url"], args, picture=True)
    if len(content) > args.max_bytes:
        raise Failure("too large")
    return content


def read_row_file(path, args):
    """Bytes of a picture that a dataset's row names: a local file, one in an archive, or one on the hub."""
    host = path.rpartition("::")[2] if isinstance(path, str) else ""
    if not host or ("://" in host and not host.startswith("hf://")):
        raise Failure("no picture")
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read(args.max_bytes + 1)
    except Exception:  # of any of fsspec's file systems
        raise Failure("no such file") from None


def fetch(url, args, picture, **request):
    """Bytes behind the url of a picture, or of a search. Faults that may pass are tried again. Raises `Failure`.

    A picture's url may be anybody's, so only public hosts are asked. A search's host is chosen by the user and may be
    any, but it can't send us on to another.
    """
    end = time.monotonic() + (args.timeout if picture else MAX_SEARCH_SECONDS)
    for attempt in itertools.count():
        try:
            deadline, start = min(end, time.monotonic() + args.timeout), url
            for _ in range(MAX_REDIRECTS + 1):
                start, content = exchange(start, args, deadline, picture, **request)
                if content is not None:
                    return content
            raise Failure("too many redirects")
        except Failure as failure:
            if failure.retry_after is None or attempt == args.retries:
                raise
            pause = max(failure.retry_after, 0.5 * 2**attempt)
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)


def exchange(url, args, deadline, picture, body=None, headers=None):
    """One request (a POST if there is a body) and its answer: (None, content), or (where it is redirected to, None).

    With http.client, because each step has to be ours: which address is connected to, what is read, until when.
    """
    sock = hang_up = None
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failure("not an http address")
        default_port = {"http": 80, "https": 443}[parts.scheme]
        host, port, public = parts.hostname, parts.port or default_port, picture and not args.allow_private_hosts
        sock = connect(host, port, parts.scheme == "https", args, deadline, public)
        connection = http.client.HTTPConnection(host, port)
        connection.sock, connection.default_port = sock, default_port
        hang_up = threading.Timer(seconds_left(deadline) + 0.05, shut_down, [sock])  # a timeout is per read, not in all
        hang_up.daemon = True
        hang_up.start()
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        # what should have been quoted, as browsers do
        target = urllib.parse.quote(target, safe="!#$%&'()*+,/:;=?@[]~|")
        connection.request("POST" if body else "GET", target, body, {"User-Agent": USER_AGENT, **(headers or {})})
        response = connection.getresponse()
        location = response.headers.get("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            if not picture:
                raise Failure(f"moved to {one_line(location)}")
            return urllib.parse.urljoin(url, location), None
        if response.status != 200:
            passing = response.status in PASSING_STATUSES
            raise Failure(f"HTTP {response.status}", parse_retry_after(response.headers) if passing else None)
        if picture:
            check_headers(response.headers)
        return None, read_body(response, args.max_bytes if picture else MAX_ANSWER_BYTES, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise Failure("timed out") from None
        if isinstance(error, ssl.SSLCertVerificationError):
            raise Failure("bad certificate") from None
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            raise Failure("no such host") from None
        if isinstance(error, (ValueError, http.client.InvalidURL)):
            raise Failure("not an http address") from None
        raise Failure("no connection", retry_after=0) from None
    finally:
        if hang_up:
            hang_up.cancel()
        if sock:
            sock.close()


def connect(host, port, secure, args, deadline, public):
    """Socket to a host, with TLS if `secure`. With `public`, only to addresses that are.

    What is checked is the address that is connected to, not a name that could resolve to another one the next time.
    For the same reason no proxy is used: it would do the resolving.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if public:
        addresses = [address for address in addresses if is_public(address[4][0])]
        if not addresses:
            raise Failure("private address")
    for number, (family, kind, protocol, _, address) in enumerate(addresses, start=1):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(min(args.connect_timeout, seconds_left(deadline)))
            sock.connect(address)
            sock.settimeout(seconds_left(deadline))
            return tls_context().wrap_socket(sock, server_hostname=host) if secure else sock
        except OSError:
            sock.close()
            if number == len(addresses):
                raise


def seconds_left(deadline):
    """Seconds until the deadline; TimeoutError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def is_public(address):
    """Whether an IP address is one of the public internet, also where it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        elif ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast


@functools.cache
def tls_context():
    """Certificates of the system and of certifi, which a slim container is without."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def shut_down(sock):
    """Ends whatever another thread is waiting for at a socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def parse_retry_after(headers):
    """Seconds of a Retry-After header, which gives seconds or a date; 0 without one."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return int(value[:9])
    try:
        return max(0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0


def check_headers(headers):
    """Fails for what is no picture, and for one that its host does not want to be used for training."""
    if any(re.search(r"\bno(image)?ai\b", value, re.I) for value in headers.get_all("X-Robots-Tag", ())):
        raise Failure("noai")
    kind = headers.get_content_type() if "Content-Type" in headers else "image/"
    if not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise Failure("no picture")


def read_body(response, max_bytes, deadline):
    """An answer's content, read as it comes."""
    if (response.length or 0) > max_bytes:
        raise Failure("too large")
    content = bytearray()
    while chunk := response.read1(65536):
        content += chunk
        if len(content) > max_bytes:
            raise Failure("too large")
    if time.monotonic() >= deadline:
        raise TimeoutError
    if response.length:
        raise Failure("cut off")
    return bytes(content)


# ---------- Pictures --------------------------------------------------------------------------------------------


def convert(content, args):
    """JPEG file without metadata, upright and RGB, from a picture's bytes, and the digest of its pixels.

    An RGB JPEG that has no metadata stays as it is: encoding it again would only lose.
    """
    try:
        with DECODERS, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Failure("too many pixels")
            if min(image.size) < args.min_size:
                raise Failure("too small")
            plain = image.format == "JPEG" and image.mode == "RGB" and content.endswith(b"\xff\xd9")
            plain = plain and all(name == "APP0" and len(data) < 20 for name, data in image.applist)
            picture = to_rgb(image)
            digest = pixel_digest(picture)
            if not plain:
                buffer = io.BytesIO()
                picture.info.clear()  # or comment and colour profile would be written again
                picture.save(buffer, "JPEG", quality=95, subsampling=0)
                content = buffer.getvalue()
            return content, digest
    except Failure:
        raise
    except Image.DecompressionBombError:
        raise Failure("too many pixels") from None
    except Exception:  # Pillow's decoders raise many kinds
        raise Failure("not a readable picture") from None


def to_rgb(image):
    """Upright RGB picture: alpha on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def load_picture(file):
    """RGB picture of a file that an earlier run left."""
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:
        raise RetrieveError(
            f"{file}: not a readable picture ({first_line(error)}); mend or remove the folder"
        ) from None


def pixel_digest(picture):
    """Hash of a picture's size and RGB pixels: equal for duplicates, whatever file holds them."""
    return hashlib.sha256(b"%d %d " % picture.size + picture.tobytes()).hexdigest()


# ---------- The folder ------------------------------------------------------------------------------------------


def check_folder(folder):
    """Fails for a folder that can't be put in place by renaming."""
    if folder.exists() and not folder.is_dir():
        raise RetrieveError(f"--class_data_dir {folder}: a file; give a folder")
    if folder in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(folder):
        raise RetrieveError(f"--class_data_dir {folder}: give a folder inside it, so that it can be put there whole")


def read_pictures(folder):
    """(file, record) of the pictures that the folder has; a record is a line of metadata.jsonl."""
    if not (folder / LISTS[0]).is_file():
        return []
    try:
        names, captions, urls = (read_lines(folder / name) for name in LISTS)
        metadata = folder / "images" / "metadata.jsonl"
        records = [json.loads(line) for line in read_lines(metadata)] if metadata.is_file() else []
        records = {record["file_name"]: record for record in records}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RetrieveError(f"--class_data_dir {folder}: can't be read ({first_line(error)}); remove it") from None
    if not len(names) == len(captions) == len(urls):
        counts = f"images.txt, caption.txt and urls.txt have {len(names)}, {len(captions)} and {len(urls)} lines"
        raise RetrieveError(f"--class_data_dir {folder}: {counts}; remove it")
    pictures = []
    for name, caption, url in zip(names, captions, urls, strict=True):
        # as the guide's script wrote them, relative to the working folder, too
        files = [file for file in (folder / name, Path(name).resolve()) if file.is_file()]
        if not files:
            raise RetrieveError(f"--class_data_dir {folder}: {name} of its images.txt is not there; remove it")
        pictures.append((files[0], records.get(files[0].name, {}) | {"text": caption, "url": url}))
    return pictures


def read_lines(file):
    """Lines of a text file, as divided by newlines alone."""
    text = file.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []


def refuse_other_files(folder, pictures):
    """Fails if the folder, which is about to be replaced, has files that are not of the set in it."""
    own = {file for file, _ in pictures} | {folder / "images" / "metadata.jsonl"}
    own |= {folder / name for name in LISTS} if (folder / LISTS[0]).is_file() else set()
    other = sorted(file for file in folder.rglob("*") if not file.is_dir() and file not in own)
    if other:
        raise RetrieveError(
            f"--class_data_dir {folder}: has other files ({other[0].name}); give an empty or new folder"
        )


class Journal:
    """What a run has so far, in a hidden folder beside class_data_dir. It survives a kill at any moment.

    class_data_dir itself never changes under a reader: it appears, or is replaced by a larger one, whole and by
    renaming (`publish`). Until then everything lies in `.<name>.unfinished`:

    - journal.jsonl, to which a line is added for each page of candidates before it is used, and for each candidate's
      outcome. Which pictures are taken, and their order, follows from these lines, so a run that is started again
      ends as it would have ended. A last line that was cut off does not count.
    - pictures/<digest>.jpg, which is complete before the line that names it.
    """

    def __init__(self, folder, args):
        self.folder = folder.with_name(f".{folder.name}.unfinished")
        self.discarded = folder.with_name(f".{folder.name}.discarded")
        self.path, self.file, self.lock = self.folder / "journal.jsonl", None, threading.Lock()
        self.pages, self.outcomes = [], {}
        names = ("class_prompt", "source", "backend_url", "indice_name", "openverse_url", "dataset", "split",
                 "image_column", "caption_column", "min_size")  # fmt: skip
        self.request = {"request": {name: getattr(args, name) for name in names}}
        if self.path.exists():
            self.open()
        if (self.folder / "old").exists() and not folder.exists():  # killed between `publish`'s two renames
            (self.folder / "old").rename(folder)
        if self.file:
            self.read()

    def open(self):
        """Opens the journal, for this run alone, if it is not open; mends its end."""
        if self.file:
            return
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetrieveError(f"{self.folder}: another run is at work there; wait for it") from None
        self.file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
        if not self.path.stat().st_size:
            self.append(self.request)

    def read(self):
        """Takes up what an earlier run left, if it was asked for the same."""
        try:
            request, *lines = map(json.loads, self.path.read_bytes().splitlines())
        except ValueError:
            raise RetrieveError(f"{self.path}: damaged; remove {self.folder}") from None
        if request != self.request:
            print(f"{self.folder} is of a run with other arguments: starting anew")
            self.discard()
            return
        self.pages = [line["page"] for line in lines if "page" in line]
        outcomes = [line["outcome"] for line in lines if "outcome" in line]
        outcomes = [o for o in outcomes if o["failure"] or self.picture(o["digest"]).is_file()]
        self.outcomes = {outcome["key"]: outcome for outcome in outcomes}

    def append(self, entry):
        """Adds a line."""
        with self.lock:
            self.file.write(json.dumps(entry).encode() + b"\n")

    def outcome(self, candidate):
        """The candidate's outcome, as a future, if an earlier run had it."""
        if candidate["key"] not in self.outcomes:
            return None
        future = Future()
        future.set_result(self.outcomes[candidate["key"]])
        return future

    def picture(self, digest):
        """Where the picture with that digest is."""
        return self.folder / "pictures" / f"{digest}.jpg"

    def keep(self, digest, jpeg):
        """Writes a picture beside, flushes and renames it."""
        unfinished = self.folder / "pictures" / f"{threading.get_ident()}.unfinished"
        with open(unfinished, "wb") as file:
            file.write(jpeg)
            os.fsync(file.fileno())
        unfinished.replace(self.picture(digest))

    def discard(self):
        """Removes the folder; it is renamed first, so that half of it is never taken for an unfinished run."""
        shutil.rmtree(self.discarded, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(self.discarded)
            shutil.rmtree(self.discarded)
        self.close()

    def close(self):
        """Closes the file and so ends its lock."""
        if self.file:
            self.file.close()
            self.file = None


def publish(folder, journal, pictures):
    """Puts the set of pictures, (file, record) pairs, in the place of `folder`, whole."""
    new, old = journal.folder / "new", journal.folder / "old"
    shutil.rmtree(new, ignore_errors=True)
    (new / "images").mkdir(parents=True)
    records = []
    for number, (file, record) in enumerate(pictures):
        name = f"{number}.jpg"
        try:
            os.link(file, new / "images" / name)
        except OSError:  # a file system without links, or another one
            shutil.copyfile(file, new / "images" / name)
        records.append(record | {"file_name": name})
    lists = {
        "images.txt": [f"images/{record['file_name']}" for record in records],
        "caption.txt": [record["text"] for record in records],
        "urls.txt": [record["url"] for record in records],
        "images/metadata.jsonl": [json.dumps({"file_name": None, **record}) for record in records],
    }
    for name, lines in lists.items():
        with open(new / name, "w", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)


def main(args):
    """Runs `retrieve` as a command; exit status 1 and one line if not as many pictures are there as wanted."""
    warnings.simplefilter("ignore")  # Pillow's, of damaged pictures
    try:
        count = retrieve(**vars(args))
    except RetrieveError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from there", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # workers may still wait for a server
    if count < args.num_class_images:
        kept = f"only {count} of {args.num_class_images} pictures were to be had; they are kept"
        sys.exit(f"error: {args.class_data_dir}: {kept}: start again, perhaps with another --source, for more")


if __name__ == "__main__":
    main(parse_args())
