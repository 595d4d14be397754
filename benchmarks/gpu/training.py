"""Training on a GPU: over HTTP through a worker's death, and a GPT-2-sized model beside a bare loop over its module."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.gpu import WAIT
from benchmarks.measure import Figure, absolute, compare
from tests.support.stack import RunningStack, eventually

#: GPT-2 small: 12 blocks of 768, 12 heads, 50,257 tokens; sequences of 256, four at a time.
BLOCKS, SIDE, HEADS, TOKENS, SEQUENCE, BATCH, STEPS = 12, 768, 12, 50_257, 256, 4, 200

#: More than elsewhere: the host launches each kernel, and rounds were seen to differ by a tenth.
ROUNDS = 9


def training_over_http(stack: RunningStack) -> list[Figure]:
    """A session on the GPU whose worker is killed and comes back: the same losses as one that was left alone."""
    client = stack.client
    rng = np.random.default_rng(3)
    xs, ys = rng.standard_normal((8, 64)).astype(np.float32), rng.integers(0, 10, 8)

    def steps(session_id: str, first: int, last: int) -> list[float]:
        losses = []
        for number in range(first, last + 1):
            body = {
                "session_id": session_id, "sequence": number,
                "inputs": {"input": {"dtype": "float32", "shape": [8, 64], "data": xs.tolist()}},
                "targets": {"dtype": "int64", "shape": [8], "data": ys.tolist()},
            }  # fmt: skip
            done = client.post("/api/training/step", json=body, headers=WAIT).json()
            if done.get("state") != "succeeded":
                done = client.get(f"/api/jobs/{done['job_id']}", params={"wait": 60}).json()
            assert done["state"] == "succeeded", done
            losses.append(done["result"]["loss"])
        return losses

    def begin() -> str:
        layers = [
            {"type": "linear", "in_features": 64, "out_features": 128}, {"type": "relu"}, {"type": "dropout", "p": 0.2},
            {"type": "linear", "in_features": 128, "out_features": 10},
        ]  # fmt: skip
        body = {"model": {"kind": "layers", "layers": layers}, "loss": "cross_entropy",
                "optimizer": {"type": "adamw", "learning_rate": 0.01}, "seed": 7}  # fmt: skip
        made = client.post("/api/training/initialize", json=body, headers=WAIT).json()
        assert made["state"] == "succeeded", made
        return str(made["resource"]["id"])

    whole = steps(begin(), 1, 30)
    broken = begin()
    losses = steps(broken, 1, 15)
    client.post("/api/training/checkpoint", json={"session_id": broken}, headers=WAIT).raise_for_status()
    losses += steps(broken, 16, 20)
    stack.kill("gpu_0")
    stack.start("gpu_0")
    eventually(lambda: client.get(f"/api/training/status/{broken}").json()["state"] == "restored", 90)
    losses += steps(broken, 21, 30)
    for session_id in (broken,):
        client.delete(f"/api/training/session/{session_id}", headers=WAIT).raise_for_status()
    return [
        absolute(
            "losses of a killed session equal the undisturbed one's, bit for bit",
            "",
            float(losses == whole),
            at_least=1,
        )
    ]


def training_figures() -> list[Figure]:
    """A GPT-2-sized session stepping through a dataset beside a bare loop over the same module and optimizer."""
    import torch

    from device_operations.requests.training import Initialize
    from workers.training.dataset import BatchPlan, Samples
    from workers.training.model.definition import Sources
    from workers.training.outcomes import StepOptions
    from workers.training.session import Limits, build_session

    block = [
        {"type": "residual", "layers": [{"type": "layer_norm", "normalized_shape": SIDE},
         {"type": "multihead_attention", "embed_dim": SIDE, "num_heads": HEADS, "batch_first": True}]},
        {"type": "residual", "layers": [{"type": "layer_norm", "normalized_shape": SIDE},
         {"type": "linear", "in_features": SIDE, "out_features": 4 * SIDE}, {"type": "gelu"},
         {"type": "linear", "in_features": 4 * SIDE, "out_features": SIDE}]},
    ]  # fmt: skip
    layers = [
        {"type": "embedding", "num_embeddings": TOKENS, "embedding_dim": SIDE},
        *(layer for _ in range(BLOCKS) for layer in block),
        {"type": "layer_norm", "normalized_shape": SIDE},
        {"type": "linear", "in_features": SIDE, "out_features": TOKENS, "bias": False},
        # The mean over the tokens keeps the targets small: what is timed is the model, not its targets' way to the GPU.
        {"type": "adaptive_avg_pool1d", "output_size": 1},
    ]
    spec = Initialize.model_validate(
        {"model": {"kind": "layers", "layers": layers}, "loss": "mse", "deterministic": False,
         "optimizer": {"type": "adamw", "learning_rate": 1e-4}}
    )  # fmt: skip
    device = torch.device("cuda:0")
    session = build_session(spec, Sources(), device, Limits(memory_bytes=None, max_batch_size=64))
    count = sum(parameter.numel() for parameter in session._module.parameters())
    inputs = torch.randint(0, TOKENS, (64, SEQUENCE))
    targets = torch.zeros(64, SEQUENCE, 1)
    module, optimizer = session._module, torch.optim.AdamW(session._module.parameters(), lr=1e-4)
    loss_of = torch.nn.functional.mse_loss
    on_device = inputs.to(device)
    zeros = torch.zeros(BATCH, SEQUENCE, 1, device=device)

    def bare() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        module.train()
        for number in range(STEPS):
            at = BATCH * number % 64
            loss = loss_of(module(on_device[at : at + BATCH]), zeros)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            norm.item()
        torch.cuda.synchronize()
        return STEPS / (time.perf_counter() - began)

    sequence = 0

    def ours() -> float:
        nonlocal sequence
        sequence += 1
        run = session.run(
            Samples({"input": inputs}, targets), BatchPlan(BATCH, steps=STEPS, shuffle=False), StepOptions(), sequence
        )
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in run:
            pass
        torch.cuda.synchronize()
        rate = STEPS / (time.perf_counter() - began)
        run.finish()
        return rate

    return [compare(f"training of {count / 1e6:.0f} M parameters, {STEPS} steps of {BATCH}x{SEQUENCE} tokens", "steps/s",
                    ours, bare, "bare torch loop, same module, loss and gradient norm taken at each step", at_least=0.98,
                    rounds=ROUNDS)]  # fmt: skip
