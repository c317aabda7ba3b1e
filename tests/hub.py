"""A stand-in for the hub on a local port, and tiny models under the published files' names.

It answers what `huggingface_hub` asks about large files: HEAD and GET of `/REPO/resolve/REV/FILE` with
a redirect to a storage host, ETag, commit, ranges; and it can fail in the ways that a hub fails in.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from dd_core import plan
from dd_core.hub.registry import find_spec
from dd_core.hub.spec import ModelSpec, PartName
from dd_core.manifest import PresetEntry
from dd_core.models.build import new_student, new_teacher, new_tokenizer
from dd_core.models.config import LlamaGenConfig, MultiScaleConfig, VARConfig, VQConfig
from tests.tiny import CLASSES
from tests.upstream import nested, reference_state

COMMIT = "c0ffee" * 6 + "cafe"


@dataclass
class FakeHub:
    """Files of repositories, what was asked for, and what is to go wrong."""

    files: dict[str, bytes | memoryview] = field(default_factory=dict)  # "owner/name/file" → content
    asked: Counter[str] = field(default_factory=Counter)  # "GET owner/name/file" → times
    ranges: list[str] = field(default_factory=list)
    sent: int = 0
    cut_after: list[int] = field(default_factory=list)  # bytes after which a GET breaks off, one a GET
    damage: bool = False  # one bit of every body is flipped
    status: dict[str, int] = field(default_factory=dict)  # "owner/name/file" → refusal
    token: str | None = None
    url: str = ""
    _hashes: dict[str, tuple[object, str]] = field(default_factory=dict)

    def add(self, repo: str, file: str, content: bytes) -> None:
        self.files[f"{repo}/{file}"] = content

    def sha256(self, key: str) -> str:
        """Of a file; computed once, and anew when the file is replaced."""
        content = self.files[key]
        if key not in self._hashes or self._hashes[key][0] is not content:
            self._hashes[key] = content, hashlib.sha256(content).hexdigest()
        return self._hashes[key][1]

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if asked is not None:
            self._resolve(asked[1], asked[2], asked[3])
        elif self.path.startswith("/cdn/"):
            self._send(self.path.removeprefix("/cdn/"))
        else:
            self._refuse(404)

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        hub, key = self.state, f"{repo}/{file}"
        hub.asked[f"{self.command} {key}"] += 1
        if hub.token is not None and self.headers.get("authorization") != f"Bearer {hub.token}":
            self._refuse(401, "GatedRepo")
        elif key in hub.status:
            self._refuse(hub.status[key])
        elif not any(known.startswith(f"{repo}/") for known in hub.files):
            self._refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif key not in hub.files:
            self._refuse(404, "EntryNotFound")
        else:
            body = hub.files[key]
            self.send_response(302)
            # Another host, as the hub's storage is one: its answers carry none of the hub's headers.
            self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{key}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{hub.sha256(key)}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, key: str) -> None:
        hub = self.state
        body = hub.files[key]
        if hub.damage:
            body = bytes(body[:-1]) + bytes([body[-1] ^ 1])
        first, total = 0, len(body)
        wanted = self.headers.get("range")
        if wanted is not None:
            hub.ranges.append(wanted)
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
        if first >= total > 0:
            self._refuse(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - first))
        self.end_headers()
        part = body[first:]
        if hub.cut_after:
            part = part[: hub.cut_after.pop(0)]
            self.close_connection = True
        hub.sent += len(part)
        self.wfile.write(part)

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def tiny_spec(name: str) -> ModelSpec:
    """A published model shrunk to what a test can make: the same files, places, parts and kinds."""
    spec = find_spec(name)
    if spec.family == "var":
        sides = (1, 2, 3, 4)
        vq: Any = MultiScaleConfig(64, 8, 32, (1, 1), 1, sides, 4)
        cfg: Any = VARConfig(
            depth=2, dim=32, heads=2, codebook_size=64, code_dim=8, sides=sides, num_classes=10,
            shared_adaln=spec.teacher is not None and spec.teacher.shared_adaln,  # type: ignore[union-attr]
        )  # fmt: skip
        blocks, size = 4, 8
    else:
        vq = VQConfig(64, 4, 32, 32, (1, 1, 1), 1)
        text = {"text_tokens": 3, "text_dim": 16} if spec.reads_text else {}
        cfg = LlamaGenConfig(
            layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=4, num_classes=10, **text
        )
        blocks, size = 16, 16
    plans = [plan.teacher(blocks)]
    if spec.student is not None:
        half = blocks // 2
        plans += [plan.one_step(blocks, half), plan.few_steps(blocks, half, split=half)]
        plans += [plan.hybrid(blocks, 1, half, half)]
    fids = {"dd-1": 4.0, "dd-2": 3.0, "teacher": 1.0}
    presets = [PresetEntry.of(p, published=True, metrics={"fid": fids.get(p.name, 2.0)}) for p in plans]
    return replace(
        spec,
        image_size=size,
        classes=() if spec.reads_text else tuple(CLASSES),
        vq=vq,
        student=cfg if spec.student is not None else None,
        teacher=cfg if spec.teacher is not None else None,
        presets=tuple(presets),
    )


def random_modules(spec: ModelSpec, seed: int = 0) -> dict[PartName, nn.Module]:
    """Random weights for a model of any size."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(spec.vq)
    modules: dict[PartName, nn.Module] = {"tokenizer": tokenizer}
    if spec.student is not None:
        modules["student"] = new_student(spec.student)
    if spec.teacher is not None:
        modules["teacher"] = new_teacher(spec.teacher, tokenizer)
    for module in modules.values():
        module.eval().requires_grad_(False)
        # Every tensor has its own values: what is mixed up, shows.
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return modules


def content_of(spec: ModelSpec, part: PartName, module: nn.Module) -> dict[str, Any]:
    """What the published file of a part holds: the reference's names in the reference's nesting."""
    if part == "student":
        kind = "var-dd" if spec.family == "var" else "llamagen-dd"
    elif spec.family == "var":
        kind = "plain"
    else:
        kind = "llamagen-vq" if part == "tokenizer" else "llamagen-gpt"
    return nested(kind, reference_state(module))


def saved(content: object, **options: Any) -> bytes:
    """The bytes of a torch file."""
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def publish(hub: FakeHub, spec: ModelSpec, modules: dict[PartName, nn.Module]) -> None:
    """Puts a model's files on the stand-in."""
    for part, remote in spec.files.items():
        hub.add(remote.repo, remote.file, saved(content_of(spec, part, modules[part])))
