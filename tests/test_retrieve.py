"""retrieve.py as a user runs it: its sources, against servers on loopback, and what it leaves for the trainer."""

import base64
import csv
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import tarfile
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from launching import ROOT, flags, python, run, train
from pictures import display_p3, make_picture, unwritable_exif
from PIL import Image
from web import SCRIPT, command, picture_bytes, read_set

from retrieve import RetrieveError, one_line, parse_args, plural, retrieve, to_rgb

CATS = ROOT / "assets" / "regularization" / "cat"


def openverse_entry(url, number=0, **values):
    entry = {
        "id": f"id-{number}",
        "url": url,
        "title": f"Cat {number}",
        "license": "by-sa",
        "license_version": "2.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
        "creator": f"Somebody {number}",
        "attribution": f'"Cat {number}" by Somebody {number} is licensed under CC BY-SA 2.0.',
        "mature": False,
        "width": 80,
        "height": 80,
    }
    return entry | values


# Clip-retrieval backends


def test_the_guides_command(web, local, tmp_path):
    """As the guide has it; the default backend is swapped for one on loopback."""
    queries = web.add_backend(web.add_pictures(250))
    guide = "python retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200"
    words = [sys.executable, SCRIPT, *guide.split()[2:], *flags(**local)]
    process = run(*words, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "200 pictures" in process.stdout and "Traceback" not in process.stderr

    found = read_set(tmp_path / "real_reg" / "samples_cat")
    assert len(found) == 200
    for number, (file, caption, url, _) in enumerate(found):
        assert (caption, url) == (f"a cat, number {number}", web.url(f"/{number}.jpg"))
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(number), int)).mean() < 6
    assert os.listdir(tmp_path) == ["real_reg"] and os.listdir(tmp_path / "real_reg") == ["samples_cat"]
    # the protocol
    (query,) = queries
    assert query == {
        "text": "cat", "image": None, "image_url": None, "embedding_input": None, "deduplicate": True,
        "use_safety_model": True, "use_violence_detector": True, "indice_name": "laion_400m", "use_mclip": False,
        "aesthetic_score": 9, "aesthetic_weight": 0.1, "modality": "image", "num_images": 300, "num_result_ids": 300,
    }  # fmt: skip
    # no picture is fetched in vain, and a complete folder asks for nothing
    assert max(web.asked.values()) == 1 and len(web.asked) == 201
    start = time.perf_counter()
    assert run(*words, cwd=tmp_path).returncode == 0
    assert web.asked.total() == 201 and time.perf_counter() - start < 10


def test_defaults_are_the_guides():
    args = parse_args(["--class_prompt=cat", "--class_data_dir=real_reg/samples_cat"])
    assert args.backend_url == "https://knn.laion.ai/knn-service" and args.indice_name == "laion_400m"
    assert (args.source, args.num_class_images, args.num_workers, args.min_size) == ("auto", 200, 16, 64)
    assert args.max_bytes == 20_000_000 and not args.allow_private_hosts


BROKEN = {
    "502": (502, {}, b"<html>Bad gateway</html>"),
    "html": (200, {"Content-Type": "text/html"}, b"<html>\nmoved</html>"),
    "empty": (200, {}, b"[]"),
    "no urls": (200, {}, b'[{"id": 1, "similarity": 0.3, "caption": "a cat"}]'),
    "no list": (200, {}, b'{"message": "Internal Server Error"}'),
    "moved": (301, {"Location": "https://elsewhere.example/"}, b""),
    "down": None,
}
SAYS = {
    "502": "HTTP 502",
    "html": "answered no list of results ('<html> moved</html>')",
    "empty": "found no pictures",
    "no urls": "found no pictures",
    "no list": 'answered no list of results (\'{"message": "Internal Server Error"}\')',
    "moved": "HTTP 301",
    "down": "connection failed",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_useless_backend(fault, web, local, tmp_path, capsys):
    """auto says in one line what happened and asks Openverse; asked for by name, the backend's fault is the error."""
    web.routes["/knn-service"] = BROKEN[fault]
    if fault == "down":
        local["backend_url"] = "http://127.0.0.1:9/knn-service"
    web.add_openverse([openverse_entry(url, i) for i, url in enumerate(web.add_pictures(3))])
    assert retrieve("cat", tmp_path / "cat", 3, **local) == 3
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"--backend_url {local['backend_url']}: {SAYS[fault]}; asking Openverse instead"
    assert [row[1] for row in read_set(tmp_path / "cat")] == ["Cat 0", "Cat 1", "Cat 2"]

    with pytest.raises(RetrieveError) as error:
        retrieve("cat", tmp_path / "b" / "cat", 3, source="clip-retrieval", **local)
    assert str(error.value) == f"--backend_url {local['backend_url']}: {SAYS[fault]}; give another --source"
    assert not (tmp_path / "b").exists()


def test_nothing_answers(local, tmp_path):
    """Both public services out of reach: one line on stderr, exit status 1, nothing created."""
    down = "http://127.0.0.1:9/"
    process = command(tmp_path / "x" / "cat", *flags(backend_url=down, openverse_url=down, retries=0))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: --openverse_url") and "connection failed" in line and "--source" in line
    assert not (tmp_path / "x").exists()


def test_missing_and_odd_captions(web, local, tmp_path):
    """No caption: the class prompt. Line breaks, control characters and lone surrogates become spaces."""
    odd = ["a cat\non\r\na\u2028mat\x00\x1b[31m!", None, "", 7, " \ud800 cat \ud83d", "chat, ねこ, 🐈‍⬛"]
    web.add_backend(web.add_pictures(6), odd)
    assert retrieve("tabby\ncat", tmp_path / "cat", 6, source="clip-retrieval", **local) == 6
    captions = [caption for _, caption, _, _ in read_set(tmp_path / "cat")]
    assert captions == ["a cat on a mat [31m!", "tabby cat", "tabby cat", "tabby cat", "cat", "chat, ねこ, 🐈‍⬛"]
    assert one_line("a\tb\x85c") == "a b c"


def test_entries_that_are_none(web, local, tmp_path):
    """A backend may answer anything: entries of other types are passed over."""
    url = web.add_pictures(1)[0]
    entries = [None, 3, [], {}, {"url": None}, {"url": 5}, {"url": "  "}, {"url": "not a url"}, {"url": "http://["}]
    entries += [{"url": "http://:99999/x"}, {"url": f"{url}\n"}, {"url": "http://a b/\x00"}]
    web.routes["/knn-service"] = (200, {}, json.dumps(entries).encode())
    assert retrieve("cat", tmp_path / "cat", 2, source="clip-retrieval", **local) == 1
    assert [(row[1], row[2]) for row in read_set(tmp_path / "cat")] == [("cat", url)]


def test_index_of_local_files(web, local, tmp_path):
    """A backend of one's own over a folder answers the pictures themselves."""
    entries = [
        {"id": i, "image_path": f"/data/{i}.jpg", "caption": f"cat {i}", "image": base64.b64encode(content).decode()}
        for i, content in enumerate([picture_bytes(0), b"no picture", picture_bytes(1)])
    ]
    web.routes["/knn-service"] = (200, {}, json.dumps([*entries, {"image": "=", "id": 9}]).encode())
    assert retrieve("cat", tmp_path / "cat", 2, source="clip-retrieval", **local) == 2
    assert [row[1:3] for row in read_set(tmp_path / "cat")] == [("cat 0", "/data/0.jpg"), ("cat 2", "/data/2.jpg")]


def test_asks_for_more_as_urls_run_out(web, local, tmp_path, capsys):
    """Most urls are dead: the backend is asked for twice as many, until it has no more."""
    dead = [web.url(f"/dead/{number}.jpg") for number in range(40)]
    alive = web.add_pictures(10)
    queries = web.add_backend(dead[:20] + alive[:4] + dead[20:] + alive[4:])
    assert retrieve("cat", tmp_path / "cat", 10, source="clip-retrieval", **local) == 10
    assert [query["num_images"] for query in queries] == [15, 30, 60]
    assert [row[2] for row in read_set(tmp_path / "cat")] == alive
    assert "Skipped 40 candidates: 40 HTTP 404" in capsys.readouterr().out
    assert max(web.asked[url.removeprefix(web.url())] for url in dead + alive) == 1


def test_fewer_than_asked_for(web, local, tmp_path):
    """They are kept, exit status 1; started again, only what is missing is asked for."""
    urls = web.add_pictures(5)
    web.add_backend(urls[:3])
    words = flags(num_class_images=5, source="clip-retrieval", **local)
    process = command(tmp_path / "cat", *words)
    assert process.returncode == 1 and "found only 3 of 5 pictures" in process.stderr.splitlines()[-1]
    before = read_set(tmp_path / "cat")
    web.add_backend(urls[2:] + urls[:3])
    process = command(tmp_path / "cat", *words)
    assert process.returncode == 0, process.stderr
    found = read_set(tmp_path / "cat")
    assert [row[1:3] for row in found[:3]] == [row[1:3] for row in before]
    assert sorted(row[2] for row in found) == sorted(urls)
    assert max(web.asked[f"/{number}.jpg"] for number in range(5)) == 1


# Openverse


def test_openverse(web, local, tmp_path, monkeypatch):
    """Pages, licence and attribution; mature pictures are skipped; a token is sent and allows larger pages."""
    urls = web.add_pictures(120)
    results = [openverse_entry(url, i, mature=i % 2 == 1) for i, url in enumerate(urls)]
    results[4] |= {"title": None, "creator": None, "attribution": None}
    queries = web.add_openverse(results)
    monkeypatch.setenv("OPENVERSE_TOKEN", "secret")
    assert retrieve("cat", tmp_path / "cat", 55, source="openverse", **local) == 55
    found = read_set(tmp_path / "cat")
    assert [row[2] for row in found] == urls[:110:2]
    assert found[1][3] | {"pixel_sha256": ""} == {
        "file_name": "images/1.jpg",
        "text": "Cat 2",
        "url": urls[2],
        "license": "by-sa 2.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
        "creator": "Somebody 2",
        "attribution": '"Cat 2" by Somebody 2 is licensed under CC BY-SA 2.0.',
        "pixel_sha256": "",
    }
    assert found[2][1] == "cat" and "attribution" not in found[2][3]
    assert [(q["q"], q["page"], q["page_size"], q["token"]) for q in queries] == [
        ("cat", "1", "100", "Bearer secret"),
        ("cat", "2", "100", "Bearer secret"),
    ]
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "cat").rglob("*.*t*"))


