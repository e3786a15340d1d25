"""A chat model behind an OpenAI-compatible server: vLLM, ``transformers serve``, Ollama, or a hosted one."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from models.budget import Budget
from models.cache import AnswerCache
from models.chat import Answer, Chat, Usage
from models.wire import NoAnswer, read_answer, retry_after, server_message
from transfer.core.console import progress
from transfer.core.errors import StageError, TransferError
from transfer.core.keys import digest

if TYPE_CHECKING:
    import httpx

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that another try may cure."""
REFUSED = frozenset({400, 413, 422})
"""Statuses that concern one request, as long as the server answers others."""
REASONS = {
    401: "does not accept the key",
    403: "forbids this model or key",
    404: "has no such address or model",
}
HINTS = {
    401: "Check the environment variable named as the key.",
    403: "Check what the key may use.",
    404: "Check the model's name, and that the address ends as the server wants it (often /v1).",
}
ALL_REFUSED = 8
"""Requests refused before the first answer after which the rest are not tried."""


@dataclass
class _Work:
    """What the threads of one call share."""

    chats: Iterator[Chat]
    found: dict[Chat, Answer] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    not_before: float = 0.0
    """Monotonic time before which nobody sends: the server asked for a pause."""


class Endpoint:
    """Answers chats over HTTP, many at once, each paid for at most once.

    Every answer goes to the cache before it is used. When the run cannot go on, the error says how many answers were
    given and kept, and the same call continues with the rest. Connection errors, 429 and 5xx are tried again with
    growing pauses (or the server's ``Retry-After``, for all threads); a wrong key, address or model fails at once. A
    single request that the server will not take, such as one too long for its context, is answered with ``refused``.

    Args:
        base_url: Address up to and without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: The server's name of the model.
        cache: Where answers are kept; not at all when None.
        served_by: Who answers, as the cache knows it: the address by default. A server that moves keeps its answers
            under a name of its own.
        key_variable: Environment variable that holds the key; empty for none.
        concurrency: Requests in flight at most.
        retries: Further tries of one request.
        timeout: Seconds to wait for one answer.
        longest_wait: Seconds of the longest pause; a server that asks for more ends the run.
        prices: Currency per million tokens read and written.
        max_cost: Cap in that currency, over everything booked on the account.
        max_tokens: Cap on tokens read and written, likewise.
        account: What the caps count over: with a cache and a name, what earlier runs booked on it counts too.
        limit_field: The server's name of the token limit: ``max_tokens`` or ``max_completion_tokens``.
        omit: Fields that the server does not take, such as ``seed``.
        extra: Further fields of the request body.

    Raises:
        TransferError: For a missing key, a bad address, or a cap on money without prices.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: AnswerCache | None = None,
        served_by: str = "",
        key_variable: str = "",
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        longest_wait: float = 60.0,
        prices: tuple[float, float] = (0.0, 0.0),
        max_cost: float | None = None,
        max_tokens: int | None = None,
        account: str = "",
        limit_field: str = "max_tokens",
        omit: tuple[str, ...] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise TransferError(f"{base_url!r} is no address of a server.", "Write http://… or https://….")
        if min(concurrency, timeout, longest_wait) <= 0 or retries < 0:
            raise TransferError(f"Concurrency, timeout and pauses of {base_url} must be positive.")
        self._key = os.environ.get(key_variable, "") if key_variable else ""
        if key_variable and not self._key:
            raise TransferError(f"The environment variable {key_variable} holds no key for {base_url}.", "Set it.")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.served_by = served_by or self.base_url
        self.cache = cache
        self.concurrency = concurrency
        self.retries = retries
        self.timeout = timeout
        self.longest_wait = longest_wait
        self.account = account
        self.limit_field = limit_field
        self.omit = frozenset(omit)
        self.extra = dict(extra or {})
        # Whatever changes the answer beside the request belongs to the name, since answers are kept by it.
        unusual = digest([sorted(self.omit), self.extra], 6) if self.omit or self.extra else ""
        self.name = f"endpoint:{model}" + (f"#{unusual}" if unusual else "")
        spent = cache.spent(self.name, account) if cache is not None and account else (0, 0)
        self.budget = Budget(prices, max_cost=max_cost, max_tokens=max_tokens, spent=spent)
        self.usage = Usage()
        self._refusal = ""  # what the server said when it first refused a request

    def complete(self, chats: list[Chat]) -> list[Answer]:
        """One answer a chat, in order; equal chats are sent once.

        Raises:
            StageError: When the server fails for good or a cap is reached; the same call continues.
            TransferError: When the server will not take any request: wrong key, address, model or field.
        """
        import httpx

        todo: list[Chat] = []
        found: dict[Chat, Answer] = {}
        for chat in dict.fromkeys(chats):
            kept = self.cache.get(self.name, chat, self.served_by) if self.cache is not None else None
            if kept is None:
                todo.append(chat)
            else:
                found[chat] = kept
                self.usage.from_cache(kept)
        self.usage.n_cached += len(chats) - len(todo)
        if todo:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            near = httpx.URL(self.base_url).host in ("localhost", "127.0.0.1", "::1")  # never through a proxy
            work = _Work(iter(todo), found)
            with (
                progress(f"ask {self.model}", len(todo), "requests") as advance,
                httpx.Client(
                    headers=headers, timeout=httpx.Timeout(self.timeout, connect=10.0), trust_env=not near
                ) as client,
                ThreadPoolExecutor(min(self.concurrency, len(todo))) as pool,
            ):
                jobs = [
                    pool.submit(self._serve, client, work, advance) for _ in range(min(self.concurrency, len(todo)))
                ]
                try:
                    for job in jobs:
                        job.result()
                except BaseException:
                    work.stop.set()  # an interrupt: what is in flight comes home, nothing new is sent
                    raise
            self._raise(work, len(todo))
        first = dict.fromkeys(todo, True)
        return [_repeated(found[c]) if not first.pop(c, False) else found[c] for c in chats]

    def _raise(self, work: _Work, n: int) -> None:
        """The error of a call, with what was kept."""
        n_answered = sum(not a.cached and a.finish != "refused" for a in work.found.values())
        if work.error is None and self._refuses_all():
            work.error = TransferError(
                f"{self.base_url} took none of {n} requests: {self._refusal}.", "Check the model's name and the fields."
            )
        if work.error is None:
            return
        if not isinstance(work.error, TransferError):
            raise work.error
        kept = "kept" if self.cache is not None else "lost (no cache)"
        before = self.usage.n_answered - n_answered
        more = f", after {before} before them" if before else ""
        what = f"{work.error.args[0]} {n_answered} of {n} requests were answered and {kept}{more}."
        raise type(work.error)(what, work.error.hint) from None

    def _refuses_all(self) -> bool:
        """Whether every request so far was refused: then the fault lies with all of them, not with one."""
        return bool(self.usage.n_refused) and not self.usage.n_answered and not self.usage.n_cached

    def _serve(self, client: httpx.Client, work: _Work, advance: Any) -> None:
        """One thread: take the next chat until there is none or the call has failed."""
        while not work.stop.is_set():
            with work.lock:
                chat = next(work.chats, None)
            if chat is None:
                return
            try:
                answer = self._answer(client, work, chat)
            except BaseException as error:
                with work.lock:
                    work.error = work.error or error
                work.stop.set()
                return
            if answer is None:
                return
            with work.lock:
                work.found[chat] = answer
                advance(1)
            if self.usage.n_refused >= ALL_REFUSED and self._refuses_all():
                work.stop.set()

    def _answer(self, client: httpx.Client, work: _Work, chat: Chat) -> Answer | None:
        """Send one chat until it is answered; None when the call was stopped meanwhile."""
        bound = (chat.bound(), chat.max_tokens)
        problem = ""
        for attempt in range(self.retries + 1):
            if not self._wait(work):
                return None
            if not self.budget.reserve(*bound):
                raise StageError(
                    f"The cap of {self.name} leaves no room for a further request: {self.budget}.",
                    "Raise it and run the same command again.",
                )
            if work.stop.is_set():
                self.budget.settle(bound, (0, 0))
                return None
            taken = (0, 0)
            pause = None
            try:
                answer = self._send(client, chat)
                if isinstance(answer, Answer):
                    taken = (answer.n_prompt, answer.n_written)
                    self._keep(chat, answer)
                    return answer
                problem, pause = answer
            except NoAnswer as error:
                # It may have been worked on and billed: the cap has to count it.
                problem, taken = str(error), bound
                self._lose(bound)
            finally:
                self.budget.settle(bound, taken)
            if attempt < self.retries:
                with _counting:
                    self.usage.n_retries += 1
                self._pause(work, chat, attempt, pause, problem)
        raise StageError(
            f"{self.base_url} failed {self.retries + 1} times on one request, last: {problem}.",
            "Once it answers, run the same command again to continue.",
        )

    def _wait(self, work: _Work) -> bool:
        """Wait while the server wants a pause; False when the call was stopped."""
        while not work.stop.is_set():
            left = work.not_before - time.monotonic()
            if left <= 0:
                return True
            work.stop.wait(left)
        return False

    def _pause(self, work: _Work, chat: Chat, attempt: int, asked: float | None, problem: str) -> None:
        if asked is not None:
            if asked > self.longest_wait:
                raise StageError(
                    f"{self.base_url} asks to wait {asked:.0f} s ({problem}).", "Run the same command again then."
                )
            with work.lock:
                work.not_before = max(work.not_before, time.monotonic() + asked)
            return
        # Spread out, so that threads that failed together do not come back together.
        spread = random.Random(f"{chat.hash(self.name)}{attempt}").uniform(0.5, 1.0)
        work.stop.wait(min(0.5 * 2**attempt, self.longest_wait) * spread)

    def _send(self, client: httpx.Client, chat: Chat) -> Answer | tuple[str, float | None]:
        """One try: the answer, or what was wrong and the pause that the server asked for.

        Raises:
            NoAnswer: When the request may have been paid for without an answer.
            TransferError: When no further try can help.
        """
        import httpx

        try:
            response = client.post(f"{self.base_url}/chat/completions", json=self._body(chat))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            return f"no connection ({_said(error)})", None
        except httpx.TimeoutException:
            raise NoAnswer(f"no answer within {self.timeout:g} s") from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
            raise TransferError(f"{self.base_url} cannot be asked ({_said(error)}).", "Check the address.") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise NoAnswer(f"the connection broke ({_said(error)})") from None
        if response.status_code == 200:
            return self._paid(response, chat)
        said = server_message(response, self._key)
        if response.status_code in RETRIED and not said.startswith("insufficient_quota"):
            return said, retry_after(response.headers.get("retry-after"))
        if response.status_code in REFUSED:
            self._refusal = self._refusal or said
            return Answer("", 0, 0, "refused")
        reason = REASONS.get(response.status_code, "does not answer such requests")
        hint = HINTS.get(response.status_code, "Check the address and the account.")
        raise TransferError(f"{self.base_url} {reason}: {said}.", hint)

    def _body(self, chat: Chat) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in chat.messages],
            self.limit_field: chat.max_tokens,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "seed": chat.seed,
        }
        return {**{k: v for k, v in body.items() if k not in self.omit}, **self.extra}

    def _paid(self, response: httpx.Response, chat: Chat) -> Answer:
        """The answer in a response; where its tokens are not told, the most they can be is taken."""
        answer, told = read_answer(response)
        if told:
            return answer
        with _counting:
            self.usage.n_unreported += 1
        return replace(answer, n_prompt=chat.bound(), n_written=chat.max_tokens)

    def _keep(self, chat: Chat, answer: Answer) -> None:
        """Count an answer, and write it down if it was paid for."""
        paid = answer.n_prompt + answer.n_written > 0 or answer.finish != "refused"
        if paid and self.cache is not None:
            self.cache.put(self.name, chat, answer, self.account, self.served_by)
        with _counting:
            usage = self.usage
            usage.n_answered += answer.finish != "refused"
            usage.n_refused += answer.finish == "refused"
            usage.n_cut += answer.finish == "length"
            usage.n_prompt += answer.n_prompt
            usage.n_written += answer.n_written
            usage.cost += self.budget.cost(answer.n_prompt, answer.n_written)

    def _lose(self, bound: tuple[int, int]) -> None:
        if self.cache is not None:
            self.cache.book(self.name, *bound, self.account)
        with _counting:
            self.usage.n_lost += sum(bound)
            self.usage.cost += self.budget.cost(*bound)


_counting = threading.Lock()


def _repeated(answer: Answer) -> Answer:
    """A second use of one answer."""
    return replace(answer, cached=True)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
