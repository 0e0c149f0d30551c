"""Rewards from a remote judge: one request per response, a few at a time, with a time-out and retries."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rlhf.errors import UserError
from rlhf.reward.calls import accepted

_LONGEST_WAIT = 30.0  # seconds before a retry


class RemoteReward:
    """An async function that judges one response, as a reward function: judge(prompt, completion, **columns).

    It returns a number, or None for no score, and gets those of the row's columns that it takes. max_concurrency:
    requests of this process at a time; timeout: seconds per request; max_retries: further tries of one that raised an
    error or took too long, the first after `wait` seconds, each next one after twice as long. A response without an
    answer ends the run, or has no score if `required` is False.
    """

    def __init__(
        self,
        judge: Callable[..., Awaitable[float | None]],
        max_concurrency: int = 16,
        max_retries: int = 3,
        timeout: float = 60.0,
        wait: float = 1.0,
        required: bool = True,
    ) -> None:
        for name, value, least in (("max_concurrency", max_concurrency, 1), ("max_retries", max_retries, 0)):
            if value < least:
                raise UserError(f"RemoteReward: {name}: expected at least {least}, found {value}")
        if not timeout > 0:
            raise UserError(f"RemoteReward: timeout: expected a positive number of seconds, found {timeout}")
        self.judge, self.max_concurrency, self.max_retries = judge, max_concurrency, max_retries
        self.timeout, self.wait, self.required = timeout, wait, required
        self.__name__ = getattr(judge, "__name__", type(judge).__name__)

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """All responses of a batch, in their order."""
        limit = asyncio.Semaphore(self.max_concurrency)
        rows = [
            {name: values[i] for name, values in columns.items()} | {"prompt": prompt, "completion": completion}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        tasks = [asyncio.create_task(self._ask(limit, accepted(self.__name__, self.judge, row))) for row in rows]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one has failed
                task.cancel()

    async def _ask(self, limit: asyncio.Semaphore, arguments: Mapping[str, Any]) -> float | None:
        async with limit:
            for left in reversed(range(self.max_retries + 1)):
                try:
                    async with asyncio.timeout(self.timeout):
                        return await self.judge(**arguments)
                except Exception as error:
                    failed = error
                if left:
                    tried = self.max_retries - left
                    await asyncio.sleep(min(self.wait * 2**tried, _LONGEST_WAIT))
        if not self.required:
            return None
        why = f"no answer in {self.timeout:g} s" if isinstance(failed, TimeoutError) else _in_words(failed)
        raise UserError(f"reward {self.__name__}: {self.max_retries + 1} requests for one response failed: {why}")


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