def test_openverse_without_a_token(web, local, tmp_path):
    """20 a page, about one page a second; each search ends with its last page."""
    queries = web.add_openverse([openverse_entry(url, i) for i, url in enumerate(web.add_pictures(25))])
    start = time.monotonic()
    assert retrieve("cat", tmp_path / "cat", 30, source="openverse", **local) == 25
    assert time.monotonic() - start >= 5
    asked = [(query["q"], query["page"], query["page_size"], query["token"]) for query in queries]
    assert asked == [(words, page, "20", None) for words in ("cat", "cats", "cat photo") for page in ("1", "2")]


def add_limited_openverse(web, works, limit=240):
    """Openverse with these lists of urls by query, of which it shows no more than the limit; returns the queries."""
    asked = []

    def answer(handler):
        query = {name: values[0] for name, values in parse_qs(urlsplit(handler.path).query).items()}
        page, size = int(query["page"]), int(query["page_size"])
        asked.append((query["q"], page))
        urls = works.get(query["q"], [])[:limit]
        results = [openverse_entry(url) for url in urls[(page - 1) * size : page * size]]
        handler.answer(json.dumps({"page_count": -(-len(urls) // size), "results": results}).encode())

    web.routes["/v1/images/"] = answer
    return asked


def test_more_than_a_query_of_openverse_gives(web, local, tmp_path):
    """240 works for "cat", a quarter of them dead: the plural has the others, and only then."""
    urls = web.add_pictures(300)
    for number in range(0, 240, 4):
        del web.routes[f"/{number}.jpg"]
    asked = add_limited_openverse(web, {"cat": urls, "cats": urls[200:]})
    process = command(tmp_path / "cat", *flags(source="openverse", num_class_images=200, **local))
    assert process.returncode == 0, process.stderr
    alive = [url for number, url in enumerate(urls) if number >= 240 or number % 4]
    assert [row[2] for row in read_set(tmp_path / "cat")] == alive[:200]
    assert asked == [*(("cat", page) for page in range(1, 13)), *(("cats", page) for page in range(1, 4))]
    assert max(web.asked[f"/{number}.jpg"] for number in range(300)) == 1


@pytest.mark.parametrize("name, other", [("sheep", "sheep photo"), ("a toy", "toys")])
def test_other_queries_of_openverse(name, other, web, local, tmp_path):
    """The plural without an article; where it is the same word, another query all the same."""
    urls = web.add_pictures(3)
    asked = add_limited_openverse(web, {name: urls, other: urls[1:]}, limit=2)
    assert retrieve(name, tmp_path / "cat", 3, source="openverse", **local) == 3
    assert [words for words, _ in asked] == [name, other]
    assert [row[2] for row in read_set(tmp_path / "cat")] == urls


def test_query_of_openverse_that_finds_nothing(web, local, tmp_path):
    """The class itself or its plural may have no works, and others have some."""
    urls = web.add_pictures(3)
    asked = add_limited_openverse(web, {"cat photo": urls})
    assert retrieve("cat", tmp_path / "a", 3, source="openverse", **local) == 3
    assert [words for words, _ in asked] == ["cat", "cats", "cat photo"]
    asked = add_limited_openverse(web, {"cat": urls[:1], "cat photo": urls[1:]})
    assert retrieve("cat", tmp_path / "b", 3, source="openverse", **local) == 3
    assert [words for words, _ in asked] == ["cat", "cats", "cat photo"]
    add_limited_openverse(web, {})
    with pytest.raises(RetrieveError, match="--openverse_url .*: found no pictures"):
        retrieve("cat", tmp_path / "c", 3, source="openverse", **local)


@pytest.mark.parametrize("status", [401, 403])
def test_token_that_has_expired(status, web, local, tmp_path, monkeypatch):
    """Openverse's tokens are good for 12 hours. The line names where the token is, also if it was the second choice."""
    web.routes["/v1/images/"] = (status, {}, b"{}")
    with pytest.raises(RetrieveError) as error:
        retrieve("cat", tmp_path / "cat", 3, source="openverse", **local)
    assert "OPENVERSE_TOKEN" not in str(error.value)
    monkeypatch.setenv("OPENVERSE_TOKEN", "secret")
    with pytest.raises(RetrieveError, match=f"HTTP {status}; renew or unset OPENVERSE_TOKEN$"):
        retrieve("cat", tmp_path / "cat", 3, source="openverse", **local)
    process = command(tmp_path / "cat", *flags(**local))
    assert process.returncode == 1 and process.stdout.count("asking Openverse instead") == 1
    assert process.stderr.endswith(f"HTTP {status}; renew or unset OPENVERSE_TOKEN\n")


@pytest.mark.parametrize("token", ["secret\n", " Bearer secret ", "“secret”"])
def test_token_as_it_is_pasted(token, web, local, tmp_path, monkeypatch):
    """A line break, the word before it, or the quotation marks of a text program are no part of it."""
    queries = web.add_openverse([openverse_entry(url) for url in web.add_pictures(1)])
    monkeypatch.setenv("OPENVERSE_TOKEN", token)
    assert retrieve("cat", tmp_path / "cat", 1, source="openverse", **local) == 1
    assert [query["token"] for query in queries] == ["Bearer secret"]


def test_rate_limit_is_obeyed(web, local, tmp_path):
    """429 with Retry-After, as seconds and as a date; one that asks for hours ends the search."""
    web.add_openverse([openverse_entry(url) for url in web.add_pictures(1)])
    answer, times = web.routes["/v1/images/"], []

    def limited(handler):
        times.append(time.monotonic())
        if len(times) == 1:
            return handler.answer(b"", 429, {"Retry-After": "1"})
        if len(times) == 2:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
            return handler.answer(b"", 429, {"Retry-After": date})
        return answer(handler)

    web.routes["/v1/images/"] = limited
    assert retrieve("cat", tmp_path / "cat", 1, source="openverse", **local | {"retries": 2}) == 1
    assert times[1] - times[0] >= 1 and times[2] - times[1] >= 0.9
    web.routes["/v1/images/"] = (429, {"Retry-After": "7200"}, b"")
    with pytest.raises(RetrieveError, match="rate limited; give another --source"):
        retrieve("cat", tmp_path / "b", 1, source="openverse", **local | {"retries": 2})


def test_search_that_breaks_off(web, local, tmp_path, capsys, monkeypatch):
    """What the pages before gave is kept."""
    monkeypatch.setenv("OPENVERSE_TOKEN", "secret")
    web.add_openverse([openverse_entry(url, i) for i, url in enumerate(web.add_pictures(100))], page_count=9)
    answer = web.routes["/v1/images/"]
    web.routes["/v1/images/"] = lambda handler: (
        answer(handler) if "page=1&" in handler.path else handler.answer(b"", 401)
    )
    assert retrieve("cat", tmp_path / "cat", 101, source="openverse", **local) == 100
    assert "HTTP 401; renew or unset OPENVERSE_TOKEN\n" in capsys.readouterr().out
    assert len(read_set(tmp_path / "cat")) == 100


# Datasets


def dataset_pictures(count=4):
    """Files of pictures in several formats, and captions of which all but number 2 mention cats."""
    contents = [picture_bytes(number, "PNG" if number == 1 else "JPEG") for number in range(count)]
    captions = ["A CAT on a mat", "two cats", "a catalogue of concatenated things", "the cat's dish"]
    return contents, captions


def save_dataset(form, folder):
    """Writes `dataset_pictures` in one of the forms; returns what --dataset is to name."""
    contents, captions = dataset_pictures()
    folder.mkdir()
    names = [f"{i}.{'png' if i == 1 else 'jpg'}" for i in range(len(contents))]
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        images = [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)]
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), folder / "cats.parquet")
        return folder / "cats.parquet"
    if form == "webdataset":
        with tarfile.open(folder / "cats.tar", "w") as tar:
            for number, (content, caption) in enumerate(zip(contents, captions, strict=True)):
                about = json.dumps({"license": "cc0"}).encode()
                for ending, data in (("jpg", content), ("json", about), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return folder / "cats.tar"
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    if form == "txt":
        for number, caption in enumerate(captions):
            (folder / f"{number}.txt").write_text(caption)
        (folder / "notes.txt").write_text("not a caption")
    elif form == "jsonl":
        rows = [{"file_name": n, "text": c, "license": "cc0"} for n, c in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *zip(names, captions, strict=True)])
    return folder


NETWORK = {"allowed": True}  # an audit hook can't be taken back


def refuse_network(event, _):
    if not NETWORK["allowed"] and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise AssertionError(f"{event} without a need")


@pytest.fixture
def offline(monkeypatch):
    """A connection, or the look-up of a name, is an error."""
    sys.addaudithook(refuse_network)
    monkeypatch.setitem(NETWORK, "allowed", False)


@pytest.mark.parametrize("form", ["parquet", "webdataset", "txt", "jsonl", "csv"])
def test_dataset(form, tmp_path, offline):
    """Rows whose caption has the class as a word are taken, in their order; no network is needed."""
    dataset = save_dataset(form, tmp_path / "data")
    assert retrieve("cat", tmp_path / "cat", 3, dataset=str(dataset)) == 3
    found = read_set(tmp_path / "cat")
    assert [row[1] for row in found] == ["A CAT on a mat", "two cats", "the cat's dish"]
    assert [row[2] for row in found] == [f"{dataset}#{number}" for number in (0, 1, 3)]
    for (file, *_), number in zip(found, (0, 1, 3), strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(number), int)).mean() < 6
    assert (found[0][3].get("license") == "cc0") == (form == "jsonl")


