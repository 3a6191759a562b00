"""HTTP in, server-sent events out: the API process.

    server.py     its life: listen, load, serve, drain, exit codes
    protocol.py   a bound on request heads, below the routes
    app.py        the routes and what every request passes through
    service.py    what the routes share: engine client, tokenizer, phase
    checkpoint.py what this process reads of a model: tokenizer, template, defaults
    json_shape.py how deep a body nests, before it is parsed
    answer.py     one HTTP request's sequences: Deltas as they come, abort exactly once
    openai_*.py   the OpenAI dialect: schema, completions, chat
    sse.py        how a stream is framed
    startup.py    how far the start is     threads.py  work beside the event loop
    health.py     probes     metrics.py  figures     limits.py  body size
    gate.py       what stands before the routes: listen.py, tls.py, callers.py, keys.py
    origins.py    Host, Origin and CORS     auth.py  keys and their scopes

No torch here, and no scheduling: requests go to the engine process and come back as tokens.
"""
