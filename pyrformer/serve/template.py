"""Messages to a prompt, by the template that comes with a model: Jinja in a sandbox.

Source: ``apply_chat_template`` of transformers' ``tokenization_utils_base.py``, and its page "Writing a chat template".
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pyrformer.checkpoint import chat_template as stored
from pyrformer.errors import FileError, InputError
from pyrformer.model import Model
from pyrformer.tokenizers import Tokenizer

#: Who may speak, for those who check it themselves; templates may know others.
MOST_MESSAGES = 4096


class ChatTemplate:
    """A model's template."""

    def __init__(self, text: str, tokens: dict[str, str]):
        """
        Args:
            text: Jinja.
            tokens: special tokens by their roles: "bos_token", "eos_token", …, as the template knows them.

        Raises:
            InputError: jinja2 is not installed, or the template is no Jinja.
        """
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as e:
            raise InputError("[serve] chat templates need jinja2; run: pip install 'pyrformer[serve]'") from e
        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": self._refuse, "strftime_now": time.strftime}
        try:
            self._template = environment.from_string(text)
        except TemplateError as e:
            raise InputError(f"[serve] the chat template is not valid: {e}") from None
        self._tokens = tokens

    def _refuse(self, message: str) -> None:
        raise self._error(message)

    def prompt(self, messages: Any) -> str:
        """The text that the model goes on with.

        Raises:
            InputError: these are no messages, or the template refuses them.
        """
        if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
            raise InputError("[serve] messages must be a list of objects with role and content")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InputError("[serve] a message must be an object with role and content")
        told = [{**m, "content": _text(m.get("content"))} for m in messages]
        try:
            return self._template.render(messages=told, add_generation_prompt=True, **self._tokens)
        except (
            self._error,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as e:
            raise InputError(f"[serve] the chat template refuses these messages: {e}") from None

    def ids(self, messages: Any, tokenizer: Tokenizer) -> list[int]:
        """The ids of :meth:`prompt`: its special tokens are the template's own.

        Raises:
            InputError: as :meth:`prompt`.
        """
        return tokenizer.encode(self.prompt(messages), add_special_tokens=False).ids


def _text(content: Any) -> str:
    """The text of a message: as it is, or its parts of kind "text" joined."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"] for part in content)
    raise InputError("[serve] the content of a message must be a text, or a list of parts of type 'text'")


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as templates expect it: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def chat_template(model: Model, file: str | None = None) -> ChatTemplate | None:
    """The template of a model, or that of a file; None where there is none.

    Raises:
        FileError: a file cannot be read.
        InputError: the template is not valid, or jinja2 is not installed.
    """
    if file is not None:
        try:
            text: str | None = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise FileError(f"[serve] cannot read the chat template {file}: {e}") from None
    else:
        text = stored(model.origin.path) if model.origin else None
    return None if text is None else ChatTemplate(text, model.require_tokenizer().special_tokens())
