"""The model servers that inference is compared with, and the client that drives all contenders alike.

`litserve`, `mlserver` and `pytriton` are run by a Python of their own (`.cache/peers-venv`, from
`requirements/peers.lock`): the modules `*_server.py` here are programs for it and import nothing of the product.
"""
