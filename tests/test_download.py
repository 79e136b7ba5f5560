"""Downloads from a loopback server that misbehaves in every way seen in the wild."""

import gc
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TOY_ARCHIVES, TOY_FILES, TOY_TRAIN
from torchvision.datasets import MNIST

from mnist_helpers import data
from mnist_helpers.data import DataMissingError, load_digits, load_mnist

# torchvision leaves the sockets of failed requests to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

PORTAL = b"<html><body>Please log in to this network first.</body></html>"


class Misbehaving(BaseHTTPRequestHandler):
    """`GET /<kind>/<file>` answers in the way that `kind` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        _, kind, name = self.path.split("/")
        content = TOY_ARCHIVES[name]
        if kind.isdigit():
            self.answer(b"no", int(kind))
        elif kind == "portal":
            self.answer(PORTAL)
        elif kind == "empty":
            self.answer(b"")
        elif kind == "cut":
            self.answer(content[: len(content) // 2], promised=len(content))
        elif kind == "cut-chunks":
            self.answer(b"ffff\r\n" + content[:9], promised=None)
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "garbage":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        elif kind == "stall":
            self.server.released.wait(30)
        elif kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "last-one-missing" and name.startswith("t10k-labels"):
            self.answer(b"gone", 404)
        else:
            self.answer(content)
        self.close_connection = True

    def answer(self, body: bytes, status: int = 200, promised: int | None = -1):
        self.send_response(status)
        if promised is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) if promised < 0 else promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    released: threading.Event

    def handle_error(self, *args):
        """A client that hangs up in the middle is part of the tests."""


@contextmanager
def serving(certificate=None):
    server = Server(("127.0.0.1", 0), Misbehaving)
    server.released = threading.Event()
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def port():
    with serving() as number:
        yield number


@pytest.fixture
def folder(toy_mnist, monkeypatch):
    """A root without any MNIST file, downloads straight from the loopback, and little patience."""
    for name in TOY_FILES:
        (toy_mnist / name).unlink()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    yield toy_mnist.parents[1]
    gc.collect()  # here, where the warnings of unclosed sockets are expected


FAILURES = {
    "403": "403",
    "404": "404",
    "503": "503",
    "portal": "corrupted",
    "empty": "corrupted",
    "cut": "corrupted|IncompleteRead",
    "cut-chunks": "IncompleteRead",
    "reset": "reset|closed",
    "garbage": "this is not HTTP",
    "stall": "timed out",
    "loop": "redirect",
    "last-one-missing": "404",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_download(port, folder, monkeypatch, kind):
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/{kind}/"])
    check_failure(folder, FAILURES[kind])

    # Nothing of it stays behind, so that the next load starts anew instead of finding damaged files.
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert load_digits(folder)[0].name == "offline digits"
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/good/"])
    assert load_digits(folder)[0].name == "MNIST"


def check_failure(folder, cause: str) -> None:
    """One short message: cause, folder, the four files with their sizes, where to get them."""
    with pytest.raises(DataMissingError) as caught:
        load_mnist(folder)
    message = str(caught.value)
    assert re.search(cause, message, re.IGNORECASE)
    assert str(folder / "MNIST" / "raw") in message
    assert MNIST.mirrors[0] in message
    for name, content in TOY_FILES.items():
        assert f"{name}.gz or {name} ({len(content):,} bytes)" in message
    assert len(message.splitlines()) == 6
    assert not re.search("verify *= *False|unverified|insecure|Traceback", message)
    assert (
        caught.value.__context__ is None or caught.value.__suppress_context__
    )  # no page of chained tracebacks


def test_nobody_answers(folder, monkeypatch):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{unused.getsockname()[1]}/"])
        check_failure(folder, "refused|timed out")


def test_every_mirror_and_its_failure_is_named(port, folder, monkeypatch):
    mirrors = [f"http://127.0.0.1:{port}/{kind}/" for kind in ("403", "503")]
    monkeypatch.setattr(MNIST, "mirrors", mirrors)
    check_failure(folder, f"{mirrors[0]}.*403.*{mirrors[1]}.*503")


def test_a_second_mirror_helps_out(port, folder, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/{kind}/" for kind in ("503", "good")])
    assert load_digits(folder)[0].name == "MNIST"


def test_no_encryption_where_it_was_wanted(port, folder, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"https://127.0.0.1:{port}/good/"])
    check_failure(folder, "SSL")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_trusts(folder, tmp_path_factory, monkeypatch):
    certificate = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {0} -out {0}.crt"
    subprocess.run(command.format(certificate).split(), check=True, capture_output=True)
    with certificate.open("a") as file:
        file.write(certificate.with_name("both.pem.crt").read_text())
    with serving(certificate) as port:
        monkeypatch.setattr(MNIST, "mirrors", [f"https://127.0.0.1:{port}/good/"])
        check_failure(folder, "CERTIFICATE_VERIFY_FAILED")


def test_download_that_succeeds(port, folder, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/good/"])
    train, _ = load_mnist(folder)
    assert torch.equal(train.images, TOY_TRAIN.images)
    monkeypatch.setattr(MNIST, "mirrors", [])  # the second time needs no server
    assert torch.equal(load_mnist(folder)[0].images, TOY_TRAIN.images)
    assert [path.name for path in folder.iterdir()] == ["MNIST"]  # the unfinished folder is gone


def test_download_stopped_by_the_user_leaves_nothing(port, folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/good/"])
    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", stop)
        with pytest.raises(KeyboardInterrupt):
            load_mnist(folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert load_digits(folder)[0].name == "MNIST"


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataMissingError, match=r"Not a directory|exists"):
        load_mnist(tmp_path / "file")


def test_impatience_ends_with_the_download(port, folder, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/503/"])
    socket.setdefaulttimeout(None)
    with pytest.raises(DataMissingError):
        load_mnist(folder)
    assert socket.getdefaulttimeout() is None


def test_tests_cannot_reach_the_network():
    """The guard in conftest.py works, so that a passing suite proves that nothing needs the network."""
    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 80),
    ):
        with pytest.raises(pytest.fail.Exception, match="tests use no network"):
            reach()
