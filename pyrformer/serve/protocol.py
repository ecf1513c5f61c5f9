"""What requests may say, and how answers are worded: JSON objects in, JSON objects out, no network.

Source: OpenAI's API reference, https://platform.openai.com/docs/api-reference (completions, chat, embeddings, models).
"""

from __future__ import annotations

import base64
import math
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer.errors import InputError
from pyrformer.generation.call import merged_options
from pyrformer.model import Model
from pyrformer.serve.engine import Token
from pyrformer.serve.template import ChatTemplate
from pyrformer.tokenizers import Tokenizer

#: Fields that choose among the filters and penalties of generation, beyond OpenAI's own.
FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
#: Fields of completions that are taken in their default only.
DEFAULT_ONLY = {"suffix": None}
#: What a model's own file may say and a server does not do.
NOT_STORED = {
    **dict.fromkeys(
        ("penalty_alpha", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens")
    ),
    **dict.fromkeys(("stop_strings", "max_time")),
    "num_beams": 1,
}
COMPLETION = {
    *(
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "n",
        "best_of",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
    ),
    *("echo", "stream", "stream_options", "user", *FILTERS, *DEFAULT_ONLY),
}
#: Fields of chats that completions have not, and the other way round.
CHAT_ONLY = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format"}
CHAT = COMPLETION - {"prompt", "best_of", "echo", *DEFAULT_ONLY} | CHAT_ONLY
#: Fields of chats that are taken in their default only.
CHAT_DEFAULT_ONLY: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}
EMBEDDING = {"model", "input", "encoding_format", "user"}
#: Stop strings, alternatives of a token, texts of an embedding request, at most.
MAX_STOPS, MAX_LOGPROBS, MAX_TEXTS = 4, 5, 2048
#: The same of a chat.
MAX_TOP_LOGPROBS = 20


class BadRequest(InputError):
    """A request that is refused.

    Attributes:
        param: the field that is wrong.
        status: HTTP's number.
        code: OpenAI's word for it.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        tokens: of a sequence, prompt included.
        rows: sequences of a prompt.
        waiting: prompts of a request.
    """

    tokens: int
    rows: int
    waiting: int


@dataclass(frozen=True)
class CompletionRequest:
    """A body of ``/v1/completions``, checked.

    Attributes:
        prompts: ids of each.
        options: of the search, for each prompt alike.
        stops: strings that end a completion and are not part of it.
        logprobs: alternatives of each token to report; None: no log-probabilities.
        stream: whether pieces come as they are made; ``usage``: and in the end how many tokens there were.
        echo: whether the prompt comes first.
        chat: whether the answer is a message.
        empty: whether nothing is wanted but the prompt; the search makes a token, which is dropped.
    """

    prompts: list[list[int]]
    options: dict[str, Any]
    stops: list[str]
    logprobs: int | None
    stream: bool
    usage: bool
    echo: bool = False
    chat: bool = False
    empty: bool = False

    @property
    def n(self) -> int:
        """Completions of each prompt."""
        return int(self.options["num_return_sequences"])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


