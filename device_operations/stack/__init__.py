"""Everything on one machine: PostgreSQL and Valkey of our own, and the processes that `up` starts, watches and stops.

    up.py          the whole product: what to start, in which order, and what to print
    supervisor.py  the children: started, restarted with backoff, stopped in order
    processes.py   one process and what it leaves behind, on POSIX and Windows
    services.py    how each part is run, and when it is ready
    state.py       the data folder's private files, and the lock on them
    postgres.py, valkey.py    one server each: set up, command, is it ready
    servers.py     both servers together, for tests and benchmarks
    flower.py      Flower behind a password, every page of it

Nothing here is needed where PostgreSQL and Redis are given by URL and the services are started one by one.
"""