def test_embedded_pictures(tmp_path, offline):
    """The repository's own set comes out as it is: the same files in the same order."""
    assert retrieve("cat", tmp_path / "cat", 200, dataset=str(CATS)) == 200
    assert (tmp_path / "cat" / "caption.txt").read_bytes() == (CATS / "caption.txt").read_bytes()
    for number, (file, *_) in enumerate(read_set(tmp_path / "cat")):
        assert file.read_bytes() == (CATS / "images" / f"{number}.jpg").read_bytes()


def test_result_is_a_dataset(tmp_path, offline):
    """The folder loads with Hugging Face `datasets`, and so can be the source of another."""
    import datasets

    rows = [{"file_name": f"{i}.jpg", "text": f"cat {i}", "license": "cc0"} for i in range(3)]
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.jpg").write_bytes(picture_bytes(number))
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    retrieve("cat", tmp_path / "a", 3, dataset=str(tmp_path / "data"))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "a"), split="train", streaming=True)
    assert [(row["text"], row["license"], row["image"].size) for row in loaded] == [
        (f"cat {i}", "cc0", (80, 80)) for i in range(3)
    ]
    retrieve("cat", tmp_path / "b", 3, dataset=str(tmp_path / "a"))
    assert [row[0].read_bytes() for row in read_set(tmp_path / "b")] == [
        row[0].read_bytes() for row in read_set(tmp_path / "a")
    ]


