"""A model of the hub: what is said before it is fetched, a fetch that breaks off, a slow hub."""

import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import start_script
from test_architectures import hub_model, script_line  # noqa: F401

import experiment_7b
from collapse.config import LanguageModelConfig
from collapse.data.task import Rows, Task
from collapse.models import costs, fetching
from collapse.models.costs import Sizes, least_seconds, least_training_seconds
from collapse.models.weights import loading
from collapse.runs import announcement
from collapse.utils import hub
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT

COMMIT = "c" * 40


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves a folder as the model nobody/tiny, as the hub does; `broken` files end in an error."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.broken, self.fetched = folder, set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path, _, _ = self.path.partition("?")
        files = sorted(self.server.folder.iterdir())
        if path.startswith("/api/models/nobody/tiny/revision/"):
            return self.send(200, json.dumps({"id": "nobody/tiny", "sha": COMMIT}).encode(), body)
        if path.startswith("/api/models/nobody/tiny/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            return self.send(200, json.dumps(entries).encode(), body)
        if not path.startswith("/nobody/tiny/resolve/"):
            return self.send(200, b"", body)
        file = self.server.folder / path.rpartition("/")[2]
        if not file.exists():
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        if body and file.name in self.server.broken:
            return self.send(500, b"", body)
        if body:
            self.server.fetched.append(file.name)
        return self.send(200, file.read_bytes(), body, {"ETag": f'"{file.name}"'})

    def send(self, status, content, body, headers=()):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(qwen, tmp_path):
    """The tiny model in shards, as a hub serves it."""
    folder = tmp_path / "repository"
    shutil.copytree(qwen, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(qwen)
    causal_lm.save_pretrained(folder, max_shard_size="200KB")
    server = FakeHub(folder)
    yield server
    server.shutdown()


def test_a_fetch_is_announced_breaks_off_in_a_sentence_and_goes_on(served, data_dir, tmp_path):
    """The script itself, with HF_ENDPOINT on loopback: model, disk, card and hours come first."""
    shards = sorted(file.name for file in served.folder.glob("*.safetensors"))
    line = f"--model nobody/tiny --models 1 --epochs 1 --train-limit 16 --data-dir {data_dir}"
    line += f" --output-dir {tmp_path / 'out'} --lora-rank 2 --max-length 8 --device cpu"
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{served.server_port}", "HF_HUB_OFFLINE": "0"}
    endpoint |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "no_proxy": "*"}

    def start():
        return subprocess.run(
            [sys.executable, ROOT / "experiment_7b.py", *line.split()],
            env=os.environ | endpoint,
            capture_output=True,
            text=True,
            timeout=300,
        )

    served.broken.add(shards[-1])
    stopped = start()
    assert stopped.returncode == 2, stopped.stderr
    said = stopped.stdout
    order = ["card: none, this runs on the CPU; computing in float32", "time: not estimated"]
    order += ["model: nobody/tiny, 0.0", "download: 0.0", str(tmp_path / "hf/hub"), "GB are free"]
    assert [said.index(part) for part in order] == sorted(said.index(part) for part in order)
    assert "Fetching 8 files" in stopped.stderr  # the hub's bars
    error = stopped.stderr.strip().splitlines()[-1]
    assert error.startswith("error: the download of nobody/tiny broke off (") and "kept" in error
    assert not (tmp_path / "out/results.json").exists()
    kept = [name for name in served.fetched if name in shards]
    assert shards[0] in kept and shards[-1] not in kept
    served.broken.clear()
    served.fetched.clear()
    ended = start()
    assert ended.returncode == 0, ended.stderr
    assert [name for name in served.fetched if name in shards] == [shards[-1]]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["settings"]["config"]["model_commit"] == COMMIT


def test_a_disk_without_room_is_told_before_anything_is_fetched(monkeypatch, tmp_path):
    files = [types.SimpleNamespace(file_size=15 * 10**9, will_download=True)]
    files += [types.SimpleNamespace(file_size=10**9, will_download=False)]
    calls = []
    monkeypatch.setattr(fetching, "use_cache_if_hub_is_silent", lambda: False)
    monkeypatch.setattr("collapse.models.weights.use_cache_if_hub_is_silent", lambda: False)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: calls.append(k) or files
    )
    free = types.SimpleNamespace(free=15.5 * 10**9)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: free)
    cache = str(tmp_path / "not/there/yet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    with pytest.raises(UserError, match=r"needs 15 GB into .*, where 15\.5 GB are free: .*HF_HOME"):
        fetching.fetch("nobody/large", None)
    assert [call.get("dry_run") for call in calls] == [True]
    free.free = 16.5 * 10**9
    fetching.fetch("nobody/large", None)
    assert [call.get("dry_run") for call in calls] == [True, True, None]


def test_a_full_disk_stays_what_it_is():
    error = fetching.download_error("nobody/tiny", OSError(28, "No space left on device"))
    assert isinstance(error, OSError) and error.errno == 28


def test_a_slow_answer_is_waited_for_and_silence_is_asked_about_again(monkeypatch):
    """One late answer may not switch a process to its cache; nor is silence for good."""
    delays, asked, constants = [0.3], [], huggingface_hub.constants

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            time.sleep(delays[min(len(asked), len(delays)) - 1])
            return types.SimpleNamespace(status_code=200)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silence", hub._Silence())
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    assert not hub.use_cache_if_hub_is_silent() and asked == [0.2, 0.4]
    delays[:] = [2.0]
    assert hub.use_cache_if_hub_is_silent() and constants.HF_HUB_OFFLINE
    asked.clear()
    assert hub.use_cache_if_hub_is_silent() and not asked  # for a while that is remembered
    message = r"the hub does not answer.*again when it does"
    with pytest.raises(UserError, match=message), loading("nobody/tiny"):
        raise OSError("nothing in the cache")
    hub._silence.until, delays[:] = 0.0, [0.0]
    assert not hub.use_cache_if_hub_is_silent() and not constants.HF_HUB_OFFLINE


def test_a_person_who_chose_the_cache_keeps_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_silence", hub._Silence())
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("asked"))
    assert hub.use_cache_if_hub_is_silent() and not hub._silence.switched