def _number(
    body: dict[str, Any], name: str, default: Any, low: float, high: float, whole: bool = False
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        raise BadRequest(f"{name} must be {what} from {low:g} to {high:g}, got {value!r}", name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise BadRequest(f"{name} must be true or false, got {value!r}", name)
    return bool(value)


def _check(body: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name in body:
        if name not in known:
            raise BadRequest(f"unknown field {name!r}; known are {', '.join(sorted(known))}", name)
    return body


def _texts(body: dict[str, Any], name: str, model: Model, *, framed: bool) -> list[list[int]]:
    """The ids of a text, a list of texts, a list of ids, or a list of such lists."""
    given = body.get(name)
    if isinstance(given, str) or (isinstance(given, list) and given and all(map(_is_id, given))):
        given = [given]
    if not isinstance(given, list) or not given:
        raise BadRequest(
            f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists", name
        )
    found = []
    for i, item in enumerate(given):
        if isinstance(item, str):
            ids = model.require_tokenizer().encode(item, add_special_tokens=framed).ids
        elif isinstance(item, list) and all(map(_is_id, item)):
            ids = item
        else:
            raise BadRequest(f"{name}[{i}] is neither a text nor a list of token ids", name)
        if not ids and model.family.config.bos_token_id is not None:
            ids = [model.family.config.bos_token_id]
        if not ids:
            raise BadRequest(f"{name}[{i}] is empty; give at least one token", name)
        vocabulary = model.family.config.vocab_size
        if not all(0 <= t < vocabulary for t in ids):
            raise BadRequest(f"{name}[{i}] has ids outside 0..{vocabulary - 1}", name)
        found.append(ids)
    return found


def _is_id(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def read_completion(
    body: Any, model: Model, limits: Limits, most_logprobs: int = MAX_LOGPROBS
) -> CompletionRequest:
    """Checks a body of ``/v1/completions``.

    ``temperature`` is 1 and ``max_tokens`` 16 unless given, as in OpenAI's API; temperature 0 takes the most probable
    token. What the model's ``generation_config.json`` says holds where the request says nothing.

    Raises:
        BadRequest: a field is unknown, wrong, or beyond the limits.
    """
    body = _check(body, COMPLETION)
    if model.family.objective != "ar":
        why = "keeps no cache" if model.family.objective == "plm" else "does not continue text"
        raise BadRequest(f"this model {why}; use /v1/embeddings", "model")
    for name, default in DEFAULT_ONLY.items():
        if body.get(name, default) != default:
            raise BadRequest(f"{name} is not supported here", name)
    prompts = _texts(body, "prompt", model, framed=True)
    if len(prompts) > limits.waiting:
        raise BadRequest(f"a request may have {limits.waiting} prompts, got {len(prompts)}", "prompt")
    n = _number(body, "n", 1, 1, limits.rows, whole=True)
    if body.get("best_of") not in (None, n):
        raise BadRequest("best_of must equal n", "best_of")
    echo = _flag(body, "echo")
    most = _number(body, "max_tokens", 16, 0 if echo else 1, limits.tokens, whole=True)
    longest = max(map(len, prompts))
    if longest + most > limits.tokens:
        message = (
            f"a prompt of {longest} tokens and max_tokens {most} are more than the {limits.tokens} allowed"
        )
        raise BadRequest(message, "prompt", code="context_length_exceeded")
    temperature = _number(body, "temperature", 1.0, 0, 2)
    options: dict[str, Any] = {
        "max_new_tokens": max(1, most),
        "num_return_sequences": n,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        options |= {
            "temperature": float(temperature),
            "seed": _number(body, "seed", None, 0, 2**63 - 1, whole=True),
        }
        if options["seed"] is None:
            options["seed"] = secrets.randbits(63)
    elif n > 1:
        raise BadRequest("n above 1 needs a temperature above 0", "n")
    filters = {name: body[name] for name in FILTERS if body.get(name) is not None}
    if temperature == 0:
        filters = {k: v for k, v in filters.items() if k.endswith("_penalty")}
    bias = body.get("logit_bias") or {}
    try:
        filters |= {"sequence_bias": [([int(t)], float(b)) for t, b in bias.items()]} if bias else {}
    except (AttributeError, TypeError, ValueError):
        raise BadRequest("logit_bias must be an object from token ids to numbers", "logit_bias") from None
    try:
        options = merged_options(model, NOT_STORED, {**options, **filters})
    except InputError as e:
        raise BadRequest(str(e)) from None
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise BadRequest(f"stop must be a text or a list of at most {MAX_STOPS} texts", "stop")
    extra = body.get("stream_options") or {}
    if not isinstance(extra, dict) or set(extra) - {"include_usage"}:
        raise BadRequest("stream_options may hold include_usage only", "stream_options")
    logprobs = _number(body, "logprobs", None, 0, most_logprobs, whole=True)
    return CompletionRequest(
        prompts,
        options,
        stops,
        logprobs,
        _flag(body, "stream"),
        _flag(extra, "include_usage"),
        echo,
        empty=most == 0,
    )


def read_chat(body: Any, model: Model, limits: Limits, template: ChatTemplate | None) -> CompletionRequest:
    """Checks a body of ``/v1/chat/completions``: the messages become a prompt by the model's template.

    Raises:
        BadRequest: a field is unknown, wrong, not supported, or beyond the limits; or the model has no template.
    """
    body = dict(_check(body, CHAT))
    if template is None:
        raise BadRequest("this model has no chat template; ask /v1/completions", code="no_chat_template")
    for name, allowed in CHAT_DEFAULT_ONLY.items():
        if body.pop(name, None) not in allowed:
            raise BadRequest(f"{name} is not supported here", name)
    prompt = template.ids(body.pop("messages", None), model.require_tokenizer())
    if body.get("max_tokens") is None:
        body["max_tokens"] = body.get("max_completion_tokens")
    body.pop("max_completion_tokens", None)
    if body["max_tokens"] is None:
        body["max_tokens"] = max(1, limits.tokens - len(prompt))
    # Of completions, logprobs is a number; of chats a flag, and the number stands beside it.
    top = _number(body, "top_logprobs", None, 0, MAX_TOP_LOGPROBS, whole=True)
    body.pop("top_logprobs", None)
    wanted = _flag(body, "logprobs")
    if top is not None and not wanted:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    body["logprobs"] = (top or 0) if wanted else None
    asked = read_completion({**body, "prompt": prompt}, model, limits, MAX_TOP_LOGPROBS)
    return replace(asked, chat=True)


def read_embedding(body: Any, model: Model, limits: Limits) -> tuple[list[list[int]], bool]:
    """Checks a body of ``/v1/embeddings``; gives the texts' ids, and whether vectors go in base64.

    Raises:
        BadRequest: a field is unknown, wrong, or beyond the limits.
    """
    body = _check(body, EMBEDDING)
    texts = _texts(body, "input", model, framed=True)
    if len(texts) > MAX_TEXTS:
        raise BadRequest(f"a request may have {MAX_TEXTS} texts, got {len(texts)}", "input")
    longest = max(map(len, texts))
    if longest > limits.tokens:
        message = f"a text of {longest} tokens is more than the {limits.tokens} allowed"
        raise BadRequest(message, "input", code="context_length_exceeded")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise BadRequest("encoding_format must be 'float' or 'base64'", "encoding_format")
    return texts, body.get("encoding_format") == "base64"


def embedding_body(
    name: str, texts: list[list[int]], vectors: npt.NDArray[np.float32], in_base64: bool
) -> dict[str, Any]:
    """The answer of ``/v1/embeddings``; base64 holds little-endian float32."""
    used = sum(map(len, texts))
    coded = (
        [base64.b64encode(v.astype("<f4").tobytes()).decode("ascii") for v in vectors]
        if in_base64
        else vectors.tolist()
    )
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(coded)]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "data": data, "model": name, "usage": usage}


class Choice:
    """One completion as its tokens come: its text up to the first stop string, never half a character."""

    def __init__(self, index: int, tokenizer: Tokenizer, asked: CompletionRequest):
        self.index, self.tokens = index, 0
        self._tokenizer, self._stops, self._logprobs = tokenizer, asked.stops, asked.logprobs
        self._empty = asked.empty
        self._pieces = tokenizer.stream_decoder(skip_special_tokens=True)
        #: Text that may be the beginning of a stop string; how much was given; whether one was found.
        self._held, self._given, self._stopped = "", 0, False
        self._pending: list[tuple[Token, int]] = []

    def echo(self, tokens: list[Token]) -> dict[str, Any]:
        """The part of the answer that is the prompt."""
        pieces, text, placed = self._tokenizer.stream_decoder(skip_special_tokens=True), "", []
        for token in tokens:
            placed.append((token, len(text)))
            text += pieces.push(token.id) or ""
        text += pieces.finish() or ""
        self._given = len(text)
        return self._worded(text, placed)

    def push(self, token: Token) -> dict[str, Any] | None:
        """Takes a token; gives a part of the answer where there is one."""
        if self._empty:
            return None
        self.tokens += 1
        if self._stopped:
            return None
        self._pending.append((token, self._given + len(self._held)))
        return self._part(self._pieces.push(token.id) or "", last=False)

    def finish(self, reason: str) -> dict[str, Any]:
        """The last part: what was held back, and why the completion ended."""
        part = None if self._stopped else self._part(self._pieces.finish() or "", last=True)
        part = part or self._worded("", [])
        return {**part, "finish_reason": reason}

    def _part(self, piece: str, *, last: bool) -> dict[str, Any] | None:
        text = self._held + piece
        places = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if places:
            self._stopped, self._held = True, ""
            text = text[: min(places)]
        elif not last:
            # The longest end of the text that is the beginning of a stop string waits for what follows.
            most = max((len(s) - 1 for s in self._stops), default=0)
            keep = next(
                (
                    k
                    for k in range(min(most, len(text)), 0, -1)
                    if any(s.startswith(text[-k:]) for s in self._stops)
                ),
                0,
            )
            self._held, text = text[len(text) - keep :], text[: len(text) - keep]
        else:
            self._held = ""
        self._given += len(text)
        whole = not self._held
        given = [t for t in self._pending if whole or t[1] < self._given]
        if not text and not (given and (last or self._stopped)):
            return None
        self._pending = self._pending[len(given) :]
        return self._worded(text, given)

    def _worded(self, text: str, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        part: dict[str, Any] = {"text": text, "index": self.index, "logprobs": None, "finish_reason": None}
        if self._logprobs is not None:
            name = self._name
            part["logprobs"] = {
                "tokens": [name(t.id) for t, _ in tokens],
                "token_logprobs": [None if math.isnan(t.logprob) else t.logprob for t, _ in tokens],
                "top_logprobs": [{name(i): p for i, p in t.top} or None for t, _ in tokens]
                if self._logprobs
                else None,
                "text_offset": [at for _, at in tokens],
            }
        return part

    def _name(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        # A piece of a character is told by its token: as text, all pieces look alike.
        return self._tokenizer.id_to_token(token) or text if "\ufffd" in text else text


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one choice as one."""
    whole = dict(parts[-1])
    whole["text"] = "".join(p["text"] for p in parts)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: None if column is None else [x for p in parts for x in p["logprobs"][name]]
            for name, column in whole["logprobs"].items()
        }
    return whole


class Answer:
    """What the bodies of one answer share."""

    def __init__(self, name: str, request: CompletionRequest):
        self.request = request
        kind = "text_completion"
        if request.chat:
            kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self.head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }
        self._begun: set[int] = set()

    def usage(self, choices: list[Choice]) -> dict[str, int]:
        """Tokens of the prompts and of the completions."""
        read, made = self.request.prompt_tokens, sum(c.tokens for c in choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A whole answer, or a part of one."""
        if self.request.chat:
            choices = [self._spoken(part) for part in choices]
        return {**self.head, "choices": choices, **({"usage": usage} if usage is not None else {})}

    def _spoken(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part as a chat words it: a message, or in a stream what is added to it."""
        first = part["index"] not in self._begun
        self._begun.add(part["index"])
        said = {**({"role": "assistant"} if first else {}), "content": part["text"]}
        found = part["logprobs"]
        tops = (found["top_logprobs"] or [None] * len(found["tokens"])) if found is not None else []
        listed = found and {
            "content": [
                {**_probable(token, p), "top_logprobs": [_probable(t, q) for t, q in (top or {}).items()]}
                for token, p, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
            ]
        }
        return {
            "index": part["index"],
            "delta" if self.request.stream else "message": said,
            "logprobs": listed,
            "finish_reason": part["finish_reason"],
        }


def _probable(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "surrogatepass"))}