def test_dataset_of_urls(web, local, tmp_path):
    """A parquet file of urls, as lists of web pictures come; and columns named by flag."""
    import pyarrow
    import pyarrow.parquet

    urls = web.add_pictures(2)
    table = {"where": [urls[0], "file:///etc/passwd", urls[1]], "said": ["a cat", "cat", "the cats"], "text": ["x"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "urls.parquet")
    options = {"dataset": str(tmp_path / "urls.parquet"), "image_column": "where", "caption_column": "said"}
    assert retrieve("cat", tmp_path / "cat", 3, **options, allow_private_hosts=True) == 2
    assert [row[1:3] for row in read_set(tmp_path / "cat")] == [("a cat", urls[0]), ("the cats", urls[1])]


def test_dataset_of_which_nothing_is_taken(tmp_path):
    """The line says how many rows there are, and why none is of use."""
    import pyarrow
    import pyarrow.parquet

    values = {"image": [1, 2, 3], "text": ["a cat", "a dog", "catalogue"], "number": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(values), tmp_path / "x.parquet")
    expected = {
        "text": "none of its 3 rows is of use: 1 without a picture, 2 whose caption does not mention cat",
        "number": "none of its 3 rows is of use: 3 whose caption is of the kind int",
    }
    for column, problem in expected.items():
        process = command(tmp_path / "cat", "--dataset", tmp_path / "x.parquet", "--caption_column", column)
        assert process.returncode == 1 and process.stdout == ""
        assert process.stderr == f"error: --dataset {tmp_path / 'x.parquet'}: {problem}\n"


def write_table(file, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_metadata(file, rows):
    """Writes rows in the format that the file's ending says."""
    if file.suffix == ".parquet":
        write_table(file, rows)
    elif file.suffix == ".csv":
        with open(file, "w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_names_that_look_like_splits(ending, tmp_path, offline):
    """Files and folders called train, test or validation: all rows of all the metadata, whatever the names say."""
    names = ["train.png", "cat test.png", "validation.jpg", "0.jpg"]
    folders = ["", "train", "test", "dev/evaluation"]
    expected = {}
    for place, folder in enumerate(folders):
        (tmp_path / "data" / folder / "deep").mkdir(parents=True)
        rows = []
        for number, name in enumerate(names):
            name = f"deep/{name}" if number == 3 else name  # noqa: PLW2901
            picture = picture_bytes(10 * place + number, "PNG" if name.endswith("png") else "JPEG")
            (tmp_path / "data" / folder / name).write_bytes(picture)
            rows.append({"file_name": name, "text": f"cat {place}\u2028{number}", "license": "cc0"})
            expected[f"cat {place} {number}"] = 10 * place + number
        write_metadata(tmp_path / "data" / folder / f"metadata.{ending}", rows)
    assert retrieve("cat", tmp_path / "cat", 16, dataset=str(tmp_path / "data")) == 16
    found = read_set(tmp_path / "cat")
    assert {row[1] for row in found} == set(expected) and {row[3]["license"] for row in found} == {"cc0"}
    for file, caption, *_ in found:
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(expected[caption]), int)).mean() < 6


def test_tables_that_are_called_like_splits(tmp_path, offline):
    """A copy of a hub dataset: all its tables are read. --split can't choose among local files, and says so."""
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001", "validation")):
        rows = [{"image": {"bytes": picture_bytes(number), "path": "0.jpg"}, "text": f"cat {number}"}]
        write_table(tmp_path / "data" / f"{name}.parquet", rows)
    assert retrieve("cat", tmp_path / "cat", 3, dataset=str(tmp_path / "data")) == 3
    assert sorted(row[1] for row in read_set(tmp_path / "cat")) == ["cat 0", "cat 1", "cat 2"]
    with pytest.raises(RetrieveError, match="--split test is for datasets on the hub"):
        retrieve("cat", tmp_path / "b", 3, dataset=str(tmp_path / "data"), split="test")


ODD = ["[2024] cats", "pairs::x", "cats #2", "100%20", "a * b?", "{cat}", "-cat", "hf:cats", "data.zip::cats"]


@pytest.mark.parametrize("form", ["parquet", "webdataset", "txt", "jsonl", "csv"])
def test_odd_names_of_folders(form, tmp_path, offline, monkeypatch):
    """Letters that mean something in patterns and addresses are taken as they are."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(ODD):
        (tmp_path / name).mkdir()
        dataset = save_dataset(form, tmp_path / name / "data").relative_to(tmp_path)
        assert retrieve("cat", tmp_path / str(number), 3, dataset=str(dataset)) == 3
        captions = [row[1] for row in read_set(tmp_path / str(number))]
        assert captions == ["A CAT on a mat", "two cats", "the cat's dish"]


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_odd_names_of_files(form, tmp_path, offline):
    """The same of the pictures, whether they lie there or a table has their paths."""
    (tmp_path / "data").mkdir()
    rows = []
    for number, name in enumerate(ODD):
        file = tmp_path / "data" / f"{name}.jpg"
        file.write_bytes(picture_bytes(number))
        rows.append({"file_name": file.name, "text": f"cat {name}"})
        if form == "txt":
            file.with_suffix(".txt").write_text(f"cat {name}")
    dataset = tmp_path / "data"
    if form == "jsonl":
        write_metadata(dataset / "metadata.jsonl", rows)
    elif form == "parquet":
        dataset = tmp_path / "x.parquet"
        write_table(
            dataset, [{"image": str(tmp_path / "data" / row["file_name"]), "text": row["text"]} for row in rows]
        )
    assert retrieve("cat", tmp_path / "cat", 9, dataset=str(dataset)) == len(ODD)
    assert {row[1] for row in read_set(tmp_path / "cat")} == {f"cat {name}" for name in ODD}


LISTS = {  # forms in which COCO's several captions of a picture come
    "strings": lambda captions: {"caption": captions},
    "dicts": lambda captions: {"captions": [{"id": i, "caption": text} for i, text in enumerate(captions)]},
    "texts": lambda captions: {"text": [{"text": text} for text in captions]},
    "sentences": lambda captions: {"sentences": [{"tokens": text.split(), "raw": text} for text in captions]},
    "dict of lists": lambda captions: {"sentences": {"raw": captions, "sentid": [7] * len(captions)}},
}


@pytest.mark.parametrize("form", LISTS)
def test_several_captions_of_a_picture(form, tmp_path, offline):
    """The first one that mentions the class; in a table, in a folder's metadata, and in the .json of a shard."""
    captions = [["an animal", "a cat", "two cats"], ["a dog", "a sofa"], ["the cat's dish"], []]
    rows = [LISTS[form](texts) for texts in captions]
    folder = tmp_path / "data"
    folder.mkdir()
    tables = []
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, row in enumerate(rows):
            (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
            add_to_tar(tar, {f"{number}.jpg": picture_bytes(number), f"{number}.json": json.dumps(row).encode()})
            tables.append({"image": {"bytes": picture_bytes(number), "path": None}} | row)
    write_metadata(folder / "metadata.jsonl", [{"file_name": f"{i}.jpg"} | row for i, row in enumerate(rows)])
    write_table(tmp_path / "x.parquet", tables)
    for name in ("data", "x.tar", "x.parquet"):
        assert retrieve("cat", tmp_path / f"of {name}", 9, dataset=str(tmp_path / name)) == 2
        assert [row[1] for row in read_set(tmp_path / f"of {name}")] == ["a cat", "the cat's dish"]


def test_captions_beside_pictures(tmp_path, offline, capsys):
    """The endings and encodings that people's tools leave; the best-known one counts; what is left out is said."""
    folder = tmp_path / "data"
    (folder / "more.png").mkdir(parents=True)
    texts = {
        "0.caption": "cat 0", "1.TXT": "cat 1", "2.jpg.txt": "cat 2", "3.jpg.CAPTION": "cat 3",
        "4.txt": "cat 4", "4.caption": "cat, wrong", "4.jpg.txt": "cat, wrong",
        "5.caption": "cat 5", "5.jpg.txt": "cat, wrong", "6.jpg.txt": "cat 6", "6.jpg.caption": "cat, wrong",
        "more.png/9.v2.txt": "cat 9", "notes.txt": "cat, of no picture", "13.txt": "cat",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    for number in (*range(9), 10, 11, 12):
        (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
    (folder / "more.png" / "9.v2.jpg").write_bytes(picture_bytes(9))
    for name in ("13.heic", "x.mp4"):
        (folder / name).write_bytes(b"no picture")
    (folder / "7.txt").write_text("\ufeffcat 7, né", "utf-8")
    (folder / "8.txt").write_text("cat 8, né", "utf-16")
    write_metadata(folder / "metadata.jsonl", [{"file_name": "10.jpg"}, {"file_name": "4.jpg", "text": "cat ten"}])
    (folder / "10.caption").write_bytes(b"\xfe\xff" + "cat 10".encode("utf-16-be"))
    assert retrieve("cat", tmp_path / "cat", 20, dataset=str(folder)) == 11
    captions = ["cat 10", "cat ten", *(f"cat {number}" for number in (0, 1, 2, 3, 5, 6)), "cat 7, né", "cat 8, né"]
    found = [row[1] for row in read_set(tmp_path / "cat")]
    assert found == [*captions, "cat 9"]
    for (file, *_), seed in zip(read_set(tmp_path / "cat"), (10, 4, 0, 1, 2, 3, 5, 6, 7, 8, 9), strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(seed), int)).mean() < 6
    reasons = "2 without a caption (such as 11.jpg), 1 of a kind that is not read (such as 13.heic)"
    assert f"--dataset {folder}: left out pictures: {reasons}\n" in capsys.readouterr().out


def test_plurals(tmp_path):
    """Several words, -y and -ies, hyphens; words that only contain the class are others."""
    captions = {
        "box": ["two boxes", "a boxer"],
        "puppy": ["Puppies!", "puppyish"],
        "tabby cat": ["my Tabby  cats", "tabby, cat"],
        "t-shirt": ["T-shirts", "tshirt"],
        "toy": ["two toys", "toies"],
        "woman": ["two women", "womanly"],
    }
    for name, (good, bad) in captions.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number, caption in enumerate((bad, good)):
            (folder / f"{number}.jpg").write_bytes(picture_bytes(number))
            (folder / f"{number}.txt").write_text(caption)
        assert retrieve(name, tmp_path / name, 2, dataset=str(folder)) == 1
        assert read_set(tmp_path / name)[0][1] == one_line(good)


def test_plural():
    """Endings that change, classes that are often trained, and the noun in a phrase."""
    plurals = {
        "cat": "cats", "toy": "toys", "puppy": "puppies", "bus": "buses", "dress": "dresses", "fox": "foxes",
        "bench": "benches", "person": "people", "woman": "women", "old man": "old men", "an owl": "owls",
        "human": "humans", "Teddy Bear": "Teddy Bears",
    }  # fmt: skip
    assert {word: plural(word) for word in plurals} == plurals


def add_to_tar(tar, files):
    for name, content in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def test_shard_whose_files_are_not_side_by_side(tmp_path, offline):
    """As tar packs a folder: in the order of the disk."""
    captions = ["cat 0", "a dog", "cat 2", "cat 3"]
    files = {f"x/{number}.jpg": picture_bytes(number) for number in range(4)}
    for number in (2, 0, 3, 1):
        files[f"x/{number}.txt"] = captions[number].encode()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_to_tar(tar, files)
    assert retrieve("cat", tmp_path / "cat", 9, dataset=str(tmp_path / "x.tar")) == 3
    found = read_set(tmp_path / "cat")
    assert [row[1] for row in found] == ["cat 0", "cat 2", "cat 3"]
    for (file, *_), seed in zip(found, (0, 2, 3), strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(seed), int)).mean() < 6


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_broken_files_of_a_dataset(ending, tmp_path, offline):
    """Cut off, or empty, as an interrupted download leaves them: they are named, and the others are read."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(4):
        file = folder / f"0000{shard}.{ending}"
        if ending == "tar":
            with tarfile.open(file, "w") as tar:
                for number in range(3 * shard, 3 * shard + 3):
                    add_to_tar(tar, {f"{number}.txt": b"cat %d" % number, f"{number}.jpg": picture_bytes(number)})
        else:
            numbers = range(3 * shard, 3 * shard + 3)
            write_table(file, [{"text": f"cat {i}", "image": {"bytes": picture_bytes(i)}} for i in numbers])
    (folder / f"00000.{ending}").write_bytes(b"")
    content = (folder / f"00002.{ending}").read_bytes()
    cut = content.index(picture_bytes(7)) + 100 if ending == "tar" else len(content) // 2
    (folder / f"00002.{ending}").write_bytes(content[:cut])
    process = command(tmp_path / "cat", "--dataset", folder, "--num_class_images=7")
    captions = [row[1] for row in read_set(tmp_path / "cat")]
    before_the_cut = ["cat 6"] if ending == "tar" else []
    assert captions == ["cat 3", "cat 4", "cat 5", *before_the_cut, "cat 9", "cat 10", "cat 11"]
    assert process.returncode == (0 if ending == "tar" else 1) and "Traceback" not in process.stderr
    for shard in (0, 2):
        assert process.stdout.count(f"{folder}/0000{shard}.{ending}: ") == 1


@pytest.mark.parametrize("form", ["semicolons", "tabs", "windows"])
def test_metadata_of_spreadsheets(form, tmp_path, offline):
    """Other separators between columns, and Windows' between folders."""
    text = 'file_name,text\r\nmore/0.jpg,a cat\r\n1.jpg,"two; cats"\r\n'
    old, new = {"semicolons": (",", ";"), "tabs": (",", "\t"), "windows": ("/", "\\")}[form]
    text = text.replace(old, new)
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "more" / "0.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "data" / "1.jpg").write_bytes(picture_bytes(1))
    (tmp_path / "data" / "metadata.csv").write_text(text)
    assert retrieve("cat", tmp_path / "cat", 2, dataset=str(tmp_path / "data")) == 2
    assert [row[1] for row in read_set(tmp_path / "cat")] == ["a cat", "two; cats"]


def test_shards_of_img2dataset(tmp_path, offline):
    """A folder of shards: their pictures in their order, with the caption of the .txt or the .json.

    Of what lies beside them nothing is read. Pictures of different formats, and files of macOS, are no obstacle.
    """
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "data"
    (folder / ".hidden").mkdir(parents=True)
    captions = ["a cat", "a dog", "two cats", None, "Cat!", "the cat's toy"]
    for shard in (1, 0):
        with tarfile.open(folder / f"0000{shard}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                caption, kind = captions[number], "png" if number == 2 else "jpg"
                about = {"caption": caption, "url": f"https://example.com/{number}", "exif": "{}"}
                name = f"{shard}/0000{number}.x" if number == 5 else f"0000{number}"
                files = {f"._{name}.jpg": b"\0\5\x16\7"} if number == 0 else {}
                files[f"{name}.{kind}"] = picture_bytes(number, "PNG" if kind == "png" else "JPEG")
                files[f"{name}.json"] = json.dumps(about).encode()
                if caption and number != 4:
                    files[f"{name}.txt"] = caption.encode()
                add_to_tar(tar, files)
        (folder / f"0000{shard}_stats.json").write_text('{"count": 3, "successes": 3}')
        table = {"url": ["https://example.com/cat.jpg"], "caption": ["a cat"], "key": ["0"]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"0000{shard}.parquet")
    (folder / "._00000.tar").write_bytes(b"\0\5\x16\7")
    (folder / ".hidden" / "00002.tar").write_bytes(b"no shard")
    assert retrieve("cat", tmp_path / "cat", 4, dataset=str(folder)) == 4
    found = read_set(tmp_path / "cat")
    assert [row[1:3] for row in found] == [(captions[n], f"{folder}#{n}") for n in (0, 2, 4, 5)]
    for (file, *_), number in zip(found, (0, 2, 4, 5), strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(make_picture(number), int)).mean() < 6


def test_tables_of_img2dataset(tmp_path, offline):
    """Its other format: parquet files that have the pictures beside their urls."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    for shard in range(2):
        rows = [("https://example.com/", f"cat {shard}", picture_bytes(shard)), ("https://example.com/", "dog", None)]
        table = pyarrow.table(dict(zip(("url", "caption", "jpg"), map(list, zip(*rows, strict=True)), strict=True)))
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"0000{shard}.parquet")
        (tmp_path / "data" / f"0000{shard}_stats.json").write_text('{"count": 2}')
    assert retrieve("cat", tmp_path / "cat", 2, dataset=str(tmp_path / "data")) == 2
    assert [row[1] for row in read_set(tmp_path / "cat")] == ["cat 0", "cat 1"]


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_hidden_files_in_a_dataset(form, tmp_path, offline, capsys):
    """What macOS and others leave in a folder is no picture, no caption and no failed candidate."""
    folder = save_dataset(form, tmp_path / "data")
    (folder / ".thumbnails").mkdir()
    for place in (folder, folder / ".thumbnails"):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        for name in ("._0.jpg", "._metadata.jsonl", "._metadata.csv"):
            (place / name).write_bytes(b"\0\5\x16\7")
        (place / "._0.txt").write_text("a cat")
    for ending, content in (("jpg", picture_bytes(9)), ("txt", b"a cat")):
        (folder / ".thumbnails" / f"9.{ending}").write_bytes(content)
    assert retrieve("cat", tmp_path / "cat", 9, dataset=str(folder)) == 3
    assert "Skipped" not in capsys.readouterr().out and len(read_set(tmp_path / "cat")) == 3


def test_home(tmp_path):
    """Bash leaves the ~ of --flag=~/folder alone: the home folder is meant. From Python, too."""
    save_dataset("txt", tmp_path / "data")
    words = [sys.executable, SCRIPT, "--class_prompt=cat", "--class_data_dir=~/cat", "--dataset=~/data"]
    env = os.environ | {"HOME": str(tmp_path)}
    (tmp_path / "elsewhere").mkdir()
    process = run(*words, "--num_class_images=3", env=env, cwd=tmp_path / "elsewhere")
    assert process.returncode == 0, process.stderr
    assert len(read_set(tmp_path / "cat")) == 3 and not any((tmp_path / "elsewhere").iterdir())
    code = "from retrieve import retrieve; retrieve('cat', '~/other', 3, dataset='~/data')"
    python(code, env=env | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path / "elsewhere")
    assert len(read_set(tmp_path / "other")) == 3 and not any((tmp_path / "elsewhere").iterdir())


def test_unusable_datasets(tmp_path, monkeypatch):
    """One line that names the dataset and what is wrong; nothing is created."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    for name, line in {"foreign": '"Bild": "cat"}', "nameless": "}", "torn": '}\n"cat"'}.items():
        (tmp_path / name).mkdir()
        start = '{"text": "cat"' if name == "nameless" else '{"file_name": "0.jpg"'
        (tmp_path / name / "metadata.jsonl").write_text(start + ", " * (name == "foreign") + line)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "notes.csv").write_text("text\ncat\n")
    monkeypatch.chdir(tmp_path)
    expected = {
        "plain": "no captioned pictures: 1 without a caption (such as 0.jpg); give each a .txt file, or the folder",
        "phone": "no captioned pictures: 1 of a kind that is not read (such as IMG_1.HEIC); give",
        "foreign": "its columns are file_name, Bild, image; choose with --image_column and --caption_column",
        "nameless": "metadata.jsonl has a row without file_name",
        "torn": "line 2 of metadata.jsonl is no JSON object",
        "empty": "",
        "broken.parquet": "Parquet",
        "notes.csv": "give a .parquet or a webdataset .tar file, or a folder",
        "no/such/folder": "no/such/folder",
        "somebody/something": "somebody/something",
    }
    for name, problem in expected.items():
        with pytest.raises(RetrieveError) as error:
            retrieve("cat", tmp_path / "out" / "cat", 2, dataset=name)
        assert str(error.value).startswith(f"--dataset {name}: ") and problem in str(error.value)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# Pictures


def test_conversion(web, local, tmp_path):
    """EXIF orientation, transparency on white, palette, grey, 16 bits, CMYK; no metadata is left."""
    base = make_picture(1, 90, 70)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(base.size))
    grey = np.asarray(base.convert("L"), np.uint16) * 257
    saved = {
        "exif.jpg": (base, {"exif": exif, "comment": b"secret", "icc_profile": b"secret profile", "quality": 95}),
        "unwritable.jpg": (make_picture(4, 90, 70), {"exif": unwritable_exif(), "quality": 95}),
        "alpha.png": (alpha, {}),
        "palette.png": (base.quantize(64), {}),
        "transparent.gif": (base.quantize(64), {"transparency": 0}),
        "grey.png": (make_picture(2, 90, 70).convert("L"), {}),
        "sixteen.png": (Image.fromarray(grey), {}),
        "cmyk.jpg": (base.convert("CMYK"), {"quality": 95}),
        "lossless.webp": (base, {"lossless": True}),
    }
    for name, (image, options) in saved.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[f".{name.split('.')[1]}"], **options)
        web.routes[f"/{name}"] = buffer.getvalue()
    web.add_backend([web.url(f"/{name}") for name in saved])
    assert retrieve("cat", tmp_path / "cat", len(saved), source="clip-retrieval", **local) == len(saved)

    from train_custom_diffusion import load_picture

    for (file, *_), name in zip(read_set(tmp_path / "cat"), saved, strict=True):
        (tmp_path / name).write_bytes(web.routes[f"/{name}"])
        expected, _ = load_picture(tmp_path / name)  # the trainer's own reading
        image = Image.open(file)
        assert image.size == expected.size == ((70, 90) if name in ("exif.jpg", "unwritable.jpg") else (90, 70))
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3, name
        with Image.open(tmp_path / name) as original:
            assert np.abs(np.asarray(to_rgb(original), int) - np.asarray(expected, int)).max() <= 1, name
        content = file.read_bytes()
        assert not image.getexif() and b"secret" not in content and b"Maker" not in content


