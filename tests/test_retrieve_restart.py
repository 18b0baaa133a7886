"""retrieve.py killed at any moment and started again: nothing torn is ever seen, and nothing is fetched twice."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from subprocess import PIPE

import pytest
from launching import flags, run
from web import SCRIPT, command, picture_bytes, read_set

from retrieve import RetrieveError, retrieve

# For each line "n folder count": runs retrieve in a child that kills itself at its n-th operation on the hidden folder,
# or rename, if it gets that far; answers the child's exit status. Forking saves the imports.
KILLED = """
import os, signal, sys
from retrieve import retrieve
os.fsync = lambda _: None

def kill_at(n):
    def hook(event, args):
        nonlocal n
        if event in ("open", "os.mkdir", "os.link", "os.truncate", "os.remove", "os.rmdir", "shutil.rmtree"):
            n -= ".cat." in str(args)
        n -= event == "os.rename"
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
        retrieve("cat", folder, int(count), dataset=sys.argv[1], num_workers=2)
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
    """Pictures, captions and urls of a folder; None if it is not there. Fails unless they agree."""
    if folder.exists():
        return [(file.read_bytes(), caption, url) for file, caption, url, _ in read_set(folder)]


@pytest.mark.parametrize("before", [0, 2])
def test_killed_at_every_operation(before, dataset, tmp_path, monkeypatch):
    """Killed at its first, second, … operation on files, from nothing or from a smaller set.

    Each time the folder is what it was, or not there, or complete; and the next run ends as if nothing had been.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes time, and a kill does not need it
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
            status, found = int(process.stdout.readline()), contents(folder)
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
    assert operation > 20 and states[3] >= 1
    assert states["none"] == 1 and states[before] >= 10 if before else states["none"] >= 10


def test_journal_cut_off(dataset, tmp_path):
    """A last line that a full disk or a lost machine cut off does not count; what is before it does."""
    expected, folder = tmp_path / "expected", tmp_path / "x" / "cat"
    retrieve("cat", expected, 5, dataset=str(dataset))
    process = run(sys.executable, "-c", KILLED, dataset, input=f"20 {folder} 5\n", env=environment())
    assert process.stdout == "-9\n"
    unfinished = folder.parent / ".cat.unfinished"
    journal = (unfinished / "journal.jsonl").read_bytes()
    assert journal.count(b"\n") >= 4
    shutil.copytree(folder.parent, tmp_path / "saved")
    for length in range(0, len(journal), 97):
        shutil.rmtree(folder.parent)
        shutil.copytree(tmp_path / "saved", folder.parent)
        (unfinished / "journal.jsonl").write_bytes(journal[:length])
        assert retrieve("cat", folder, 5, dataset=str(dataset)) == 5
        assert contents(folder) == contents(expected) and os.listdir(folder.parent) == ["cat"]
    shutil.rmtree(folder.parent)
    shutil.copytree(tmp_path / "saved", folder.parent)
    (unfinished / "journal.jsonl").write_bytes(b"no journal\n" + journal)
    with pytest.raises(RetrieveError, match="damaged"):
        retrieve("cat", folder, 5, dataset=str(dataset))


class Reader(threading.Thread):
    """Reads a folder all the time, as slowly as it takes; `seen` counts the sizes of the sets that it found.

    A folder is replaced as a whole, so one that is held open never changes; it may be deleted when it was replaced.
    """

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.seen, self.errors, self.stopped = folder, Counter(), [], threading.Event()

    def run(self):
        while not self.stopped.wait(0.001):
            try:
                held = os.open(self.folder, os.O_DIRECTORY)
            except FileNotFoundError:
                self.seen[None] += 1
                continue
            try:
                self.seen[self.read(held)] += 1
            except Exception as error:
                if self.folder.exists() and os.path.samestat(os.fstat(held), os.stat(self.folder)):
                    self.errors.append(repr(error))
            finally:
                os.close(held)

    def read(self, held):
        def lines(name):
            with open(os.open(name, os.O_RDONLY, dir_fd=held), encoding="utf-8") as file:
                return file.read().splitlines()

        names, captions, urls = lines("images.txt"), lines("caption.txt"), lines("urls.txt")
        rows = [json.loads(line) for line in lines("images/metadata.jsonl")]
        images = os.open("images", os.O_DIRECTORY, dir_fd=held)
        files = set(os.listdir(images))
        os.close(images)
        assert files == {f"{number}.jpg" for number in range(len(names))} | {"metadata.jsonl"}
        assert names == [f"images/{number}.jpg" for number in range(len(names))]
        assert [(row["file_name"], row["text"], row["url"]) for row in rows] == [
            (name.removeprefix("images/"), caption, url)
            for name, caption, url in zip(names, captions, urls, strict=True)
        ]
        for name in names:
            with open(os.open(name, os.O_RDONLY, dir_fd=held), "rb") as file:
                content = file.read()
            assert content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")
        return len(names)


def environment():
    return os.environ | {"PYTHONPATH": str(SCRIPT.parent)}


def test_killed_at_random_and_started_again(web, local, tmp_path):
    """Forty pictures, then sixty; one url in four is dead. The server kills the run after some answers."""
    chance, folder = random.Random(0), tmp_path / "reg" / "cat"
    urls = web.add_pictures(60)
    urls = [url for number, url in enumerate(urls) for url in (url, *[web.url(f"/dead/{number}")] * (number % 3 == 0))]
    queries = web.add_backend(urls)
    runs, asked = [], []  # processes; (path, number of the run)
    kill_at = [0]

    def watched(route):
        def answer(handler):
            asked.append((handler.path, len(runs)))
            time.sleep(chance.random() * 0.02)
            if isinstance(route, bytes):
                handler.answer(route)
            else:
                handler.answer(b"", 404)
            if len(asked) >= kill_at[0]:
                runs[-1].kill()

        return answer

    for url in urls:
        path = url.removeprefix(web.url())
        web.routes[path] = watched(web.routes.get(path))
    reader = Reader(folder)
    reader.start()
    known, kills = {}, 0  # url -> number of the run that had journaled it
    for count in (40, 60):
        options = local | {"num_class_images": count, "num_workers": 6, "source": "clip-retrieval"}
        words = ["--class_prompt", "cat", "--class_data_dir", folder, *flags(**options)]
        while True:
            kill_at[0] = len(asked) + chance.randint(1, 20)
            runs.append(subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], stderr=subprocess.DEVNULL))
            if runs[-1].wait(60) == 0:
                break
            assert runs[-1].returncode == -signal.SIGKILL
            kills += 1
            assert kills < 60, "no run gets further than the one before"
            journal = folder.parent / ".cat.unfinished" / "journal.jsonl"
            lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
            for entry in (json.loads(line) for line in lines if line.endswith(b"\n")):
                if "outcome" in entry:
                    known.setdefault(entry["outcome"]["key"], len(runs))
        assert len(contents(folder)) == count and os.listdir(folder.parent) == ["cat"]
        known = {url: number for url, number in known.items() if "dead" not in url}
        known |= {url: known.get(url, len(runs)) for _, _, url in contents(folder)}
    reader.stopped.set()
    reader.join(20)
    assert reader.errors == [] and set(reader.seen) <= {None, 40, 60} and reader.seen[None] and reader.seen[40]
    assert [url for _, _, url in contents(folder)] == web_urls(web, 60)
    assert kills >= 5
    for path, number in asked:
        assert number <= known.get(web.url(path), len(runs)), f"{path} was fetched again"
    pictures = Counter(path for path, _ in asked if "dead" not in path)
    assert pictures.total() <= 60 + kills * 6  # at most what was on its way when the run was killed
    assert len(queries) <= 2 + kills


def web_urls(web, count):
    return [web.url(f"/{number}.jpg") for number in range(count)]


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
    assert "Traceback" not in errors and not folder.exists()
    silent.set()
    web.routes["/8.jpg"] = route
    assert run(sys.executable, SCRIPT, *words).returncode == 0
    assert [url for *_, url in contents(folder)] == urls
    assert web.asked == Counter({f"/{n}.jpg": 1 for n in range(12)} | {"/8.jpg": 2, "/knn-service": 1})


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
        results.append(contents(folder))
    assert results[0] == results[1]
    assert [url for *_, url in results[0]] == urls[:9] + urls[10:16]


def test_two_runs_at_once(web, local, tmp_path):
    """The second one says so and leaves the first one alone."""
    urls, go_on = web.add_pictures(3), threading.Event()
    web.add_backend(urls)
    picture = web.routes["/1.jpg"]

    def wait_here(handler):
        go_on.wait(30)
        handler.answer(picture)

    web.routes["/1.jpg"] = wait_here
    options = {"source": "clip-retrieval", **local}
    first = threading.Thread(target=retrieve, args=("cat", tmp_path / "cat", 3), kwargs=options)
    first.start()
    while not web.asked["/1.jpg"]:
        time.sleep(0.01)
    process = command(tmp_path / "cat", *flags(num_class_images=3, **options))
    assert process.returncode == 1 and "another run is at work there" in process.stderr
    go_on.set()
    first.join(30)
    assert [url for *_, url in contents(tmp_path / "cat")] == urls and max(web.asked.values()) == 1


def test_other_arguments_start_anew(web, local, dataset, tmp_path, capsys):
    """What was fetched for another class or from another source is not mixed in."""
    folder = tmp_path / "x" / "cat"
    run(sys.executable, "-c", KILLED, dataset, input=f"20 {folder} 5\n", env=environment())
    assert (folder.parent / ".cat.unfinished").exists() and not folder.exists()
    urls = web.add_pictures(23, start=20)[:3]
    web.add_backend(urls)
    assert retrieve("cat", folder, 3, source="clip-retrieval", **local) == 3
    assert "other arguments: starting anew" in capsys.readouterr().out
    assert [url for *_, url in contents(folder)] == urls and os.listdir(folder.parent) == ["cat"]


def test_full_disk(dataset, tmp_path):
    """One line, exit status 1; with room again the run goes on."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", code, SCRIPT, "--class_prompt", "cat", "--class_data_dir", tmp_path / "x" / "cat"]
    words += ["--dataset", dataset, "--num_class_images", "5"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    process = run(*words, preexec_fn=limit)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.strip().splitlines()[-1].endswith("File too large; see to it and start again")
    assert not (tmp_path / "x" / "cat").exists()
    assert run(*words).returncode == 0 and len(contents(tmp_path / "x" / "cat")) == 5
