"""The process that serves: a socket, signals, a graceful end."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyrformer import _core
from pyrformer.errors import FileError, InputError
from pyrformer.fields import MOST, check_types, checked, whole

if TYPE_CHECKING:
    from pyrformer.model import Model


@dataclass(frozen=True)
class Settings:
    """How models are served.

    Attributes:
        chat_template: a file with one, in the place of the models' own.
        api_key: what clients must show; None: nothing.
        max_length: tokens of a sequence, prompt included.
        max_rows: sequences of one model that are decoded together.
        max_waiting: prompts and embedding requests that wait for one model.
        max_body: bytes of a request.
        timeout: seconds that a request may take, waiting included.
    """

    api_key: str | None = None
    max_length: int = 2048
    max_rows: int = 8
    max_waiting: int = 64
    max_body: int = 1 << 20
    timeout: float = 120.0
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: a limit is of another type, or allows nothing.
        """
        check_types(self, "serve")
        for name, least in {"max_length": 2, "max_rows": 1, "max_waiting": 1, "max_body": 1}.items():
            most = _core.MOST_SEQUENCES if name == "max_rows" else MOST
            whole("serve", name, getattr(self, name), least, most)
        if not self.timeout > 0:
            raise InputError(f"[serve] timeout must be more than 0 seconds, got {self.timeout}")


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@checked("serve")
def serve(
    models: dict[str, Model],
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    stop_seconds: int = 30,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves models until SIGTERM or SIGINT; then takes no new connection and finishes what was asked.

    Args:
        models: by their names for clients; the first answers those that name none.
        host: address to listen on.
        port: 0 takes a free one.
        stop_seconds: how long finishing may take.
        on_ready: called with the URL once connections are taken.

    Raises:
        InputError: uvicorn or starlette is not installed, a chat template is not valid, or others than this machine
            could ask without a key; or the port is none.
        FileError: the address cannot be listened on.
    """
    whole("serve", "port", port, 0, 65535)
    try:
        import uvicorn

        from pyrformer.serve.app import Server
    except ImportError as e:
        raise InputError(
            "[serve] this needs uvicorn and starlette; run: pip install 'pyrformer[serve]'"
        ) from e
    if not is_local(host) and not settings.api_key:
        raise InputError(f"[serve] {host} can be reached by others: set an API key, or listen on 127.0.0.1")

    class Ready(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup(sockets)  # type: ignore[arg-type]
            if self.started:
                bound = self.servers[0].sockets[0].getsockname()[1]
                on_ready(f"http://{f'[{host}]' if ':' in host else host}:{bound}")

    config = uvicorn.Config(
        Server(models, settings).app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=stop_seconds,
    )
    try:
        Ready(config).run()
    except SystemExit as e:
        raise FileError(f"[serve] cannot listen on {host}:{port}; is it in use?") from e
