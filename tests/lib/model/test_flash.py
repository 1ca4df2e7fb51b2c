"""What stands in for torch's attention has to compute what torch's does."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention as torchs

from stages.lib.model import attention, flash

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class Handle:
    """What a provider returns; it remembers that it was removed."""

    removed = False

    def remove(self) -> None:
        """As torch calls it."""
        self.removed = True


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install a provider of FA4's name through torch's own registry."""
    known = dict(torchs._registry._FLASH_ATTENTION_IMPLS)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))

    def install(register: Any) -> None:
        torchs.register_flash_attention_impl("FA4", register_fn=register)

    yield install
    torchs.restore_flash_attention_impl(_raise_warn=False)
    torchs._registry._FLASH_ATTENTION_IMPLS.update(known)  # type: ignore[attr-defined]


def test_one_that_is_right_is_adopted(provider: Any) -> None:
    handle = Handle()
    provider(lambda: handle)
    said = flash.adopt(4, 2, 16, None, CPU)
    assert said == "attention over rows of many lengths is that of FA4"
    assert torchs.current_flash_attention_impl() == "FA4"


@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_one_that_is_wrong_or_fails_is_put_away_and_named(
    provider: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    handle, own = Handle(), attention.attend

    def worse(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if query.dtype == torch.float32:
            return own(module, query, *rest, **options)
        if how == "fails":
            raise RuntimeError("no kernel\nfor this")
        found, _ = own(module, query, *rest, **options)
        return found * 1.1, None

    provider(lambda: handle)
    monkeypatch.setattr(attention, "attend", worse)
    said = flash.adopt(4, 2, 16, 8, CPU)
    why = "is 0.1 off" if how == "wrong" else "fails (no kernel)"
    assert said == f"FA4 is installed but {why}: attention is torch's own"
    assert handle.removed
    assert torchs.current_flash_attention_impl() is None


def test_one_that_is_not_installed_is_nothing_to_speak_of(provider: Any) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("flash_attn")

    provider(absent)
    assert flash.adopt(4, 2, 16, None, CPU) is None
