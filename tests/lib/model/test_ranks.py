"""What processes that train together agree on."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.lib.model.ranks import Lost, Ranks
from stages.lib.run import preemption
from stages.lib.run.exits import GateFailed, Stopped
from stages.lib.run.rank import Rank


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(work: Callable[[Ranks], Any], count: int = 2, seconds: float = 30) -> list[Any]:
    """What each of some processes makes of it; an error counts as made, None where one is gone."""
    context = multiprocessing.get_context("fork")
    port = free_port()

    def begin(number: int, end: Any) -> None:
        torch.set_num_threads(1)
        preemption.listen()
        ranks = Ranks(Rank(number, count, count, "127.0.0.1", port))
        try:
            end.send(work(ranks))
        except (Stopped, Lost, GateFailed) as error:
            end.send(type(error).__name__)
            return
        ranks.close()

    pipes = [context.Pipe() for _ in range(count)]
    started = [context.Process(target=begin, args=(n, pipes[n][1])) for n in range(count)]  # type: ignore[attr-defined]
    for process in started:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    found = [_said(ours, seconds) for ours, _ in pipes]
    for process in started:
        process.join(10)
        process.kill()
    return found


def _said(end: Any, seconds: float) -> Any:
    try:
        return end.recv() if end.poll(seconds) else None
    except EOFError:
        return None


def test_they_share_what_is_to_be_done_and_sum_what_they_found() -> None:
    def work(ranks: Ranks) -> Any:
        tensor = torch.full((3,), float(ranks.number + 1))
        ranks.sum(tensor)
        told = ranks.of_first(lambda: {"from": ranks.number})
        return list(ranks.mine(5)), tensor.tolist(), ranks.agree(ranks.number, 2), told

    one, other = together(work)
    assert (one[0], other[0]) == ([0, 2, 4], [1, 3])
    assert one[1:] == other[1:] == ([3.0] * 3, (1.0, 4.0), {"from": 0})


def test_all_stop_where_one_is_asked_to() -> None:
    def work(ranks: Ranks) -> Any:
        ranks.agree()
        with preemption.deferred():
            if ranks.number:
                preemption.request("asked")
                ranks.check()  # in the middle of a step
            ranks.agree()  # at its end

    assert together(work) == ["Stopped", "Stopped"]


def test_where_passes_need_all_they_stop_before_the_same_one() -> None:
    def work(ranks: Ranks) -> Any:
        ranks.joined = True
        passes = 0
        try:
            for _ in range(3):
                if ranks.number and passes == 1:
                    preemption.request("asked")
                ranks.check()
                passes += 1
        except Stopped:
            return passes

    assert together(work) == [1, 1]


def test_a_number_of_each() -> None:
    assert together(lambda ranks: ranks.each(ranks.number + 0.5)) == [[0.5, 1.5]] * 2


def test_a_process_that_is_gone_is_noticed() -> None:
    def work(ranks: Ranks) -> Any:
        if ranks.number:
            return "gone"
        return ranks.agree(1) and ranks.agree(1)

    one, _ = together(work)
    assert one == "Lost"


def test_copies_that_differ_are_refused() -> None:
    def work(ranks: Ranks) -> Any:
        ranks.check_same(torch.ones(3))
        ranks.check_same(torch.full((3,), 1.0 + ranks.number))
        return "same"

    assert together(work)[1] == "GateFailed"


def test_one_alone_waits_for_nobody() -> None:
    ranks = Ranks()
    assert ranks.agree(1, 2) == (1, 2)
    assert ranks.of_first(lambda: 3) == 3
    assert list(ranks.mine(3)) == [0, 1, 2]
    ranks.wait()
    ranks.check_same(torch.ones(1))
    ranks.close()
    with pytest.raises(AttributeError):
        ranks.hosts  # noqa: B018 - there is no group
