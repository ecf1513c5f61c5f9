"""A model behind HTTP, in OpenAI's manner: ``pyrformer serve``. Needs ``pip install pyrformer[serve]``.

* :mod:`~pyrformer.serve.engine` — one thread that decodes all requests under way together, a step at a time;
* :mod:`~pyrformer.serve.protocol` — what requests may say, as data, and the errors;
* :mod:`~pyrformer.serve.app` — the ASGI application: addresses, limits, streams;
* :mod:`~pyrformer.serve.server` — the process: the socket, signals.
"""