def test_a_model_in_the_cache_trains_without_the_hub(hub_model, data_dir, tmp_path, capsys):  # noqa: F811
    start_script(experiment_7b, script_line(hub_model[0], data_dir, tmp_path) + " --models 1")
    assert "model: nobody/tiny, from " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Hours
# --------------------------------------------------------------------------------------------------

TINY = transformers.Qwen2Config(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def test_the_least_time_of_a_step_against_a_count_by_hand():
    sizes = Sizes.of(TINY, lora_rank=4)
    q_o, k_v, mlp = 2 * 64 * 64, 2 * 64 * 32, 3 * 64 * 128
    adapters = 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert sizes == Sizes(2 * (q_o + k_v + mlp), adapters, 64_000, width=64, depth=2)
    by_operations, by_bytes = ({"operations": a, "bytes": b} for a, b in ((1, 1e99), (1e99, 1)))
    found = least_seconds(sizes, by_operations, 24, 20)
    assert found == pytest.approx(24 * (4 * sizes.layers + 6 * adapters) + 20 * 4 * 64_000)
    moved = 24 * 2 * 64 * costs.ELEMENTWISE_BYTES
    found = least_seconds(sizes, by_bytes, 24, 20, reads=3)
    assert found == pytest.approx(3 * 2 * 2 * (sizes.layers + 64_000) + moved)
    found = least_seconds(sizes, by_bytes, 24, 0, itemsize=4)
    assert found == pytest.approx(2 * 4 * sizes.layers + 2 * moved)
    forward = least_seconds(sizes, by_operations, 24, 20, products=1)
    assert forward == pytest.approx(24 * 2 * (sizes.layers + adapters) + 20 * 2 * 64_000)
    thrice = least_seconds(sizes, by_bytes, 24, 20, products=3)
    assert thrice == pytest.approx(2 * (3 * sizes.layers + 2 * 64_000) + moved * 4 / 3)


def test_a_training_is_its_steps_and_its_evaluations():
    """Of an engram's model: weights twice a step, a prefix a row, two evaluations an epoch."""
    sizes, rates = Sizes.of(TINY, lora_rank=4), {"operations": 1e9, "bytes": 1e9}
    found = least_training_seconds(sizes, rates, (160, 50), 10.0, 16, 3, True, True)
    steps = 30 * least_seconds(sizes, rates, 16 * 11, 16 * 9, reads=2)
    evaluation = least_seconds(sizes, rates, 50 * 11, 50 * 9, reads=0, products=1)
    assert found == pytest.approx(steps + 7 * evaluation)


def test_hours_are_a_range_and_measured_where_the_check_has_run(qwen, monkeypatch, tmp_path):
    rows = Rows(["good world"] * 800, [0] * 800)
    task = Task("Data", "", "here", ("a", "b"), rows, rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Abacus 16")
    monkeypatch.setattr(announcement, "device_rates", lambda *_: {"operations": 1e6, "bytes": 1e6})
    monkeypatch.setattr(costs, "GPU_CHECK", tmp_path / "gpu_check.json")
    settings = LanguageModelConfig(model=str(qwen), compute_dtype="bfloat16", models=("1", "2"))
    cuda = torch.device("cuda")
    said = announcement.expected_hours(task, cuda, settings)
    assert "model 1 " in said and "model 2 " in said and "1.6 to 2.4 times that, assumed" in said
    low, high = (float(x) for x in said.partition("; ")[2].partition(" in all")[0].split(" to "))
    assert high / low == pytest.approx(1.5, rel=0.1)
    twice = announcement.expected_hours(task, cuda, dataclasses.replace(settings, seeds=(1, 2)))
    assert float(twice.partition("; ")[2].split()[0]) == pytest.approx(2 * low, rel=0.1)
    check = {
        "hardware": {"device": "Abacus 16"},
        "ratio": {"busy": [3.0, 3.05], "wall": [3.05, 3.1]},
    }
    (tmp_path / "gpu_check.json").write_text(json.dumps(check))
    said = announcement.expected_hours(task, cuda, settings)
    assert "3.0 to 3.1 times that, as studies/gpu_check.py measured here" in said


def test_the_card_is_told_with_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (15 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Abacus 16")
    said = fetching.describe_card(torch.device("cuda"), "nf4", "bfloat16")
    assert (
        said
        == "card: Abacus 16, 15.0 of 16.0 GiB free; weights in 4 bits (NF4), computing in bfloat16"
    )
