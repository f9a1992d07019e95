"""tools/get and the names of tools.hf, with huggingface_hub itself, from a hub on this machine."""

import gzip
import hashlib
import http.server
import json
import re
import threading

import pytest
import torch

from data import InputError
from tests.conftest import write
from tests.test_hh import call, made_up, read
from tests.test_imdb import made_up_reviews
from tests.test_weights import hugging_face_folder
from tools import hf
from tools.get import hh, imdb

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `files`, "REPOSITORY:FILE" → content."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, files = self.path.partition("?")[0].lstrip("/"), self.server.files
        place = path.replace(f"/resolve/{COMMIT}/", ":")
        if path.startswith("api/"):
            repository, asked = re.fullmatch("api/(?:models/)?(.+)/(revision|tree)/.+", path).groups()
            names = [each.partition(":")[2] for each in files if each.startswith(f"{repository}:")]
            about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            if asked == "tree":
                about = [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in names]
            place, files = "", {"": json.dumps(about).encode()} if names else {}
        if place not in files:
            return self.send_error(404)
        self.send_response(200)
        etag = hashlib.sha256(files[place]).hexdigest()  # which names the file in the cache
        for name, value in {"Content-Length": len(files[place]), "X-Repo-Commit": COMMIT, "ETag": etag}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(files[place])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "FOLDER", tmp_path / "hh")
    monkeypatch.setattr(imdb, "FOLDER", tmp_path / "imdb")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files = {}
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_model_is_brought_in_by_its_name_on_the_hub_without_the_files_that_it_does_not_need(tmp_path, hub):
    theirs = hugging_face_folder(tmp_path / "theirs", "llama")
    hub.files = {f"some/Model-1.5:{path.name}": path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    hub.files["some/Model-1.5:consolidated.safetensors"] = b"the same weights under other names"
    hf.convert("some/Model-1.5", tmp_path / "run")
    assert not list((tmp_path / "cache").rglob("consolidated*"))
    hf.convert(str(tmp_path / "run"), tmp_path / "back")
    tokens = torch.arange(9)[None]
    theirs, ours = (net.eval()(tokens).logits for net in (theirs, type(theirs).from_pretrained(tmp_path / "back")))
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_a_name_that_is_not_on_the_hub_is_one_sentence(tmp_path, hub):
    for name in ("some/nothing", "nothing", "../nothing", "a/b/c", ""):
        with pytest.raises(InputError, match="cannot be downloaded|neither a folder") as error:
            hf.convert(name, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_public_dialogues_keep_their_split(tmp_path, hub, monkeypatch):
    with pytest.raises(InputError, match="Anthropic/hh-rlhf: cannot be downloaded"):
        call(monkeypatch, "--sets", "harmless-base")
    assert not (tmp_path / "hh").exists()
    for part, rows in (("train", made_up()), ("test", made_up()[:3])):
        content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        hub.files[f"datasets/Anthropic/hh-rlhf:harmless-base/{part}.jsonl.gz"] = content
    call(monkeypatch, "--sets", "harmless-base")
    assert len(read(tmp_path / "hh/compare.jsonl")) == 60 and len(read(tmp_path / "hh/eval.jsonl")) == 3
    hub.files.clear()
    call(monkeypatch, "--sets", "harmless-base")  # what was downloaded is kept


def test_the_public_reviews_are_those_of_a_file_of_ones_own(tmp_path, hub, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": text, "label": label} for text, label in made_up_reviews()]
    for name, part in (("test", rows[300:]), ("train", rows[:300])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        hub.files[f"datasets/stanfordnlp/imdb:plain_text/{name}-00000-of-00001.parquet"] = content
    hub.files["datasets/stanfordnlp/imdb:plain_text/unsupervised-00000-of-00001.parquet"] = b"not asked for"
    found = {}
    for options in ([], ["--source", str(write(tmp_path / "own.jsonl", rows[300:] + rows[:300]))]):
        monkeypatch.setattr("sys.argv", ["imdb", *options])
        imdb.main()
        found[len(options)] = {path.name: path.read_text() for path in (tmp_path / "imdb").iterdir()}
    assert found[0] == found[2] and len(found[0]) == 5
