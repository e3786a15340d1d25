from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.budget import Budget
from models.cache import AnswerCache
from models.chat import Chat, DryRun
from models.endpoint import Endpoint
from models.language import LanguageModel
from models.local_chat import LocalChat
from transfer.core.errors import StageError, TransferError

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str, n_prompt: int = 5, n_written: int = 2, finish: str = "stop") -> Reply:
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_written},
    }
    return 200, {}, json.dumps(body).encode()


class Stub:
    """An in-process server: what it answers is a function of the request's body and how often it was asked."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply | None]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    stub.bodies.append(body)
                    stub.headers.append({k.lower(): v for k, v in self.headers.items()})
                    stub.busy += 1
                    stub.busiest = max(stub.busiest, stub.busy)
                    n = len(stub.bodies)
                try:
                    answer = reply(body, n)
                finally:
                    with lock:
                        stub.busy -= 1
                if answer is None:  # dies without a word
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers, data = answer
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def asked(self) -> list[str]:
        return [b["messages"][-1]["content"] for b in self.bodies]


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply | None]) -> Iterator[Stub]:
    stub = Stub(reply)
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()


def words(body: dict[str, Any], _: int) -> Reply:
    return completion("about " + body["messages"][-1]["content"])


def chats(n: int, **settings: Any) -> list[Chat]:
    return [Chat((("system", "be brief"), ("user", f"text {i}")), max_tokens=10, **settings) for i in range(n)]


def test_answers_come_in_order_are_kept_and_cost_once(tmp_path: Path) -> None:
    slow = lambda body, n: time.sleep(0.02) or words(body, n)  # noqa: E731 - long enough to overlap
    with serving(slow) as stub, AnswerCache(tmp_path / "answers.sqlite") as cache:
        model = Endpoint(stub.url, "m", cache=cache, prices=(2.0, 10.0), concurrency=4)
        asked = [*chats(9), chats(9)[3]]
        answers = model.complete(asked)
        assert [a.text for a in answers] == [f"about text {i}" for i in [*range(9), 3]]
        assert [a.cached for a in answers] == [False] * 9 + [True]
        assert len(stub.bodies) == 9 and 1 < stub.busiest <= 4
        usage = model.usage
        assert (usage.n_answered, usage.n_cached, usage.n_prompt, usage.n_written) == (9, 1, 45, 18)
        assert usage.cost == pytest.approx((45 * 2 + 18 * 10) / 1e6)
        again = Endpoint(stub.url, "m", cache=cache, prices=(2.0, 10.0))
        assert [a.text for a in again.complete(asked)] == [a.text for a in answers]
        assert len(stub.bodies) == 9 and again.usage.cost == 0 and again.usage.n_cached == 10
    first = stub.bodies[0]
    assert first["model"] == "m" and first["max_tokens"] == 10 and first["temperature"] == 0 and first["seed"] == 0


@pytest.mark.parametrize("change", [dict(seed=1), dict(temperature=0.5), dict(top_p=0.9)])
def test_whatever_decides_the_answer_is_asked_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    with serving(words) as stub, AnswerCache(tmp_path / "a.sqlite") as cache:
        Endpoint(stub.url, "m", cache=cache).complete(chats(1))
        Endpoint(stub.url, "m", cache=cache).complete(chats(1, **change))
        Endpoint(stub.url, "other", cache=cache).complete(chats(1))
        Endpoint(stub.url, "m", cache=cache, extra={"top_k": 1}).complete(chats(1))
        assert len(stub.bodies) == 4 and stub.bodies[3]["top_k"] == 1


def test_two_servers_that_call_a_model_alike_do_not_answer_for_each_other(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "a.sqlite") as cache:
        for said in ("one", "two"):
            with serving(lambda *_, said=said: completion(said, 5, 2)) as stub:
                model = Endpoint(stub.url, "default", cache=cache, account="run")
                assert [model.complete(chats(1))[0].text for _ in range(2)] == [said, said]
                assert len(stub.bodies) == 1
        assert len(cache) == 2 and cache.spent("endpoint:default", "run") == (10, 4)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(status: int) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        return (status, {"retry-after": "0"}, b'{"error": {"message": "busy"}}') if n <= 2 else words(body, n)

    with serving(reply) as stub:
        model = Endpoint(stub.url, "m", concurrency=1)
        assert model.complete(chats(1))[0].text == "about text 0"
        assert model.usage.n_retries == 2 and len(stub.bodies) == 3 and model.usage.n_lost == 0


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        return (429, {"retry-after": "0.4"}, b"{}") if n == 1 else words(body, n)

    with serving(reply) as stub:
        begin = time.monotonic()
        Endpoint(stub.url, "m", concurrency=1).complete(chats(1))
        assert time.monotonic() - begin >= 0.4
    with serving(lambda *_: (429, {"retry-after": "3600"}, b'{"detail": "tomorrow"}')) as stub:
        with pytest.raises(StageError, match="asks to wait 3600 s"):
            Endpoint(stub.url, "m").complete(chats(1))
        assert len(stub.bodies) == 1


def test_retries_are_bounded_and_the_error_says_what_was_kept(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        return words(body, n) if n <= 3 else (503, {"retry-after": "0"}, b"overloaded")

    with AnswerCache(tmp_path / "a.sqlite") as cache:
        with serving(reply) as stub:
            model = Endpoint(stub.url, "m", cache=cache, concurrency=1, retries=2, served_by="the cluster")
            with pytest.raises(
                StageError, match=r"failed 3 times .*overloaded.* 3 of 8 requests were answered and kept"
            ):
                model.complete(chats(8))
            assert len(stub.bodies) == 6
        with serving(words) as stub:  # it moved, and its answers are still its own
            model = Endpoint(stub.url, "m", cache=cache, concurrency=1, served_by="the cluster")
            answers = model.complete(chats(8))
            assert [a.cached for a in answers] == [True] * 3 + [False] * 5
            assert stub.asked() == [f"text {i}" for i in range(3, 8)]


def test_the_error_counts_the_answers_of_earlier_calls_too() -> None:
    with serving(lambda body, n: words(body, n) if n <= 6 else (503, {}, b"overloaded")) as stub:
        model = Endpoint(stub.url, "m", concurrency=1, retries=0)
        model.complete(chats(4))
        with pytest.raises(StageError, match=r"2 of 8 requests were answered and lost \(no cache\), after 4 before"):
            model.complete(chats(8, seed=1))


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "does not accept the key"), (403, "forbids"), (404, "no such address or model")]
)
def test_what_no_retry_cures_fails_at_once(status: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame-opens")
    said = b'{"error": {"message": "bad key sesame-opens"}}'
    with serving(lambda *_: (status, {}, said)) as stub:
        with pytest.raises(TransferError, match=sentence) as caught:
            Endpoint(stub.url, "m", key_variable="SOME_KEY", concurrency=1).complete(chats(5))
        assert len(stub.bodies) == 1 and stub.headers[0]["authorization"] == "Bearer sesame-opens"
        assert "sesame" not in str(caught.value) and not isinstance(caught.value, StageError)


def test_a_used_up_quota_is_no_reason_to_wait() -> None:
    said = b'{"error": {"code": "insufficient_quota", "message": "pay first"}}'
    with serving(lambda *_: (429, {}, said)) as stub:
        with pytest.raises(TransferError, match="pay first"):
            Endpoint(stub.url, "m").complete(chats(1))
        assert len(stub.bodies) == 1


def test_one_request_that_is_not_taken_does_not_stop_the_others() -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        bad = body["messages"][-1]["content"] == "text 2"
        return (400, {}, b'{"error": {"message": "too long"}}') if bad else words(body, n)

    with serving(reply) as stub:
        model = Endpoint(stub.url, "m", concurrency=2)
        answers = model.complete(chats(5))
        assert [a.finish for a in answers] == ["stop", "stop", "refused", "stop", "stop"]
        assert model.usage.n_refused == 1 and model.usage.n_answered == 4
    with serving(lambda *_: (400, {}, b'{"error": {"message": "no such field"}}')) as stub:
        with pytest.raises(TransferError, match="took none of 50 requests: no such field"):
            Endpoint(stub.url, "m", concurrency=2).complete(chats(50))
        assert len(stub.bodies) < 12


@pytest.mark.parametrize("data", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}'])
def test_an_answer_that_is_none_is_asked_again_and_counted_as_spent(data: bytes) -> None:
    with serving(lambda body, n: (200, {}, data) if n == 1 else words(body, n)) as stub:
        model = Endpoint(stub.url, "m", concurrency=1)
        assert model.complete(chats(1))[0].text == "about text 0"
        assert model.usage.n_lost == chats(1)[0].bound() + 10 and len(stub.bodies) == 2


def test_a_server_that_hangs_up_costs_no_answer(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply | None:
        return None if n % 3 == 0 else words(body, n)

    with serving(reply) as stub, AnswerCache(tmp_path / "a.sqlite") as cache:
        model = Endpoint(stub.url, "m", cache=cache, concurrency=3)
        assert [a.text for a in model.complete(chats(8))] == [f"about text {i}" for i in range(8)]
        assert model.usage.n_retries > 0 and model.usage.n_answered == 8 == len(cache)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StageError, match="no connection.* 0 of 3 requests"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "m", retries=1).complete(chats(3))


def test_a_slow_server_is_not_waited_for_without_end() -> None:
    with serving(lambda body, n: time.sleep(0.6) or words(body, n)) as stub:
        model = Endpoint(stub.url, "m", retries=0, timeout=0.1)
        with pytest.raises(StageError, match=r"no answer within 0\.1 s"):
            model.complete(chats(1))
        assert model.usage.n_lost > 0


def test_the_cap_is_never_passed_though_many_are_in_flight(tmp_path: Path) -> None:
    slow = lambda *_: time.sleep(0.01) or completion("x", 40, 10)  # noqa: E731
    with serving(slow) as stub, AnswerCache(tmp_path / "a.sqlite") as cache:
        model = Endpoint(stub.url, "m", cache=cache, concurrency=8, max_tokens=500, account="run")
        with pytest.raises(StageError, match=r"cap .* requests were answered and kept"):
            model.complete(chats(50))
        spent = sum(model.budget.spent)
        # What is left is less than the most that one request could take.
        assert spent <= 500 and spent + chats(1)[0].bound() + 10 > 500
        assert spent == 50 * len(cache)
        more = Endpoint(stub.url, "m", cache=cache, max_tokens=500, account="run")
        with pytest.raises(StageError, match="cap"):  # the same command again does not spend the cap again
            more.complete(chats(50))
        assert more.usage.n_answered == 0 and more.usage.n_cached == len(cache)
        rich = Endpoint(stub.url, "m", cache=cache, max_tokens=5000, account="run")
        assert len(rich.complete(chats(50))) == 50 and sum(rich.budget.spent) == 2500


def test_a_cap_on_money_needs_prices_and_counts_what_is_unreported() -> None:
    with pytest.raises(TransferError, match="needs prices"):
        Endpoint("http://localhost/v1", "m", max_cost=1.0)
    silent = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}).encode()
    with serving(lambda *_: (200, {}, silent)) as stub:
        model = Endpoint(stub.url, "m", prices=(1e4, 1e4), max_cost=3.0, concurrency=1)
        with pytest.raises(StageError, match="cap"):
            model.complete(chats(9))
        bound = chats(1)[0].bound() + 10
        assert model.usage.n_unreported == model.usage.n_cut == int(3.0 / (bound * 0.01))
        assert model.usage.cost <= 3.0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30), st.integers(1, 200))
def test_threads_never_pass_a_budget(requests: list[tuple[int, int]], cap: int) -> None:
    budget = Budget(max_tokens=cap)
    most = []

    def work(part: list[tuple[int, int]]) -> None:
        for bound in part:
            if budget.reserve(*bound):
                taken = (bound[0] // 2, bound[1] // 3)
                most.append(sum(budget.spent))
                budget.settle(bound, taken)

    threads = [threading.Thread(target=work, args=(requests[i::3],)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert not any(t.is_alive() for t in threads)
    assert sum(budget.spent) <= cap and max(most, default=0) <= cap


def test_bad_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(TransferError, match="NO_SUCH_KEY holds no key"):
        Endpoint("http://localhost/v1", "m", key_variable="NO_SUCH_KEY")
    with pytest.raises(TransferError, match="no address"):
        Endpoint("localhost:8000", "m")
    (tmp_path / "x.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(TransferError, match="no answer cache"):
        AnswerCache(tmp_path / "x.sqlite")


def test_a_dry_run_shows_and_spends_nothing() -> None:
    shown: list[str] = []
    dry = DryRun("endpoint:m", 2, shown.append, prices=(1.0, 2.0))
    answers = dry.complete(chats(5))
    assert [a.finish for a in answers] == ["refused"] * 5 and len(shown) == 2 and "text 1" in shown[1]
    bound = sum(c.bound() for c in chats(5))
    expected = {"requests": 5, "most_prompt": bound, "most_written": 50, "cost": (bound + 100) / 1e6}
    assert dry.estimate() == expected


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    from models.chat import Answer

    with AnswerCache(tmp_path / "a.sqlite") as one, AnswerCache(tmp_path / "a.sqlite") as two:
        chat = chats(1)[0]
        one.put("m", chat, Answer("x", 3, 4), "run")
        two.put("m", chat, Answer("y", 1, 1), "run")
        assert one.get("m", chat) == Answer("y", 1, 1, cached=True) and one.spent("m", "run") == (4, 5)
        assert one.get("other", chat) is None and one.spent("m", "else") == (0, 0)


ZOO = Path(__file__).resolve().parents[1] / "models" / "zoo" / "llama"


@contextmanager
def real_server(port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``transformers serve`` with a zoo model, ready to answer."""
    import httpx

    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", ZOO, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", port]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [str(c) for c in command], stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            with httpx.Client(trust_env=False) as client:
                for _ in range(240):
                    assert server.poll() is None, log.read_text("utf8")[-2000:]
                    try:
                        if client.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.25)
                else:
                    raise AssertionError(log.read_text("utf8")[-2000:])
            yield server
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
def test_a_real_server_that_dies_mid_run_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    asked = [Chat((("user", f"Tell me about {w}."),), max_tokens=24) for w in ("bread", "rain", "dogs", "tea", "cars")]
    asked += [Chat((("user", f"Count from {i} to ten."),), max_tokens=24) for i in range(19)]
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        first = Endpoint(url, str(ZOO), cache=cache, concurrency=3, retries=1, account="run")
        with real_server(port, tmp_path / "one.log") as server:

            def kill() -> None:
                while len(cache) < 6:
                    time.sleep(0.01)
                server.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(StageError, match=r"of 24 requests were answered and kept") as caught:
                first.complete(asked)
            killer.join()
        kept = len(cache)
        assert 6 <= kept < 24 and f"{kept} of 24" in str(caught.value)
        assert first.usage.n_answered == kept
        second = Endpoint(url, str(ZOO), cache=cache, concurrency=3, account="run")
        with real_server(port, tmp_path / "two.log"):
            answers = second.complete(asked)
        # The counts add up: everything was answered once, and both runs together paid for all of it.
        assert second.usage.n_cached == kept and second.usage.n_answered == 24 - kept and len(cache) == 24
        paid = [sum(a.n_prompt for a in answers), sum(a.n_written for a in answers)]
        assert first.usage.n_prompt + second.usage.n_prompt == paid[0]
        assert first.usage.n_written + second.usage.n_written == paid[1]
        assert sum(cache.spent(second.name, "run")) == sum(paid) + first.usage.n_lost
    local = LocalChat(LanguageModel.load("zoo:llama")).complete(asked)
    # The same model by its own template gives the same words (rounding may turn a near tie).
    assert sum(a.text.strip() == b.text for a, b in zip(answers, local, strict=True)) >= 22, [
        (a.text, b.text) for a, b in zip(answers, local, strict=True) if a.text.strip() != b.text
    ]
    assert [a.n_prompt for a in answers] == [a.n_prompt for a in local]
