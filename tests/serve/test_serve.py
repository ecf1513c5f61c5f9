"""The server over real sockets: answers are those of the model alone, limits hold, nothing is lost."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyrformer as pf
from pyrformer.errors import InputError

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install pyrformer[serve]")
pytest.importorskip("starlette", reason="starlette is not installed: pip install pyrformer[serve]")

from pyrformer.serve import app, protocol  # noqa: E402
from pyrformer.serve import engine as serving_engine  # noqa: E402
from pyrformer.serve.app import Server  # noqa: E402
from pyrformer.serve.server import Settings, is_local, serve  # noqa: E402
from pyrformer.serve.template import ChatTemplate, chat_template  # noqa: E402

TEXTS = ["the cat sat", "on the mat the king slept", "a cat", "the mat on the mat — naïve!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), kind="bpe", vocab_size=280)
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    model = pf.Model.from_config({**config, "vocab_size": tokenizer.vocab_size}, seed=1, tokenizer=tokenizer)
    model.load_state_dict({k: v * 8 if v.ndim > 1 else v for k, v in model.state_dict().items()})
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> pf.Model:
    # In float64 the order of additions, which depends on the batch, chooses no token.
    return pf.load(folder, dtype="float64", threads=2)


class Client:
    """A server in a thread of this process."""

    def __init__(self, model: pf.Model, more: dict[str, pf.Model] = {}, **settings: Any):  # noqa: B006
        self.server = Server({"tiny": model, **more}, Settings(**settings))
        self.engine = self.server.served["tiny"].engine
        config = uvicorn.Config(self.server.app, port=0, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def fetch(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, http.client.HTTPMessage]:
        given = {"Content-Type": "application/json", **(headers or {})}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(
                "GET" if body is None else "POST", path, data if body is not None else None, given
            )
            with connection.getresponse() as response:
                return response.status, response.read().decode(), response.headers

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        status, answer, _ = self.fetch(path, body, headers)
        return status, json.loads(answer)

    def complete(self, **body: Any) -> Any:
        status, answer = self.ask("/v1/completions", body)
        assert status == 200, answer
        return answer

    def stream(self, **body: Any) -> list[Any]:
        lines = self.fetch("/v1/completions", {**body, "stream": True})[1].split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.fixture(scope="module")
def client(model: pf.Model) -> Iterator[Client]:
    client = Client(model, max_rows=4, max_waiting=64)
    yield client
    client.stop()


def texts_of(answer: Any) -> list[str]:
    assert [c["index"] for c in answer["choices"]] == list(range(len(answer["choices"])))
    return [c["text"] for c in answer["choices"]]


def test_greedy_completions_are_those_of_the_model(client: Client, model: pf.Model) -> None:
    want = model.generate(TEXTS, max_new_tokens=12)
    answer = client.complete(model="tiny", prompt=TEXTS, max_tokens=12, temperature=0)
    assert texts_of(answer) == want.texts
    assert [c["finish_reason"] for c in answer["choices"]] == want.finish_reasons
    read = sum(len(model.require_tokenizer().encode(t).ids) for t in TEXTS)
    made = sum(map(len, want.ids))
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
    assert answer["object"] == "text_completion"


def test_drawn_completions_are_those_of_the_model(client: Client, model: pf.Model) -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    want = model.generate(TEXTS[:2], max_new_tokens=10, do_sample=True, num_return_sequences=3, **options)
    answer = client.complete(prompt=TEXTS[:2], max_tokens=10, n=3, frequency_penalty=0.0, **options)
    assert texts_of(answer) == want.texts
    ids = [model.require_tokenizer().encode(t).ids for t in TEXTS[:2]]
    assert texts_of(client.complete(prompt=ids, max_tokens=10, n=3, **options)) == want.texts


def test_without_a_seed_draws_differ(client: Client) -> None:
    first, second = (texts_of(client.complete(prompt="a", max_tokens=40)) for _ in range(2))
    assert first != second


def test_logit_bias(client: Client, model: pf.Model) -> None:
    token = model.require_tokenizer().encode("cat").ids[0]
    answer = client.complete(prompt="a", max_tokens=3, temperature=0, logit_bias={str(token): 1000})
    assert texts_of(answer) == [model.require_tokenizer().decode([token] * 3)]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"n": 3, "seed": 1}, {"seed": 2, "logprobs": 2}])
def test_streams_join_to_the_whole_answer(client: Client, options: dict[str, Any]) -> None:
    whole = client.complete(prompt=TEXTS[:2], max_tokens=12, **options)
    events = client.stream(prompt=TEXTS[:2], max_tokens=12, stream_options={"include_usage": True}, **options)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert len(events) > len(whole["choices"]) + 1
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, column in choice["logprobs"].items():
                assert [x for p in parts for x in p["logprobs"][name]] == column


def test_logprobs(client: Client, model: pf.Model) -> None:
    want = model.generate("the cat", max_new_tokens=6)
    found = client.complete(prompt="the cat", max_tokens=6, temperature=0, logprobs=3)["choices"][0]
    columns = found["logprobs"]
    np.testing.assert_allclose(columns["token_logprobs"], want.token_logprobs[0], rtol=1e-5, atol=1e-6)
    for token, logprob, top in zip(
        columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True
    ):
        assert max(top, key=top.get) == token
        assert top[token] == pytest.approx(logprob, abs=1e-5)
        assert len(top) <= 3
    assert columns["text_offset"][0] == 0
    assert columns["text_offset"] == sorted(columns["text_offset"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo(client: Client, model: pf.Model, logprobs: int | None, stream: bool) -> None:
    body = {"prompt": TEXTS[1], "max_tokens": 5, "temperature": 0, "echo": True, "logprobs": logprobs}
    tokenizer = model.require_tokenizer()
    ids, made = tokenizer.encode(TEXTS[1]).ids, model.generate(TEXTS[1], max_new_tokens=5)
    if stream:
        parts = client.stream(**body)
        (choice,) = (protocol.joined([p["choices"][0] for p in parts]),)
    else:
        answer = client.complete(**body)
        assert answer["usage"]["completion_tokens"] == len(made.ids[0])
        (choice,) = answer["choices"]
    assert choice["text"] == TEXTS[1] + made.texts[0]
    if logprobs is None:
        assert choice["logprobs"] is None
        return
    found = choice["logprobs"]
    whole = model([ids]).logits[0].astype(np.float64)
    want = (
        whole
        - np.log(np.exp(whole - whole.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - whole.max(-1, keepdims=True)
    )
    assert found["token_logprobs"][0] is None
    np.testing.assert_allclose(
        found["token_logprobs"][1 : len(ids)], [want[i, t] for i, t in enumerate(ids[1:])], rtol=1e-6
    )
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids) + len(made.ids[0])
    for token, at in list(zip(found["tokens"], found["text_offset"], strict=True))[: len(ids)]:
        assert choice["text"][at:].startswith(token)
    if logprobs:
        assert found["top_logprobs"][0] is None
        for row, tops in zip(want, found["top_logprobs"][1 : len(ids)], strict=False):
            assert max(tops.values()) == pytest.approx(row.max(), rel=1e-6)


def test_a_prompt_alone_is_scored(client: Client, model: pf.Model) -> None:
    answer = client.complete(prompt=[TEXTS[0], TEXTS[1]], max_tokens=0, echo=True, logprobs=0)
    assert texts_of(answer) == TEXTS[:2]
    assert answer["usage"]["completion_tokens"] == 0
    sums = [sum(c["logprobs"]["token_logprobs"][1:]) for c in answer["choices"]]
    ids = [model.require_tokenizer().encode(t).ids for t in TEXTS[:2]]
    for i, found in zip(ids, sums, strict=True):
        loss, _ = model.loss_and_grads([i], [i])
        assert found == pytest.approx(-loss * (len(i) - 1), rel=1e-6)


def test_long_prompts_are_read_in_pieces_beside_streams(
    client: Client, model: pf.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_engine, "PIECE", 16)
    decoder, feeds = client.engine._decoder, []
    read = decoder.read  # type: ignore[union-attr]

    def watched(given: Any, into: Any, **more: Any) -> Any:
        feeds.append([len(f) for f in given])
        return read(given, into, **more)

    monkeypatch.setattr(decoder, "read", watched)
    long = "the cat sat on the mat " * 9
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(client.complete, prompt="a cat", max_tokens=100, temperature=0)
        while len(feeds) < 5:
            time.sleep(0.001)
        answer = client.complete(prompt=long, max_tokens=5, temperature=0, echo=True, logprobs=0)
        assert texts_of(short.result()) == model.generate("a cat", max_new_tokens=100).texts
    assert texts_of(answer) == [long + model.generate(long, max_new_tokens=5).texts[0]]
    pieces = [i for i, f in enumerate(feeds) if f[0] > 1][1:]
    count = len(model.require_tokenizer().encode(long).ids)
    assert sum(feeds[i][0] for i in pieces) == count > 32
    assert max(max(f) for f in feeds) == 16
    assert all(feeds[i + 1] == [1] for i in pieces[:-1]), "the other goes on between the pieces"


CHATML = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('who?') }}"
    "{% endif %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def chatting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, pf.Model]]:
    pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install pyrformer[serve]")
    copy = tmp_path_factory.mktemp("chat") / "chatty"
    shutil.copytree(folder, copy)
    config = copy / "tokenizer_config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "chat_template": [{"name": "default", "template": CHATML}]}))
    model = pf.load(copy, dtype="float64", threads=2)
    client = Client(model, {"plain": pf.load(folder, dtype="float64")}, max_rows=4, max_waiting=8)
    yield client, model
    client.stop()


MESSAGES = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": [{"type": "text", "text": "on the mat "}]},
]


def test_chats_go_through_the_template(chatting: tuple[Client, pf.Model]) -> None:
    client, model = chatting
    prompt = model.require_tokenizer().encode("[system] the cat\n[user] on the mat\n[assistant] ").ids
    want = model.generate([prompt], max_new_tokens=9)
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    status, answer = client.ask("/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.texts[0]}
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    listed = choice["logprobs"]["content"]
    np.testing.assert_allclose([t["logprob"] for t in listed], want.token_logprobs[0], rtol=1e-6)
    assert all(len(t["top_logprobs"]) == 2 and bytes(t["bytes"]).decode() == t["token"] for t in listed)
    # Without max_tokens there is room up to the model's end.
    assert client.ask("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0})[0] == 200
    data = client.fetch("/v1/chat/completions", {**body, "stream": True})[1].split("\n\n")
    parts = [json.loads(line.removeprefix("data: ")) for line in data[:-2]]
    deltas = [p["choices"][0]["delta"] for p in parts]
    assert [d.get("role") for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(d["content"] for d in deltas) == want.texts[0]
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_saved_model_keeps_its_template(chatting: tuple[Client, pf.Model], tmp_path: Path) -> None:
    chatting[1].save(tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": CHATML}))
    pf.load(tmp_path / "copy").save(tmp_path / "copy")
    pf.load(tmp_path / "copy").save(tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == CHATML
    assert chat_template(pf.load(tmp_path / "again")) is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "list of objects"),
        ({"messages": [{"content": "a"}]}, "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "who?"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"prompt": "a"}, "unknown field"),
        ({"model": "plain"}, "no chat template"),
        ({"model": "other"}, "there is no model 'other' here, only 'tiny', 'plain'"),
    ],
)
def test_refused_chats(chatting: tuple[Client, pf.Model], more: dict[str, Any], said: str) -> None:
    status, answer = chatting[0].ask("/v1/chat/completions", {"messages": MESSAGES, **more})
    assert 400 <= status < 500
    assert said in answer["error"]["message"]


def test_templates_are_in_a_sandbox(folder: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install pyrformer[serve]")
    for text in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(InputError, match="refuses"):
            ChatTemplate(text, {}).prompt(MESSAGES)
    with pytest.raises(InputError, match="not valid"):
        ChatTemplate("{% for %}", {})
    assert (
        ChatTemplate("{{ bos_token }}{{ messages | tojson }}", {"bos_token": "<s>"}).prompt(
            [{"role": "user", "content": "<é>"}]
        )
        == '<s>[{"role": "user", "content": "<é>"}]'
    )


def test_several_models_in_one_server(chatting: tuple[Client, pf.Model]) -> None:
    client, _ = chatting
    assert [m["id"] for m in client.ask("/v1/models")[1]["data"]] == ["tiny", "plain"]
    with ThreadPoolExecutor(8) as pool:
        names = ["tiny", "plain"] * 4
        answers = list(
            pool.map(lambda n: client.complete(model=n, prompt="a", max_tokens=8, temperature=0), names)
        )
    assert [a["model"] for a in answers] == names
    assert len({texts_of(a)[0] for a in answers}) == 1


def test_text_ends_before_a_stop_string(client: Client, model: pf.Model) -> None:
    whole = model.generate("the cat", max_new_tokens=30).texts[0]
    for stop in (whole[4:9], whole[10:11]):
        want = whole[: whole.index(stop)]
        answer = client.complete(prompt="the cat", max_tokens=30, temperature=0, stop=["~~", stop])
        assert texts_of(answer) == [want]
        assert answer["choices"][0]["finish_reason"] == "stop"
        events = client.stream(prompt="the cat", max_tokens=30, temperature=0, stop=stop)
        assert "".join(c["text"] for e in events for c in e["choices"]) == want


def test_embeddings(client: Client, model: pf.Model) -> None:
    want = model.embed(TEXTS)
    status, answer = client.ask("/v1/embeddings", {"model": "tiny", "input": TEXTS})
    assert status == 200
    got = np.array([d["embedding"] for d in answer["data"]], np.float32)
    np.testing.assert_array_equal(got, want)
    _, answer = client.ask("/v1/embeddings", {"input": TEXTS[1], "encoding_format": "base64"})
    got = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(got, want[1])


def test_models_and_health(client: Client) -> None:
    status, answer = client.ask("/v1/models")
    assert (status, answer["data"][0]["id"]) == (200, "tiny")
    assert client.ask("/v1/models/tiny")[1] == answer["data"][0]
    assert client.ask("/v1/models/other")[0] == 404
    assert client.ask("/health") == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_many_clients_at_once(client: Client, model: pf.Model) -> None:
    def ask(i: int) -> list[str]:
        body = {"prompt": TEXTS[i % 4], "max_tokens": 5 + i % 7, "seed": i, "n": 1 + i % 2}
        if i % 5 == 0:
            vector = client.ask("/v1/embeddings", {"input": TEXTS[i % 4]})[1]["data"][0]["embedding"]
            return [str(np.float32(vector[0]))]
        if i % 3:
            return texts_of(client.complete(**body))
        parts = [c for e in client.stream(**body) for c in e["choices"]]
        return ["".join(p["text"] for p in parts if p["index"] == j) for j in range(body["n"])]  # type: ignore[call-overload]

    def want(i: int) -> list[str]:
        if i % 5 == 0:
            return [str(model.embed([TEXTS[i % 4]])[0, 0])]
        options = {"max_new_tokens": 5 + i % 7, "seed": i, "num_return_sequences": 1 + i % 2}
        return model.generate(TEXTS[i % 4], do_sample=True, **options).texts

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(60)))
    assert found == [want(i) for i in range(60)]
    assert client.engine.running == client.engine.waiting == 0
    assert sorted(client.engine._free) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ([], 400, None, "JSON object"),
        ({}, 400, "prompt", "must be a text"),
        ({"prompt": [[1], ["a"]]}, 400, "prompt", r"prompt[1]"),
        ({"prompt": [[9999]]}, 400, "prompt", "outside"),
        ({"prompt": ""}, 400, "prompt", "is empty"),
        ({"prompt": "a", "max_token": 3}, 400, "max_token", "unknown field"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "from 1"),
        ({"prompt": "a", "max_tokens": 128}, 400, "prompt", "allowed"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens", "whole number"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "a number"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "a number"),
        ({"prompt": "a", "n": 5}, 400, "n", "from 1 to 4"),
        ({"prompt": "a", "n": 2, "temperature": 0}, 400, "n", "above 0"),
        ({"prompt": "a", "best_of": 2}, 400, "best_of", "equal n"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "at most 4"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs", "from 0 to 5"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, 400, None, ""),
        ({"prompt": "a", "top_p": 7}, 400, None, "top_p"),
        ({"prompt": "a", "stream": 1.5}, 400, "stream", "true or false"),
        ({"prompt": ["a"] * 65}, 400, "prompt", "64 prompts"),
        ({"prompt": "a", "model": "gpt-5"}, 404, "model", "no model"),
    ],
)
def test_refusals(client: Client, body: Any, status: int, param: str | None, said: str) -> None:
    for more in ({}, {"stream": True}) if isinstance(body, dict) and "stream" not in body else ({},):
        got, answer = client.ask("/v1/completions", {**body, **more} if more else body)
        assert got == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["param"] == param
        assert said in answer["error"]["message"]


def test_bodies_that_are_no_requests(client: Client) -> None:
    assert client.ask("/v1/completions", b"{")[0] == 400
    assert client.ask("/v1/completions", b"[" * 100_000)[0] == 400
    assert client.ask("/v1/completions", b"\xff")[0] == 400
    assert client.ask("/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert client.ask("/v1/completions", b" " * (1 << 20) + b"{}")[0] == 413
    for half in (b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "a", "model": "\\ud800"}'):
        assert client.ask("/v1/completions", half)[0] in (400, 404)
    status, answer = client.ask("/v1/nothing")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert client.ask("/v1/completions")[0] == 405
    assert client.ask("/v1/models", headers={"Host": "evil.example"})[0] == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:80", 200),
        ("127.0.0.1", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("localhost.evil.example", 403),
        ("evil.example:80", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_without_a_key_only_this_machine_is_answered(client: Client, host: str, status: int) -> None:
    assert client.ask("/v1/models", headers={"Host": host})[0] == status


SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2),
    max_leaves=6,
)
BODIES = st.dictionaries(
    st.sampled_from(sorted(protocol.COMPLETION | protocol.EMBEDDING)), VALUES, max_size=6
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, usual=st.booleans())
def test_any_body_is_read_or_refused(
    client: Client, model: pf.Model, body: dict[str, Any], usual: bool
) -> None:
    for read, first in (
        (protocol.read_completion, {"prompt": "the cat", "max_tokens": 2}),
        (protocol.read_embedding, {"input": "the cat"}),
    ):
        given_body = {**body, **first} if usual else body
        with suppress(protocol.BadRequest):
            found = read(given_body, model, client.server.served["tiny"].limits)
            if isinstance(found, protocol.CompletionRequest):
                # What was read can be run, or the search refuses it with its own words.
                status, answer = client.ask("/v1/completions", {**given_body, "stream": False})
                named = given_body.get("model") in (None, "tiny") or not isinstance(given_body["model"], str)
                assert status in ((200, 400) if named else (404,)), answer


def test_bodies_must_come_in_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)) as connection:
        connection.putrequest("POST", "/v1/completions")
        for name, value in (("Content-Type", "application/json"), ("Content-Length", "20")):
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(b'{"prompt":')
        with connection.getresponse() as response:
            assert response.status == 408
            assert b"did not come within" in response.read()


def slow(model: pf.Model, client: Client) -> None:
    """Makes each step of the engine take a while."""
    read = client.engine._decoder.read  # type: ignore[union-attr]

    def later(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return read(*args, **options)

    client.engine._decoder.read = later  # type: ignore[union-attr, method-assign]


def test_a_full_queue_says_when_to_come_back(model: pf.Model) -> None:
    client = Client(model, max_rows=1, max_waiting=2)
    try:
        slow(model, client)
        body = {"prompt": "the cat", "max_tokens": 12, "temperature": 0}
        want = texts_of(client.complete(**body))

        def ask(_: int) -> tuple[int, Any, str | None]:
            status, answer, headers = client.fetch("/v1/completions", body)
            return status, json.loads(answer), headers["Retry-After"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        served = [texts_of(a) for status, a, _ in answers if status == 200]
        refused = [(a, after) for status, a, after in answers if status == 429]
        assert len(served) + len(refused) == 8
        assert 3 <= len(served) < 8
        assert all(found == want for found in served)
        assert all(a["error"]["code"] == "queue_full" and int(after or 0) >= 1 for a, after in refused)
    finally:
        client.stop()


def test_requests_end_in_time_and_with_their_clients(model: pf.Model) -> None:
    client = Client(model, max_rows=1, timeout=0.5)
    try:
        slow(model, client)
        body = {"prompt": "the cat", "max_tokens": 100, "temperature": 0}
        status, answer = client.ask("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        events = client.fetch("/v1/completions", {**body, "stream": True})[1].split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        engine = client.engine
        object.__setattr__(client.server.settings, "timeout", 60.0)
        for streamed in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
            data = json.dumps({**body, "stream": streamed})
            connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
            while not engine.running:
                time.sleep(0.01)
            if streamed:
                with connection.getresponse() as response:
                    response.read(10)
            connection.close()
            began = time.monotonic()
            while engine.running:
                assert time.monotonic() - began < 4
                time.sleep(0.01)
        assert len(texts_of(client.complete(prompt="a", max_tokens=1))) == 1
    finally:
        client.stop()


def test_a_fault_of_one_step_ends_its_requests_only(model: pf.Model) -> None:
    client = Client(model)
    try:
        decoder = client.engine._decoder
        assert decoder is not None
        read = decoder.read
        decoder.read = lambda *_, **__: 1 / 0  # type: ignore[method-assign, return-value, assignment]
        status, answer = client.ask("/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        decoder.read = read  # type: ignore[method-assign]
        assert len(texts_of(client.complete(prompt="a", max_tokens=1))) == 1
    finally:
        client.stop()


def test_keys(model: pf.Model) -> None:
    client = Client(model, api_key="s3cret")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            status, answer = client.ask("/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer s3cret", "Host": "models.example"}
        assert client.ask("/v1/models", headers=right)[0] == 200
        assert client.ask("/health")[0] == 200
    finally:
        client.stop()


def test_masked_models_embed_only() -> None:
    tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), preset="bert-uncased", vocab_size=60)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {
        "model_type": "bert",
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 24,
        **sizes,
    }
    model = pf.Model.from_config(config, tokenizer=tokenizer)
    client = Client(model)
    try:
        status, answer = client.ask("/v1/embeddings", {"input": TEXTS})
        assert status == 200
        np.testing.assert_array_equal(
            np.array([d["embedding"] for d in answer["data"]], np.float32), model.embed(TEXTS)
        )
        status, answer = client.ask("/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["message"]) == (
            400,
            "this model does not continue text; use /v1/embeddings",
        )
    finally:
        client.stop()


def test_only_local_addresses_go_without_a_key(model: pf.Model) -> None:
    assert [is_local(h) for h in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_local(h) for h in ("0.0.0.0", "::", "example.org", "")] == [False] * 4
    with pytest.raises(InputError, match="set an API key"):
        serve({"tiny": model}, Settings(), host="0.0.0.0")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_command_finishes_what_was_asked(folder: Path, tmp_path: Path) -> None:
    code = "import sys; from pyrformer.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            ready = server.stdout.readline()
            assert "tiny is served at http://127.0.0.1:" in ready, server.stderr.read()
            port = int(ready.split("/v1")[0].rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = {"prompt": "the cat", "max_tokens": 120, "temperature": 0, "stream": True}
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            with connection.getresponse() as response:
                assert response.status == 200
                first = response.read(1)
                server.send_signal(signal.SIGTERM)
                rest = (first + response.read()).decode()
            connection.close()
            assert rest.endswith("data: [DONE]\n\n")
            assert server.wait(30) in (-signal.SIGTERM, 128 + signal.SIGTERM)
            assert server.stderr.read() == ""
            with pytest.raises(OSError, match="refused"):
                connection.request("GET", "/health")
        finally:
            server.kill()
