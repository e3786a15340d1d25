"""A cap on tokens and money that many requests at once cannot pass: each is reserved in full before it is sent."""

from __future__ import annotations

import threading

from transfer.core.errors import TransferError


class Budget:
    """What may still be spent.

    A request reserves the most it can take and settles for what it took. Reservations count as spent, so the cap is
    never passed as long as the model keeps to the token limit it was given; a request that does not fit waits for
    those in flight to give back what they did not need.

    Args:
        prices: Currency per million tokens read and written.
        max_cost: Cap in that currency; none when None.
        max_tokens: Cap on tokens read and written together; none when None.
        spent: Tokens read and written before.

    Raises:
        TransferError: For a cap on money without prices, or a negative number.
    """

    def __init__(
        self,
        prices: tuple[float, float] = (0.0, 0.0),
        *,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        spent: tuple[int, int] = (0, 0),
    ) -> None:
        if min(*prices, max_cost or 0.0, max_tokens or 0) < 0:
            raise TransferError("Prices and caps cannot be negative.")
        if max_cost is not None and not any(prices):
            raise TransferError(
                "A cap on money needs prices.", "Give the prices per million tokens, or cap the tokens instead."
            )
        self.prices = prices
        self.max_cost = max_cost
        self.max_tokens = max_tokens
        self._spent = list(spent)
        self._reserved = [0, 0]
        self._in_flight = 0
        self._changed = threading.Condition()

    def cost(self, n_prompt: int, n_written: int) -> float:
        """Price of these tokens."""
        return (n_prompt * self.prices[0] + n_written * self.prices[1]) / 1e6

    @property
    def spent(self) -> tuple[int, int]:
        """Tokens read and written so far, those before included."""
        with self._changed:
            return self._spent[0], self._spent[1]

    def _fits(self, n_prompt: int, n_written: int) -> bool:
        read, written = self._spent[0] + self._reserved[0] + n_prompt, self._spent[1] + self._reserved[1] + n_written
        if self.max_tokens is not None and read + written > self.max_tokens:
            return False
        return self.max_cost is None or self.cost(read, written) <= self.max_cost * (1 + 1e-12)

    def reserve(self, n_prompt: int, n_written: int) -> bool:
        """Set tokens aside; waits for requests in flight. False when they do not fit and nothing is in flight."""
        with self._changed:
            while not self._fits(n_prompt, n_written):
                if not self._in_flight:
                    return False
                self._changed.wait()
            self._reserved[0] += n_prompt
            self._reserved[1] += n_written
            self._in_flight += 1
            return True

    def settle(self, reserved: tuple[int, int], taken: tuple[int, int]) -> None:
        """Replace a reservation by what was taken."""
        with self._changed:
            for i in range(2):
                self._reserved[i] -= reserved[i]
                self._spent[i] += taken[i]
            self._in_flight -= 1
            self._changed.notify_all()

    def __str__(self) -> str:
        read, written = self.spent
        caps = [f"{self.max_tokens} tokens"] if self.max_tokens is not None else []
        caps += [f"{self.max_cost:g} in money"] if self.max_cost is not None else []
        return f"{read + written} tokens ({self.cost(read, written):.4f} in money) of {' and '.join(caps) or 'no cap'}"