def test_colour_profiles(web, local, tmp_path):
    """Display P3, which phones write, becomes sRGB, also in a JPEG that is plain otherwise; no profile is kept."""
    image, sizes = Image.new("RGB", (80, 80), (230, 60, 50)), itertools.count(80)
    saved, p3 = {}, display_p3()
    wide, plain = (250, 31, 34), (230, 60, 50)
    for name, mode, profile, expected in (
        ("p3.jpg", "RGB", p3, wide), ("p3.png", "RGB", p3, wide), ("p3.tif", "RGB", p3, wide),
        ("p3.webp", "RGB", p3, wide), ("palette.png", "P", p3, wide), ("alpha.png", "RGBA", p3, wide),
        ("none.jpg", "RGB", None, plain), ("broken.png", "RGB", b"no profile", plain),
        ("cut.jpg", "RGB", p3[:200], plain), ("grey.png", "L", p3, (110, 110, 110)),
    ):  # fmt: skip
        buffer, options = (
            io.BytesIO(),
            {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {"lossless": True},
        )
        picture = Image.new("L", (80, 80), 110) if mode == "L" else image.convert(mode, palette=Image.Palette.ADAPTIVE)
        picture = picture.resize((next(sizes), 80))  # otherwise some would be duplicates
        picture.save(buffer, Image.registered_extensions()[f".{name.split('.')[1]}"], icc_profile=profile, **options)
        kind = {"Content-Type": f"image/{name.split('.')[1]}"}
        web.routes[f"/{name}"], saved[name] = (200, kind, buffer.getvalue()), expected
    web.add_backend([web.url(f"/{name}") for name in saved])
    process = command(tmp_path / "cat", *flags(source="clip-retrieval", num_class_images=len(saved), **local))
    assert process.returncode == 0, process.stderr
    for (file, *_), (name, expected) in zip(read_set(tmp_path / "cat"), saved.items(), strict=True):
        with Image.open(file) as result:
            assert "icc_profile" not in result.info
            assert np.abs(np.asarray(result, int) - expected).max() <= 3, name


def test_floating_point_pictures():
    """Values of 0 to 1, as the trainer reads them; larger ones are white."""
    for value, expected in ((0.0, 0), (0.5, 128), (1.0, 255), (7.0, 255)):
        (found,) = {*np.asarray(to_rgb(Image.new("F", (8, 8), value)), int).flatten()}
        assert abs(found - expected) <= 1, value


# The command line


def test_help_and_argument_errors_are_quick(tmp_path):
    """Before anything heavy is imported; argument errors are one line with exit status 2."""
    heavy = {"torch", "datasets", "pandas", "pyarrow", "numpy", "requests"}
    for words, status in ((["--help"], 0), (["--num_class_images=0"], 2)):
        process = run(sys.executable, "-X", "importtime", SCRIPT, "--class_prompt=cat", "--class_data_dir=x", *words)
        assert process.returncode == status
        assert not heavy & {line.rpartition("|")[2].strip().split(".")[0] for line in process.stderr.splitlines()}


WRONG = {
    "--num_class_images=many": "--num_class_images",
    "--num_class_images=0": "give 1 or more",
    "--num_workers=0": "give 1 or more",
    "--retries=-1": "give 0 or more",
    "--timeout=0": "give 0.1 or more",
    "--timeout=inf": "out of range",
    "--connect_timeout=nan": "give 0.1 or more",
    "--source=laion": "invalid choice",
    "--source=dataset": "contradict each other",
    "--source=openverse --dataset=x": "contradict each other",
    "--class_prompt=": "is empty",
    "--images=3": "unrecognized",
}


def test_wrong_arguments(tmp_path, capsys):
    for words, problem in WRONG.items():
        with pytest.raises(SystemExit) as end:
            parse_args(["--class_prompt=cat", f"--class_data_dir={tmp_path / 'cat'}", *words.split()])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and problem in line
    with pytest.raises(ValueError, match="contradict each other"):
        retrieve("cat", tmp_path / "cat", 1, dataset="x", source="openverse")
    with pytest.raises(RetrieveError, match=r"not an http\(s\) URL"):
        retrieve("cat", tmp_path / "cat", 1, backend_url="ftp://x", source="clip-retrieval")
    with pytest.raises(TypeError):
        retrieve("cat", tmp_path / "cat", 1, num_wrokers=1)
    assert os.listdir(tmp_path) == []


def test_folders_that_can_not_be_used(tmp_path):
    """A file, and sets that do not agree with themselves: one line, and nothing is changed."""
    (tmp_path / "file").write_text("")
    (tmp_path / "torn").mkdir()
    for name, lines in (("images.txt", 2), ("caption.txt", 3), ("urls.txt", 2)):
        (tmp_path / "torn" / name).write_text("x\n" * lines)
    (tmp_path / "lost").mkdir()
    for name in ("images.txt", "caption.txt", "urls.txt"):
        (tmp_path / "lost" / name).write_text("images/0.jpg\n")
    expected = {"file": "Not a directory", "torn": "do not agree", "lost": "images/0.jpg is missing"}
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")}
    for name, problem in expected.items():
        with pytest.raises(RetrieveError, match=problem):
            retrieve("cat", tmp_path / name, 3, dataset=str(CATS))
    assert {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")} == before
    process = command(tmp_path / "file", "--dataset", CATS)
    assert process.returncode == 1 and process.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr


def test_growing_among_other_files(tmp_path, monkeypatch):
    """More pictures: the first ones stay as they are. Other files stay, too, also one that has a picture's name."""
    folder = tmp_path / "cat"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("mine")
    assert retrieve("cat", ".", 20, dataset=str(CATS)) == 20
    others = {folder / "notes.txt": b"mine", folder / "images" / "21.jpg": picture_bytes(0)}
    others |= {place / ".DS_Store": b"\0\0\0\1Bud1" for place in (folder, folder / "images")}
    for file, content in others.items():
        file.write_bytes(content)
    lists = {name: (folder / name).read_bytes() for name in ("images.txt", "caption.txt", "urls.txt", "metadata.jsonl")}
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in lists]
    before = [(file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert retrieve("cat", ".", 30, dataset=str(CATS)) == 30
    assert [(file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    assert len(files) == 20 + len(others) and others.keys() <= set(files)
    for name, content in lists.items():
        assert (folder / name).read_bytes().startswith(content)
    numbers = [number for number in range(31) if number != 21]
    assert (folder / "images.txt").read_text().splitlines() == [f"images/{number}.jpg" for number in numbers]


def test_hidden_files_in_class_data_dir(tmp_path):
    """.DS_Store and the ._ files of macOS, there from the start or added later, change nothing."""
    folder = tmp_path / "cat"
    (folder / "images").mkdir(parents=True)
    hidden = [
        place / name for place in (folder, folder / "images") for name in (".DS_Store", "._0.jpg", "._images.txt")
    ]
    for file in hidden[:3]:
        file.write_bytes(b"\0\5\x16\7")
    for count in (2, 4):
        process = command(folder, "--dataset", CATS, f"--num_class_images={count}")
        assert process.returncode == 0, process.stderr
        for file in hidden:
            file.write_bytes(b"\0\5\x16\7")
        if count == 2:
            shutil.copytree(folder / "images", folder / ".unfinished")  # the Finder looks there, too
    for file in hidden:
        file.unlink()
    assert len(read_set(folder)) == 4


def test_folder_of_the_guides_own_script(web, local, tmp_path, monkeypatch):
    """It wrote paths relative to the working folder and no metadata: such a set is taken up and added to."""
    folder = tmp_path / "reg" / "cat"
    (folder / "images").mkdir(parents=True)
    for number in range(2):
        (folder / "images" / f"{number}.jpg").write_bytes(picture_bytes(number))
    (folder / "images.txt").write_text("reg/cat/images/0.jpg\nreg/cat/images/1.jpg\n")
    (folder / "caption.txt").write_text("one\ntwo\n")
    (folder / "urls.txt").write_text("http://one/\nhttp://two/\n")
    monkeypatch.chdir(tmp_path)
    assert retrieve("cat", "reg/cat", 2) == 2
    web.add_backend(web.add_pictures(4), ["again", "again", "three", "four"])
    assert retrieve("cat", "reg/cat", 4, source="clip-retrieval", **local) == 4
    assert [row[1] for row in read_set(folder)] == ["one", "two", "three", "four"]


def test_folder_of_an_earlier_version(tmp_path, offline):
    """It kept metadata.jsonl in images/: the folder can still be complete, be added to, and be a dataset."""
    folder = tmp_path / "cat"
    retrieve("cat", folder, 3, dataset=str(CATS))
    expected = read_set(folder)
    rows = [row | {"file_name": row["file_name"].removeprefix("images/")} for *_, row in expected]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metadata.jsonl").unlink()
    pictures = [file.read_bytes() for file, *_ in expected]
    retrieve("cat", tmp_path / "copy", 3, dataset=str(folder))
    assert [row[0].read_bytes() for row in read_set(tmp_path / "copy")] == pictures
    before = {file: file.stat() for file in folder.rglob("*")}
    assert retrieve("cat", folder, 3) == 3 and {file: file.stat() for file in folder.rglob("*")} == before
    assert retrieve("cat", folder, 4, dataset=str(CATS)) == 4
    found = read_set(folder)  # in today's layout
    assert [row for *_, row in found[:3]] == [row for *_, row in expected]
    assert [file.read_bytes() for file, *_ in found[:3]] == pictures


# The run


def test_order_does_not_depend_on_timing(web, local, tmp_path):
    """The first urls are the slowest, and a duplicate comes before its original: one result, however many workers."""
    urls = web.add_pictures(20)
    web.routes["/2.jpg"] = web.routes["/9.jpg"]
    routes = dict(web.routes)

    def delayed(number):
        def answer(handler):
            time.sleep((20 - number) * 0.01)
            handler.answer(routes[f"/{number}.jpg"])

        return answer

    web.routes |= {f"/{number}.jpg": delayed(number) for number in range(20)}
    web.add_backend(urls)
    results = []
    for workers in (1, 16):
        folder = tmp_path / str(workers)
        retrieve("cat", folder, 15, source="clip-retrieval", num_workers=workers, **local)
        results.append([(file.read_bytes(), caption, url) for file, caption, url, _ in read_set(folder)])
    assert results[0] == results[1]
    assert [url for *_, url in results[0]] == urls[:9] + urls[10:16]
    assert web.asked.total() - web.asked["/knn-service"] == 2 * 16  # none in vain


def test_duplicates_are_found_in_an_existing_folder(web, local, tmp_path):
    """Also a PNG again, though the folder holds it as a JPEG, whose pixels differ."""
    web.add_pictures(1)
    for name in ("a", "b"):
        web.routes[f"/{name}.png"] = (200, {"Content-Type": "image/png"}, picture_bytes(1, "PNG"))
    web.add_backend([web.url("/a.png")])
    retrieve("cat", tmp_path / "cat", 1, source="clip-retrieval", **local)
    web.add_backend([web.url("/b.png"), web.url("/0.jpg")])
    assert retrieve("cat", tmp_path / "cat", 3, source="clip-retrieval", **local) == 2
    assert [row[2] for row in read_set(tmp_path / "cat")] == [web.url("/a.png"), web.url("/0.jpg")]


def test_traceback_of_the_cause(web, local, tmp_path):
    """CUSTOM_DIFFUSION_TRACEBACK shows what is behind the one line, and behind a failed candidate."""
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    web.routes["/0.jpg"] = (200, {}, b"no picture")
    web.add_backend([web.url("/0.jpg")])
    cases = {"pyarrow.lib.ArrowInvalid": {"dataset": tmp_path / "broken.parquet"}, "PIL.UnidentifiedImageError": local}
    for cause, options in cases.items():
        process = command(tmp_path / "cat", *flags(**options))
        assert process.returncode == 1 and "Traceback" not in process.stderr
        env = os.environ | {"CUSTOM_DIFFUSION_TRACEBACK": "1"}
        last = process.stderr.splitlines()[-1]
        process = command(tmp_path / "cat", *flags(**options), env=env)
        assert process.returncode == 1 and cause in process.stderr and process.stderr.splitlines()[-1] == last


# The trainer


def test_trainer_takes_what_each_source_leaves(web, local, sd1, world, tmp_path):
    """Three concepts, each with class pictures from another source, in one run of two steps."""
    urls = web.add_pictures(6)
    web.add_backend(urls[:3])
    web.add_openverse([openverse_entry(url, i) for i, url in enumerate(urls[3:])])
    retrieve("cat", tmp_path / "clip-retrieval", 3, source="clip-retrieval", **local)
    retrieve("cat", tmp_path / "openverse", 3, source="openverse", **local)
    retrieve("cat", tmp_path / "dataset", 3, dataset=str(CATS))
    concept = {"instance_prompt": "a <new1> cat", "class_prompt": "cat", "instance_data_dir": str(world / "my_cat")}
    sources = ("clip-retrieval", "openverse", "dataset")
    concepts = [concept | {"class_data_dir": str(tmp_path / source)} for source in sources]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    values = {"pretrained_model_name_or_path": sd1, "concepts_list": tmp_path / "concepts.json"}
    values |= {"with_prior_preservation": True, "real_prior": True, "modifier_token": "<new1>", "num_class_images": 3}
    folder = train(tmp_path / "out", **values)
    assert (folder / "stdout.txt").read_text().count("3 class pictures") == 3


def test_trainer_names_the_command_that_works(web, local, world, tmp_path):
    """Without pictures the trainer's error ends in a retrieve.py command; it makes the folder that was missing."""
    from train_custom_diffusion import parse_args, read_concepts

    values = {"pretrained_model_name_or_path": "m", "instance_data_dir": world / "my_cat", "class_prompt": "cat"}
    values |= {"instance_prompt": "a cat", "class_data_dir": tmp_path / "real reg" / "cat", "num_class_images": 4}
    args = parse_args(flags(**values, with_prior_preservation=True, real_prior=True))
    with pytest.raises(SystemExit) as error:
        read_concepts(args)
    words = shlex.split(str(error.value).split("run: python retrieve.py ")[1])
    web.add_backend(web.add_pictures(6))
    process = run(sys.executable, SCRIPT, *words, *flags(**local))
    assert process.returncode == 0, process.stderr
    (concept,) = read_concepts(args)
    assert [caption for _, caption in concept.class_samples] == [f"a cat, number {number}" for number in range(4)]


def test_from_python(tmp_path):
    """As in a notebook: returns how many pictures are there."""
    code = "import sys; from retrieve import retrieve; print('COUNT', retrieve('cat', sys.argv[1], 5, dataset=%r))"
    assert "COUNT 5" in python(code % str(CATS), tmp_path / "cat").stdout
    assert len(read_set(tmp_path / "cat")) == 5
