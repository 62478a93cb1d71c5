"""Uploads, against a server on this machine that speaks the Hub's commit API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import UserError
from drafttrain.export.hub import Upload, checked_card, plan_text, push

CARD = "---\nlibrary_name: drafttrain\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# mine\n"
LARGE = 64
"""Bytes from which on the server wants a file as an LFS object."""


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    return {"path": file["path"], "uploadMode": "lfs" if file["size"] > LARGE else "regular", "shouldIgnore": False}


class Hub(BaseHTTPRequestHandler):
    """Enough of the Hub: repositories, branches, LFS objects and commits, kept in the server's `store`."""

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    @property
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        store, body, path = self.server.store, self.body, self.path  # type: ignore[attr-defined]
        store["paths"].append(path)
        if store["refuse"]:
            self.answer(store["refuse"], {"error": "no"}, {"X-Error-Message": "no"})
        elif path == "/api/repos/create":
            store["created"].append(json.loads(body))
            self.answer(200, {"url": f"{self.url}/me/drafter", "name": "me/drafter"})
        elif "/branch/" in path:
            store["branches"].append(path.rpartition("/")[2])
            self.answer(200, {})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            self.answer(200, {"files": [upload_mode(one) for one in asked]})
        elif path == "/api/validate-yaml":
            store["validated"].append(json.loads(body)["content"])
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            self.answer(200, {"transfer": "basic", "objects": [self.lfs(one) for one in wanted]})
        elif "/commit/" in path:
            self.commit(body, path.rpartition("/")[2])
        else:
            self.answer(404, {"error": path})

    def do_PUT(self) -> None:
        store = self.server.store  # type: ignore[attr-defined]
        if store["break"]:
            store["break"] -= 1
            self.body  # noqa: B018  # read, then the line breaks
            self.answer(400, {"error": "broken"})
            return
        store["objects"][self.path.rpartition("/")[2]] = self.body
        self.answer(200, {})

    def do_GET(self) -> None:
        status = self.server.store["refuse"]  # type: ignore[attr-defined]
        self.answer(status or 200, {"id": "me/drafter", "name": "me"})

    @property
    def url(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def lfs(self, one: dict[str, Any]) -> dict[str, Any]:
        have = one["oid"] in self.server.store["objects"]  # type: ignore[attr-defined]
        actions = {} if have else {"actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}
        return {"oid": one["oid"], "size": one["size"], **actions}

    def commit(self, body: bytes, revision: str) -> None:
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.store["objects"][value["oid"]]  # type: ignore[attr-defined]
        self.server.store["commits"].append((revision, files))  # type: ignore[attr-defined]
        self.answer(200, {"commitUrl": f"{self.url}/me/drafter/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """The server's address, and what it holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # another protocol than the server's, for large files
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    store: dict[str, Any] = {"refuse": 0, "break": 0, "objects": {}}
    store |= {kind: [] for kind in ("paths", "created", "branches", "commits", "validated")}
    server.store = store  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    yield f"http://{host!s}:{port}", store
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


def test_a_folder_becomes_one_commit(hub: tuple[str, dict[str, Any]], folder: Path) -> None:
    url, store = hub
    assert push(Upload(folder, "me/drafter", private=True, endpoint=url, token="hf_x")).endswith("/commit/1")
    ((revision, files),) = store["commits"]
    assert revision == "main" and "private" in json.dumps(store["created"][0])
    assert len(store["validated"]) == 1  # the client has the card checked
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_revision_is_a_branch(hub: tuple[str, dict[str, Any]], folder: Path) -> None:
    url, store = hub
    push(Upload(folder, "me/drafter", revision="v2", endpoint=url, token="hf_x"))
    assert store["branches"] == ["v2"] and store["commits"][0][0] == "v2"


def test_an_interrupted_upload_goes_on_and_sends_no_object_twice(hub: tuple[str, dict[str, Any]], folder: Path) -> None:
    url, store = hub
    (folder / "second.safetensors").write_bytes(b"x" * 200)
    store["break"] = 1
    with pytest.raises(UserError, match=r"run it again, what was sent is kept"):
        push(Upload(folder, "me/drafter", endpoint=url, token="hf_x"))
    sent = dict(store["objects"])
    assert store["commits"] == []
    push(Upload(folder, "me/drafter", endpoint=url, token="hf_x"))
    assert len(store["commits"]) == 1 and store["objects"].items() >= sent.items()
    assert store["commits"][0][1].keys() == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_without_rights_is_one_line(hub: tuple[str, dict[str, Any]], folder: Path, status: int) -> None:
    url, store = hub
    store["refuse"] = status
    with pytest.raises(UserError, match="'me/drafter': you have no right to write there"):
        push(Upload(folder, "me/drafter", endpoint=url, token="hf_x"))


def test_a_dry_run_says_files_and_metadata_and_asks_no_server(folder: Path) -> None:
    text = plan_text(Upload(folder, "me/drafter", private=True, endpoint="http://127.0.0.1:9"))
    for said in ("me/drafter", "(private)", "model.safetensors  256 bytes", "license: apache-2.0"):
        assert said in text


@pytest.mark.parametrize("repo", ["drafter", "me/dra fter", "a/b/c", ""])
def test_a_name_that_is_none_is_refused(folder: Path, repo: str) -> None:
    with pytest.raises(UserError, match="--repo"):
        push(Upload(folder, repo))


def test_pickles_are_not_uploaded(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="is a pickle, and none is published"):
        push(Upload(folder, "me/drafter", endpoint="http://127.0.0.1:9"))


def test_a_folder_without_a_card_is_refused(folder: Path) -> None:
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="no valid model card"):
        checked_card(folder)
