#!/usr/bin/env python3
"""Measures how much faster retrieve.py fetches side by side than one picture after another.

    python benchmarks/retrieve_speed.py [--repeats 3] [--num_images 200]

The pictures come from a server on loopback, a process of its own, that answers each request 100 ms after it came. Runs
with 16 workers, the default, and with one take turns. A run is the whole command, from the start of Python to the
complete folder.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe, Process
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE, DELAY = 256, 0.1  # in pixels, in seconds


def picture(number):
    """JPEG file of a soft random picture."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(DELAY)
        self.answer(self.server.pictures[int(self.path.strip("/").removesuffix(".jpg"))], "image/jpeg")

    def do_POST(self):
        """The clip-retrieval backend."""
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(DELAY)
        urls = [f"http://{self.headers['Host']}/{number}.jpg" for number in range(len(self.server.pictures))]
        entries = [{"id": number, "url": url, "caption": f"cat {number}"} for number, url in enumerate(urls)]
        self.answer(json.dumps(entries).encode(), "application/json")

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        """No line for each request."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def serve(pipe, num_images):
    """Serves so many pictures for ever; sends its port."""
    server = Server(("127.0.0.1", 0), Handler)
    server.pictures = [picture(number) for number in range(num_images)]
    pipe.send(server.server_port)
    server.serve_forever()


def seconds(port, num_images, num_workers):
    """How long a run takes; checks that it brought every picture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "retrieve.py", "--class_prompt", "cat", "--class_data_dir", f"{folder}/cat"]
        command += ["--num_class_images", str(num_images), "--num_workers", str(num_workers)]
        command += ["--source", "clip-retrieval", "--backend_url", f"http://127.0.0.1:{port}/", "--allow_private_hosts"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        duration = time.perf_counter() - start
        assert len(list(Path(folder, "cat", "images").glob("*.jpg"))) == num_images
    return duration


def main():
    """Runs both, in turns, and prints medians with the smallest and largest."""
    parser = argparse.ArgumentParser(description="Measure how fast retrieve.py fetches.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--num_images", type=int, default=200, help="pictures a run")
    args = parser.parse_args()
    here, there = Pipe()
    server = Process(target=serve, args=(there, args.num_images), daemon=True)
    server.start()
    port = here.recv()
    seconds(port, args.num_images, 16)  # warms the file cache
    times = {1: [], 16: []}
    for _ in range(args.repeats):
        for num_workers, measured in times.items():
            measured.append(seconds(port, args.num_images, num_workers))
    for num_workers, measured in times.items():
        spread = f"{min(measured):.2f}-{max(measured):.2f}"
        print(f"--num_workers {num_workers}: {statistics.median(measured):.2f} s ({spread})")
    print(f"{statistics.median(times[1]) / statistics.median(times[16]):.1f} times as fast")


if __name__ == "__main__":
    main()
