"""HTTP without the fast path: uvicorn through its public interfaces only, within the same limits.

    socket ─▶ PlainProtocol ─▶ uvicorn's protocol ─▶ PlainPath ─▶ the gateway
              a parser of its own counts             `Connection: close`, refusals while a body is read

uvicorn offers a class of protocol (`http=`), asyncio's callbacks on it, `scope["state"]` and ASGI. With these alone
the limits of `limits` need a second parser, which sees each request before uvicorn does; that is what this path costs,
besides one copy more of large bodies. `HTTP__FAST_PATH=false` selects it.
"""
